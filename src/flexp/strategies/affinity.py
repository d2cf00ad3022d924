"""Whose models a client is offered: those that have helped it most so far, or with some chance any.

Row i of the matrix adds up what clients have told of the models they compared; it is not known to
them whose these were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from flexp.dice import Dice
from flexp.parcel import JSON
from flexp.strategies.base import ClientId

Row = Mapping[ClientId, float]


@dataclass(frozen=True)
class Affinity:
    """How much everybody's model has helped everybody; ``own`` is what a client's own begins at."""

    seed: int
    own: float
    rows: Mapping[ClientId, Row] = field(default_factory=dict[ClientId, Row])

    def chosen(
        self, client: ClientId, known: Sequence[ClientId], *, round: int, count: int, chance: float
    ) -> list[ClientId]:
        """The client's candidates among those known, its own one last: the same at every call.

        Each is drawn for itself, and those that have helped alike come in random order.
        """
        dice = Dice(self.seed)("candidates", client=client, round=round)
        ranked, row = sorted(known), self.row(client)
        left, found = [ranked[n] for n in dice("ties").shuffle(len(ranked))], list[ClientId]()
        while left and len(found) < count:
            pick = dice("pick", n=len(found))
            any_one = left[pick("any").choose(len(left), 1)[0]]
            best = max(left, key=lambda c: row.get(c, 0.0))
            found.append(any_one if pick("explore").uniform() < chance else best)
            left.remove(found[-1])
        return sorted(found, key=lambda c: (c == client, c))

    def row(self, client: ClientId) -> Row:
        """What has helped a client."""
        return {client: self.own, **self.rows.get(client, {})}

    def added(self, client: ClientId, chosen: Sequence[ClientId], told: JSON) -> Affinity:
        """With what a client tells of its candidates, as shares of |their sum|.

        What is not a number for each of them is not counted.
        """
        numbers = [x for x in told if isinstance(x, float)] if isinstance(told, Sequence) else []
        if len(numbers) != len(chosen) or not sum(numbers):
            return self
        row = dict(self.row(client))
        for name, number in zip(chosen, numbers, strict=True):
            row[name] = row.get(name, 0.0) + number / abs(sum(numbers))
        return replace(self, rows={**self.rows, client: row})
