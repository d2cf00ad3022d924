"""Pooled: one model trained on everybody's rows in one place, the ceiling of every comparison.

Not federated: it asks for what federation is there to avoid. One machine with the whole model takes
as many steps per round as all clients of the round together, over the union of their rows, with one
optimizer for the whole run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from flexp.client.desk import Desk
from flexp.dice import Dice
from flexp.model.ops import SlotSpec
from flexp.parcel import Parcel
from flexp.privacy.egress import Leave
from flexp.strategies.base import ClientId, MethodKind, Scene, Setting, Strategy, Turn
from flexp.tensors import Tensors


@dataclass(frozen=True)
class Centre:
    """Who stands in for the one place, and the model there."""

    host: ClientId
    adapter: Tensors


@dataclass(frozen=True)
class Pooled(Strategy[Centre]):
    """Centralised training on all rows together: a ceiling, not federated."""

    name: ClassVar[str] = "pooled"
    paper: ClassVar[str] = "no federation"
    kind: ClassVar[MethodKind] = "centralised"
    split: ClassVar[str] = "no: all rows and the whole model are in one place."
    alone: ClassVar[bool] = False
    slots: ClassVar[Mapping[str, SlotSpec]] = {"personal": SlotSpec(lasts="run", moments="keep")}
    leaves: ClassVar[tuple[Leave, ...]] = (
        Leave("rows", when="before the run", why="all rows are put in one place"),
        Leave("personal", why="everybody gets the one model"),
    )

    def refuses(self, setting: Setting) -> str:
        return self.unequal_heads(setting)  # one place: no cut and no rank to agree on

    def start(self, scene: Scene) -> Centre:
        return Centre(scene.clients[0], scene.initial(self.slots["personal"]))

    def waves(
        self, state: Centre, chosen: Sequence[ClientId], dice: Dice
    ) -> Sequence[Sequence[ClientId]]:
        return [[state.host]]

    def offer(self, state: Centre, client: ClientId, turn: Turn) -> Parcel:
        return Parcel({"personal": state.adapter}, facts={"clients": len(turn.chosen)})

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        steps = desk.training.steps
        all_of_them = None if steps is None else steps * cast("Any", offer.facts["clients"])
        facts = desk.fit(steps=all_of_them)
        return desk.reply("personal", facts=facts)

    def merge(self, state: Centre, replies: Mapping[ClientId, Parcel], turn: Turn) -> Centre:
        for reply in replies.values():
            state = Centre(state.host, reply.adapters["personal"])
        return state
