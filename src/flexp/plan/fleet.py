"""The best choice for a whole fleet at once: exact, although clients wait for each other.

A round takes as long as its slowest client, and at least as long as the server needs for all of
them; the server's memory holds every client's part. So the best for each alone need not be the best
together. For every time that a round may take, the best of what each client can do within it is
known at once unless the server is the limit; then clients are added one by one, and of what may
still become the best only the frontier is kept (time at the server, bytes there, score).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate as running
from typing import NamedTuple


class Item(NamedTuple):
    """One option of one client; ``score`` is a whole number, so that sums have no order;
    ``place`` is where it stands in its menu."""

    seconds: float
    far: int
    held: int
    score: int
    place: int


class State(NamedTuple):
    """Choices for the first clients: operations and bytes at the server, score, which."""

    far: int
    held: int
    score: int
    chosen: tuple[int, ...]


@dataclass(frozen=True)
class Shared:
    """What clients share: the server's speed and free bytes, and what a round's seconds cost."""

    flops: float
    free: int | None
    cost: Callable[[float], int]

    def seconds(self, far: int) -> float:
        """How long the server needs for so many operations."""
        return far / self.flops


def best(menus: Sequence[Sequence[Item]], shared: Shared) -> tuple[int, ...] | None:
    """The index of each client's option; None if the server cannot hold any choice.

    The largest sum of scores less the round's cost; of equal ones the one that is found first.
    """
    alike = {id(items): _frontier(items, shared.free is not None) for items in menus}
    lists = [alike[id(items)] for items in menus]
    found: tuple[int, tuple[int, ...]] | None = None
    for above, bound in sorted(_bounds(lists, shared), key=lambda b: (-b[0], b[1])):
        if found is not None and above <= found[0]:
            break
        within = [[i for i in items if i.seconds <= bound] for items in lists]
        here = _solve(within, bound, shared, None if found is None else found[0])
        if here is not None:
            found = here
    return None if found is None else found[1]


def _frontier(items: Sequence[Item], holds: bool) -> list[Item]:
    """Without those that another one beats in all respects."""
    kept: list[Item] = []
    plain = items if holds else [i._replace(held=0) for i in items]
    for item in sorted(plain, key=lambda i: (i.far, i.held, i.seconds, -i.score, i.place)):
        if not any(
            k.held <= item.held and k.seconds <= item.seconds and k.score >= item.score
            for k in kept
        ):
            kept.append(item)
    return kept


def _bounds(lists: Sequence[Sequence[Item]], shared: Shared) -> list[tuple[int, float]]:
    """Every time that the slowest client may take, with the most that a choice within it scores."""
    tables: list[tuple[list[float], list[int]]] = []
    for items in lists:
        ordered = sorted(items, key=lambda i: i.seconds)
        tables.append(
            ([i.seconds for i in ordered], list(running((i.score for i in ordered), max)))
        )
    least = max(times[0] for times, _ in tables)
    server = shared.seconds(sum(min(i.far for i in items) for items in lists))
    out: list[tuple[int, float]] = []
    for bound in sorted({t for times, _ in tables for t in times if t >= least}):
        most = sum(tops[bisect_right(times, bound) - 1] for times, tops in tables)
        out.append((most - shared.cost(max(bound, server)), bound))
    return out


def _solve(
    lists: Sequence[Sequence[Item]], bound: float, shared: Shared, beat: int | None
) -> tuple[int, tuple[int, ...]] | None:
    """The best choice of a round of at least ``bound`` seconds, if it scores more than ``beat``."""
    picks = [max(items, key=lambda i: (i.score, -i.far, -i.place)) for items in lists]
    held = sum(p.held for p in picks)
    if shared.seconds(sum(p.far for p in picks)) <= bound and (
        shared.free is None or held <= shared.free
    ):
        score = sum(p.score for p in picks) - shared.cost(bound)
        return (score, tuple(p.place for p in picks)) if beat is None or score > beat else None
    states = [State(0, 0, 0, ())]
    for n, items in enumerate(lists):
        rest = lists[n + 1 :]
        states = _pruned(
            [
                State(s.far + i.far, s.held + i.held, s.score + i.score, (*s.chosen, i.place))
                for s in states
                for i in items
            ],
            _Rest.of(rest, bound),
            shared,
            beat,
        )
    ends = [(s.score - shared.cost(max(bound, shared.seconds(s.far))), s.chosen) for s in states]
    return max(ends, key=lambda end: (end[0], [-i for i in end[1]]), default=None)


@dataclass(frozen=True)
class _Rest:
    """The best and least that the clients to come can add."""

    bound: float
    score: int
    far: int
    held: int

    @classmethod
    def of(cls, lists: Sequence[Sequence[Item]], bound: float) -> _Rest:
        return cls(
            bound,
            sum(max(i.score for i in items) for items in lists),
            sum(min(i.far for i in items) for items in lists),
            sum(min(i.held for i in items) for items in lists),
        )


def _pruned(states: list[State], rest: _Rest, shared: Shared, beat: int | None) -> list[State]:
    """Those that may still win: within the server's memory, and on the frontier."""
    kept: list[State] = []
    holds: list[int] = []  # ascending, with ascending scores: what less work at the server gives
    scores: list[int] = []
    for s in sorted(states, key=lambda s: (s.far, s.held, -s.score, s.chosen)):
        if shared.free is not None and s.held + rest.held > shared.free:
            continue
        least = max(rest.bound, shared.seconds(s.far + rest.far))
        if beat is not None and s.score + rest.score - shared.cost(least) <= beat:
            continue
        at = bisect_right(holds, s.held)
        if at and scores[at - 1] >= s.score:
            continue
        first = bisect_left(holds, s.held)
        last = first
        while last < len(holds) and scores[last] <= s.score:
            last += 1
        holds[first:last], scores[first:last] = [s.held], [s.score]
        kept.append(s)
    return kept
