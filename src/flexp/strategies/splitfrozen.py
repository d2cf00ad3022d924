"""SplitFrozen (Ma et al., 2025, arXiv 2503.18986): devices only compute, the server learns.

What a device holds is frozen. Round, client after client in random order: the one server adapter
goes on learning from that client's hidden states. No gradient comes back down and no weight
crosses: with labels at the server a step costs 1 S. Otherwise the head is near, frozen as well, and
a step costs 3 S; so that a random one tells classes apart, its rows begin with length 1.
Reconstruction: the stream goes by turns, not by batches, and a block that is near for a client is
as it began there, whatever the server has learned for others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from flexp.client.desk import Desk
from flexp.dice import Dice
from flexp.model.ops import SlotSpec
from flexp.parcel import Parcel
from flexp.selection import FAR, NONE, Where
from flexp.strategies.base import ClientId, MethodKind, Scene, Setting, Strategy, Turn
from flexp.strategies.splitfed_v2 import drawn


@dataclass(frozen=True)
class SplitFrozen(Strategy[None]):
    """Near blocks are frozen, so devices run no backward; one server adapter learns from all."""

    name: ClassVar[str] = "splitfrozen"
    paper: ClassVar[str] = "Ma et al. 2025, arXiv 2503.18986"
    kind: ClassVar[MethodKind] = "split"
    alone: ClassVar[bool] = False
    reconstruction: ClassVar[str] = "by turns, not by batches; what is near is as it began"
    slots: ClassVar[Mapping[str, SlotSpec]] = {
        "personal": SlotSpec(home="server", moments="keep", head_rows=1.0)
    }

    def refuses(self, setting: Setting) -> str:
        depth = setting.depth
        idle = [client for client, seat in setting.seats.items() if seat.near_only(depth)]
        if idle:
            return f'what is near is frozen, and "{idle[0]}" has the whole model. Give it a cut.'
        return super().refuses(setting)

    def start(self, scene: Scene) -> None:
        return None

    def waves(
        self, state: None, chosen: Sequence[ClientId], dice: Dice
    ) -> Sequence[Sequence[ClientId]]:
        return [[client] for client in drawn(chosen, dice)]

    def offer(self, state: None, client: ClientId, turn: Turn) -> Parcel:
        return Parcel()

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        facts = desk.fit(train=self.moving())
        return desk.reply("personal", where=NONE, facts=facts)

    def merge(self, state: None, replies: Mapping[ClientId, Parcel], turn: Turn) -> None:
        return None

    def moving(self) -> Where:
        return FAR
