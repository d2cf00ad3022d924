"""FFA-LoRA (Sun et al., 2024, arXiv 2403.12313): A is random, common, frozen; B is averaged.

Round: B_i <- E local epochs from B with A fixed;  B <- sum_i p_i B_i.  Then sum_i p_i (B_i A) =
(sum_i p_i B_i) A: averaging factors is exact, and half of them need not travel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flexp.client.desk import Desk
from flexp.parcel import Parcel
from flexp.privacy.egress import Leave
from flexp.selection import Where
from flexp.strategies.base import ClientId, MethodKind, Setting, Turn
from flexp.strategies.fedavg import FedAvg
from flexp.tensors import Tensors

A = Where(names="*.lora_A.*")


@dataclass(frozen=True)
class FfaLora(FedAvg):
    """FedAvg of LoRA's B alone; A stays as it began, the same for all.

    The paper uses larger learning rates than for both factors.
    """

    name: ClassVar[str] = "ffa_lora"
    paper: ClassVar[str] = "Sun et al. 2024, arXiv 2403.12313"
    kind: ClassVar[MethodKind] = "federated LoRA"
    shared: ClassVar[Where] = ~A  # the head and what else is trained move along
    leaves: ClassVar[tuple[Leave, ...]] = (Leave("personal", shared, why="to be averaged"),)

    def refuses(self, setting: Setting) -> str:
        return self.without_lora(setting) or super().refuses(setting)

    def moving(self) -> Where:
        return self.shared

    def averages(self) -> Where:
        return self.shared

    def offer(self, state: Tensors, client: ClientId, turn: Turn) -> Parcel:
        return Parcel({"personal": turn.select(client, state, self.shared)})

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        facts = desk.fit(train=self.moving())
        return desk.reply("personal", where=self.shared, facts=facts)
