"""FedAvg of adapters (McMahan et al., 2017, arXiv 1602.05629), for LoRA also known as FedIT.

Round: w_i <- E local epochs from w;  w <- sum_i p_i w_i.  Factors A and B are averaged each for
itself, so the mean of the products is not exactly the product of the means.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from flexp.client.desk import Desk
from flexp.model.ops import SlotSpec
from flexp.parcel import Parcel
from flexp.privacy.egress import Leave
from flexp.selection import ALL, Where
from flexp.strategies.base import ClientId, MethodKind, Scene, Strategy, Turn
from flexp.tensors import Tensors, mean


@dataclass(frozen=True)
class FedAvg(Strategy[Tensors]):
    """One shared adapter; everybody trains a copy, fresh optimizer each round, rows as weights."""

    name: ClassVar[str] = "fedavg"
    paper: ClassVar[str] = "McMahan et al. 2017, arXiv 1602.05629"
    kind: ClassVar[MethodKind] = "federated"
    slots: ClassVar[Mapping[str, SlotSpec]] = {"personal": SlotSpec()}
    leaves: ClassVar[tuple[Leave, ...]] = (Leave("personal", why="to be averaged"),)

    def averages(self) -> Where:
        return ALL

    def start(self, scene: Scene) -> Tensors:
        return scene.initial(self.slots["personal"])

    def offer(self, state: Tensors, client: ClientId, turn: Turn) -> Parcel:
        return Parcel({"personal": state})

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        facts = desk.fit()
        return desk.reply("personal", facts=facts)

    def merge(self, state: Tensors, replies: Mapping[ClientId, Parcel], turn: Turn) -> Tensors:
        trained = [reply.adapters["personal"] for reply in replies.values()]
        return mean(trained, turn.weights(list(replies))) if trained else state
