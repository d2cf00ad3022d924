"""FedPer (Arivazhagan et al., 2019, arXiv 1912.00818): a shared body, a personal head.

Round: (w_i, h_i) <- E local epochs from (w, h_i), both moving together;  w <- sum_i p_i w_i.
With adapters: those of the body are shared; the classifier, and the last K blocks if asked, stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from flexp.client.desk import Desk
from flexp.model.ops import SlotSpec
from flexp.parcel import Parcel
from flexp.privacy.egress import Leave
from flexp.selection import HEAD, Where
from flexp.strategies.base import ClientId, MethodKind, Scene, Setting, Strategy, Turn
from flexp.tensors import Tensors, mean


@dataclass(frozen=True)
class FedPer(Strategy[Tensors]):
    """FedAvg of the body; the head is personal and stays.

    ``blocks`` of the model's end are personal too: the paper's K layers beyond the classifier.
    """

    blocks: int = 0

    name: ClassVar[str] = "fedper"
    paper: ClassVar[str] = "Arivazhagan et al. 2019, arXiv 1912.00818"
    kind: ClassVar[MethodKind] = "personalised"
    own: ClassVar[Where] = HEAD
    slots: ClassVar[Mapping[str, SlotSpec]] = {"personal": SlotSpec(lasts="run")}
    leaves: ClassVar[tuple[Leave, ...]] = (Leave("personal", ~HEAD, why="to be averaged"),)

    @property
    def body(self) -> Where:
        """What is shared."""
        return ~Where(last=self.blocks)

    def refuses(self, setting: Setting) -> str:
        if not 0 <= self.blocks < setting.depth:
            return f"blocks is {self.blocks}, but the model has {setting.depth}: choose fewer."
        if not (setting.head or self.blocks):
            return "the head is its personal part and nobody trains one here. Set strategy.blocks."
        return self.unequal_ranks(setting)

    def start(self, scene: Scene) -> Tensors:
        return scene.initial(self.slots["personal"])

    def offer(self, state: Tensors, client: ClientId, turn: Turn) -> Parcel:
        return Parcel({"personal": turn.select(client, state, self.body)})

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        facts = desk.fit()
        return desk.reply("personal", where=self.body, facts=facts)

    def merge(self, state: Tensors, replies: Mapping[ClientId, Parcel], turn: Turn) -> Tensors:
        trained = [reply.adapters["personal"] for reply in replies.values()]
        return mean(trained, turn.weights(list(replies))) if trained else state
