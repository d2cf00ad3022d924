"""The best choice for a whole fleet at once: exact, although clients wait for each other.

A round takes as long as its slowest client, and at least as long as the server needs for all of
them; the server's memory holds every client's part. So the best for each alone need not be the best
together. For every time that a round may take, the best of what each client can do within it is
known at once unless the server is the limit; then clients are added one by one, and of what may
still become the best only the frontier is kept (time at the server, bytes there, score), within
what the others can add at most.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate as running
from typing import NamedTuple

from flexp.plan.prices import Item, Rest, Shared, find_prices, repaired


class State(NamedTuple):
    """Choices for the first clients: operations and bytes at the server, score, which."""

    far: int
    held: int
    score: int
    chosen: tuple[int, ...]


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
        quick = {id(items): [i for i in items if i.seconds <= bound] for items in lists}
        within = [quick[id(items)] for items in lists]
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
    if not (
        shared.seconds(sum(p.far for p in picks)) <= bound
        and shared.fits(sum(p.held for p in picks))
    ):
        return _limited(lists, bound, shared, beat)
    score = sum(p.score for p in picks) - shared.cost(bound)
    return (score, tuple(p.place for p in picks)) if beat is None or score > beat else None


def _limited(
    lists: Sequence[Sequence[Item]], bound: float, shared: Shared, beat: int | None
) -> tuple[int, tuple[int, ...]] | None:
    """The same where the server is the limit."""
    if not shared.fits(sum(min(i.held for i in items) for items in lists)):
        return None
    prices = find_prices(lists, bound, shared)
    whole = Rest.of(lists, prices, bound)
    if beat is not None and whole.most(0, 0, 0, shared) <= beat:
        return None
    near = repaired(lists, prices, bound, shared)
    found = near if beat is None or near[0] > beat else None
    beat = near[0] if found is not None or beat is None else beat
    some = {id(items): whole.hopeful(items, beat, shared) for items in lists}
    lists = [some[id(items)] for items in lists]
    if not all(lists):
        return found
    states = [State(0, 0, 0, ())]
    for n, items in enumerate(lists):
        grown = [
            State(s.far + i.far, s.held + i.held, s.score + i.score, (*s.chosen, i.place))
            for s in states
            for i in items
        ]
        states = _pruned(grown, Rest.of(lists[n + 1 :], prices, bound), shared, beat)
    for s in states:
        worth = s.score - shared.cost(max(bound, shared.seconds(s.far)))
        if found is None or worth > found[0]:
            found = worth, s.chosen
    return found


def _pruned(states: list[State], rest: Rest, shared: Shared, beat: int | None) -> list[State]:
    """Those that may still win: within the server's memory, and on the frontier."""
    kept: list[State] = []
    holds: list[int] = []  # ascending, with ascending scores: the best of less work at the server
    scores: list[int] = []
    for s in sorted(states, key=lambda s: (s.far, s.held, -s.score, s.chosen)):
        if not shared.fits(s.held + rest.held):
            continue
        if beat is not None and rest.most(s.far, s.held, s.score, shared) <= beat:
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
