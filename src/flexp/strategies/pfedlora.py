"""pFedLoRA (Yi et al., 2023, arXiv 2310.13283): private models that talk through one small adapter.

Everybody attaches the same adapter to a model of its own. Round, with the averaged adapter w on:
    m_i <- E local epochs with w frozen          private, never leaves
    w_i <- E local epochs with m_i frozen;  w <- sum_i p_i w_i
The model is served with its adapter. Twice the work of FedAvg.

Reconstruction: all clients have one frozen backbone here, so what is private is a LoRA adapter of
the client's own, with its head; both are worn as the sum of their products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flexp.client.desk import Desk
from flexp.parcel import Parcel
from flexp.privacy.egress import Leave
from flexp.selection import ALL
from flexp.strategies.base import ClientId, MethodKind, Served, Setting, Turn
from flexp.strategies.ranks import LORA, no_product
from flexp.strategies.shared_beside import SharedBeside
from flexp.tensors import Stacked, Tensors, Term

BOTH = Stacked((Term("personal"), Term("shared")))


@dataclass(frozen=True)
class PFedLora(SharedBeside):
    """A private adapter and head, and one small LoRA on top that is averaged, trained in turn."""

    name: ClassVar[str] = "pfedlora"
    paper: ClassVar[str] = "Yi et al. 2023, arXiv 2310.13283"
    kind: ClassVar[MethodKind] = "federated LoRA"
    alone: ClassVar[bool] = False
    reconstruction: ClassVar[str] = "the private model is an adapter on the common backbone"
    leaves: ClassVar[tuple[Leave, ...]] = (Leave("shared", LORA, why="to be averaged"),)

    def refuses(self, setting: Setting) -> str:
        return self.without_lora(setting) or no_product(setting) or super().refuses(setting)

    def offer(self, state: Tensors, client: ClientId, turn: Turn) -> Parcel:
        return Parcel({"shared": turn.select(client, state, LORA)})

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        self.behead(desk)
        facts = desk.fit(wear=BOTH, train={"personal": ALL})
        desk.fit(wear=BOTH, train={"shared": LORA})
        return desk.reply("shared", where=LORA, facts=facts)

    def personal(self, desk: Desk, offer: Parcel) -> Served:
        self.behead(desk)
        return Served(lambda batch: desk.model.logits(batch, BOTH), BOTH)

    def behead(self, desk: Desk) -> None:
        """There is one head, the private one: a sum of two would be worn otherwise."""
        desk.assign("shared", (Term("shared", 0.0),), where=~LORA)
