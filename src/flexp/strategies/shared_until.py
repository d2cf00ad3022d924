"""A part of the adapter is averaged until a round; from then on everybody trains a part alone.

FedBABU, PHSFL and PFSL are this. Averages are made by edge servers, each over its clients, and now
and then by a centre over the edges; one edge is plain averaging. What differs between methods is a
policy: which part (``moving``), until when (``settled``), what trains then (``tuned``), who weighs
how much. The one server of a run is all edges and the centre.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from flexp.client.desk import Desk
from flexp.model.ops import SlotSpec
from flexp.parcel import Parcel
from flexp.selection import Where
from flexp.strategies.base import ClientId, MethodKind, Scene, Strategy, Turn
from flexp.tensors import Tensors, mean_by_name


@dataclass(frozen=True)
class Edges:
    """What each edge averaged last, who is where, and rows since the centre averaged.

    ``had``: who has begun to train alone. Before the first average an edge has nothing.
    """

    bodies: Mapping[str, Tensors]
    at: Mapping[ClientId, str]
    rows: Mapping[str, float] = field(default_factory=dict[str, float])
    had: tuple[ClientId, ...] = ()

    def of(self, client: ClientId) -> str:
        """A client's edge; who came later goes where the fewest are."""
        held = list(self.at.values())
        return self.at.get(client) or min(sorted(self.bodies), key=held.count)


@dataclass(frozen=True)
class SharedUntil(Strategy[Edges]):
    """``moving`` trains and is averaged, rows as weights; once ``settled``, ``tuned`` trains."""

    kind: ClassVar[MethodKind] = "personalised"
    slots: ClassVar[Mapping[str, SlotSpec]] = {"personal": SlotSpec(lasts="run")}

    # ---- the policy

    def settled(self, turn: Turn) -> bool:
        """Whether nothing is averaged any more."""
        raise NotImplementedError

    def tuned(self) -> tuple[Where, int | None]:
        """What trains then, for how many steps of a turn (None: the recipe's)."""
        raise NotImplementedError

    def hierarchy(self) -> tuple[int, int]:
        """How many edges there are, and after how many rounds the centre averages."""
        return 1, 1

    def weights(self, replies: Mapping[ClientId, Parcel], turn: Turn) -> list[float]:
        """What each counts in the mean."""
        return turn.weights(list(replies))

    # ---- what follows from it

    def start(self, scene: Scene) -> Edges:
        edges = [str(n) for n in range(self.hierarchy()[0])]
        at = {c: edges[n % len(edges)] for n, c in enumerate(sorted(scene.clients))}
        return Edges({edge: {} for edge in edges}, at)

    def offer(self, state: Edges, client: ClientId, turn: Turn) -> Parcel:
        facts = {"settled": self.settled(turn)}
        if client in state.had:  # the rest stays as it is, and what is tuned is its own
            return Parcel(facts=facts)
        body = turn.select(client, state.bodies[state.of(client)], self.moving())
        return Parcel({"personal": body}, facts=facts)

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        if offer.facts["settled"]:
            part, steps = self.tuned()
            return Parcel(facts=desk.fit(train=part, steps=steps))
        facts = desk.fit(train=self.moving())
        return desk.reply("personal", where=self.moving(), facts=facts)

    def merge(self, state: Edges, replies: Mapping[ClientId, Parcel], turn: Turn) -> Edges:
        if self.settled(turn):
            return replace(state, had=tuple(sorted({*state.had, *replies})))
        at, bodies, rows = dict(state.at), dict(state.bodies), dict(state.rows)
        for client in replies:
            at[client] = replace(state, at=at).of(client)
        for edge in sorted({at[client] for client in replies}):
            mine = {c: reply for c, reply in replies.items() if at[c] == edge}
            trained, weights = (
                [r.adapters["personal"] for r in mine.values()],
                self.weights(mine, turn),
            )
            bodies[edge] = {**bodies[edge], **mean_by_name(trained, weights)}
            rows[edge] = rows.get(edge, 0.0) + sum(weights)
        if not (rows and self.due(turn)):
            return replace(state, at=at, bodies=bodies, rows=rows)
        heard = sorted(rows)
        whole = mean_by_name([bodies[edge] for edge in heard], [rows[edge] for edge in heard])
        return Edges(dict.fromkeys(bodies, whole), at)

    def due(self, turn: Turn) -> bool:
        """Whether the centre averages after this round: the last one before all is settled does."""
        after = turn.round + 1
        return after % self.hierarchy()[1] == 0 or self.settled(replace(turn, round=after))
