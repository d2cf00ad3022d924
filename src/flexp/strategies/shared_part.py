"""FedAvg of one part of the adapter; the rest is personal and stays. FedPer and its kin are this.

What differs between them is a policy: which part is shared (``body``), and what trains when in a
turn (``phases``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from flexp.client.desk import Desk
from flexp.model.ops import SlotSpec
from flexp.parcel import Parcel
from flexp.selection import ALL, Where
from flexp.strategies.base import ClientId, MethodKind, Scene, Strategy, Turn
from flexp.tensors import Tensors, mean


@dataclass(frozen=True)
class SharedPart(Strategy[Tensors]):
    """Everybody trains; ``body`` is averaged, rows as weights, and the rest stays where it is."""

    kind: ClassVar[MethodKind] = "personalised"
    slots: ClassVar[Mapping[str, SlotSpec]] = {"personal": SlotSpec(lasts="run")}

    @property
    def body(self) -> Where:
        """What is shared."""
        return ALL

    def phases(self) -> Sequence[tuple[Where, int | None]]:
        """What trains, one after another in a turn, for how many steps (None: the recipe's)."""
        return [(ALL, None)]

    def start(self, scene: Scene) -> Tensors:
        return scene.initial(self.slots["personal"])

    def offer(self, state: Tensors, client: ClientId, turn: Turn) -> Parcel:
        return Parcel({"personal": turn.select(client, state, self.body)})

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        facts = [desk.fit(train=part, steps=steps) for part, steps in self.phases()]
        return desk.reply("personal", where=self.body, facts=facts[-1])

    def merge(self, state: Tensors, replies: Mapping[ClientId, Parcel], turn: Turn) -> Tensors:
        trained = [reply.adapters["personal"] for reply in replies.values()]
        return mean(trained, self.weights(replies, turn)) if trained else state

    def weights(self, replies: Mapping[ClientId, Parcel], turn: Turn) -> list[float]:
        """What each counts in the mean."""
        return turn.weights(list(replies))
