"""SplitFed v3 (Gawali et al., 2021, arXiv 2012.12591): personal fronts, one averaged server net.

Round: every client trains its front with a server copy of its own, as in v1;  at the end only the
server copies are averaged, rows as weights. FlexP-SFL without alignment at equal cuts is the same.
With cuts of several depths a tensor is averaged over the clients whose copy is at the server.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from flexp.client.desk import Desk
from flexp.model.ops import SlotSpec
from flexp.parcel import Parcel
from flexp.selection import FAR, NEAR, Where
from flexp.strategies.base import ClientId, MethodKind, Scene, Strategy, Turn
from flexp.tensors import Tensors, mean_by_name


@dataclass(frozen=True)
class SplitFedV3(Strategy[Tensors]):
    """A server copy per client, averaged after each round; fronts stay personal."""

    name: ClassVar[str] = "splitfed_v3"
    paper: ClassVar[str] = "Gawali et al. 2021, arXiv 2012.12591"
    kind: ClassVar[MethodKind] = "split"
    own: ClassVar[Where] = NEAR
    slots: ClassVar[Mapping[str, SlotSpec]] = {"personal": SlotSpec(lasts="run", moments="keep")}

    def start(self, scene: Scene) -> Tensors:
        return scene.initial(self.slots["personal"])

    def offer(self, state: Tensors, client: ClientId, turn: Turn) -> Parcel:
        return Parcel({"personal": turn.select(client, state, FAR)})

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        facts = desk.fit()
        return desk.reply("personal", where=FAR, facts=facts)

    def merge(self, state: Tensors, replies: Mapping[ClientId, Parcel], turn: Turn) -> Tensors:
        copies = [reply.adapters["personal"] for reply in replies.values()]
        return {**state, **mean_by_name(copies, turn.weights(list(replies)))}
