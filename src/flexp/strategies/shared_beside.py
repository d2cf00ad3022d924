"""FedAvg of a shared adapter, beside which every client has its own. Ditto and its kin are this.

What differs between them is how the two are trained, and which of them, or which mix, is served.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from flexp.model.ops import SlotSpec
from flexp.parcel import Parcel
from flexp.privacy.egress import Leave
from flexp.selection import ALL, Where
from flexp.strategies.base import ClientId, MethodKind, Scene, Strategy, Turn
from flexp.tensors import Tensors, mean


@dataclass(frozen=True)
class SharedBeside(Strategy[Tensors]):
    """Slot "shared" is averaged, rows as weights; slot "personal" stays with its client."""

    kind: ClassVar[MethodKind] = "personalised"
    own: ClassVar[Where] = ALL
    slots: ClassVar[Mapping[str, SlotSpec]] = {
        "personal": SlotSpec(lasts="run", moments="keep"),
        "shared": SlotSpec(),
    }
    leaves: ClassVar[tuple[Leave, ...]] = (Leave("shared", why="to be averaged"),)

    def start(self, scene: Scene) -> Tensors:
        return scene.initial(self.specs()["shared"])

    def offer(self, state: Tensors, client: ClientId, turn: Turn) -> Parcel:
        return Parcel({"shared": state})

    def merge(self, state: Tensors, replies: Mapping[ClientId, Parcel], turn: Turn) -> Tensors:
        trained = [reply.adapters["shared"] for reply in replies.values()]
        return mean(trained, turn.weights(list(replies))) if any(trained) else state
