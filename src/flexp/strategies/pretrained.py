"""The base row of every table: the pretrained model as everybody gets it, nobody trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from flexp.client.desk import Desk
from flexp.dice import Dice
from flexp.model.ops import SlotSpec
from flexp.parcel import Parcel
from flexp.strategies.base import ClientId, MethodKind, Scene, Strategy, Turn


@dataclass(frozen=True)
class Base(Strategy[None]):
    """The pretrained model; a head that its checkpoint lacks is at its random start."""

    name: ClassVar[str] = "base"
    paper: ClassVar[str] = "the pretrained model"
    kind: ClassVar[MethodKind] = "reference"
    alone: ClassVar[bool] = False
    slots: ClassVar[Mapping[str, SlotSpec]] = {"personal": SlotSpec()}

    def start(self, scene: Scene) -> None:
        return None

    def waves(
        self, state: None, chosen: Sequence[ClientId], dice: Dice
    ) -> Sequence[Sequence[ClientId]]:
        return []

    def offer(self, state: None, client: ClientId, turn: Turn) -> Parcel:
        return Parcel()

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        return Parcel()

    def merge(self, state: None, replies: Mapping[ClientId, Parcel], turn: Turn) -> None:
        return None
