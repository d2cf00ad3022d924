"""Local-only: every client fine-tunes alone, the floor of every comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from flexp.client.desk import Desk
from flexp.model.ops import SlotSpec
from flexp.parcel import Parcel
from flexp.selection import ALL, Where
from flexp.strategies.base import ClientId, MethodKind, Scene, Setting, Strategy, Turn


@dataclass(frozen=True)
class Local(Strategy[None]):
    """Each client keeps its own adapter and optimizer; on a cut the server only computes."""

    name: ClassVar[str] = "local"
    paper: ClassVar[str] = "no federation"
    kind: ClassVar[MethodKind] = "reference"
    own: ClassVar[Where] = ALL
    models: ClassVar[bool] = True
    slots: ClassVar[Mapping[str, SlotSpec]] = {"personal": SlotSpec(lasts="run", moments="keep")}

    def refuses(self, setting: Setting) -> str:
        return ""  # nothing is averaged, so ranks may differ

    def start(self, scene: Scene) -> None:
        return None

    def offer(self, state: None, client: ClientId, turn: Turn) -> Parcel:
        return Parcel()

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        return Parcel(facts=desk.fit())

    def merge(self, state: None, replies: Mapping[ClientId, Parcel], turn: Turn) -> None:
        return None
