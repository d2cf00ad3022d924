"""Prices for a server's time and memory: how good a fleet's plan can be at most.

At a price for each, every client can choose for itself, and what all choose is worth no less than
the best plan (Lagrange). Prices are whole numbers, so these bounds are exact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple


class Item(NamedTuple):
    """One option of one client; ``score`` is a whole number, so that sums have no order;
    ``place`` is where it stands in its menu."""

    seconds: float
    far: int
    held: int
    score: int
    place: int


@dataclass(frozen=True)
class Shared:
    """What clients share: the server's speed and free bytes, and what a round's seconds cost.

    A second costs ``weight`` units; costs are whole units.
    """

    flops: float
    free: int | None
    weight: float
    unit: int = 1

    def seconds(self, far: int) -> float:
        """How long the server needs for so many operations."""
        return far / self.flops

    def cost(self, seconds: float) -> int:
        """What a round of so many seconds costs."""
        return round(self.weight * seconds) * self.unit

    def fits(self, held: int) -> bool:
        """Whether the server holds so many bytes."""
        return self.free is None or held <= self.free


class Prices(NamedTuple):
    """What a byte and an operation at the server cost."""

    byte: int
    flop: int

    def of(self, item: Item) -> int:
        """What an item is worth at these prices."""
        return item.score - self.byte * item.held - self.flop * item.far

    def pick(self, items: Sequence[Item]) -> Item:
        """What a client would choose."""
        return max(items, key=lambda i: (self.of(i), -i.held, -i.far, -i.place))


@dataclass(frozen=True)
class Rest:
    """The best and least that the clients to come can add, in a round of ``bound`` seconds."""

    prices: Prices
    bound: float
    worth: int
    score: int
    far: int
    held: int

    @classmethod
    def of(cls, lists: Sequence[Sequence[Item]], prices: Prices, bound: float) -> Rest:
        """Of the menus of those clients."""
        counts = Counter(id(items) for items in lists)
        some = [(counts[key], items) for key, items in {id(i): i for i in lists}.items()]
        return cls(
            prices,
            bound,
            sum(n * prices.of(prices.pick(items)) for n, items in some),
            sum(n * max(i.score for i in items) for n, items in some),
            sum(n * min(i.far for i in items) for n, items in some),
            sum(n * min(i.held for i in items) for n, items in some),
        )

    def most(self, far: int, held: int, score: int, shared: Shared) -> int:
        """The most that a plan can score which begins with so much."""
        plain = score + self.score
        plain -= shared.cost(max(self.bound, shared.seconds(far + self.far)))
        return min(plain, self.priced(far, held, score, shared))

    def priced(self, far: int, held: int, score: int, shared: Shared) -> int:
        """The same from prices alone."""
        left = ceil(shared.flops * self.bound) - far
        priced = score + self.worth + self.prices.flop * left - shared.cost(self.bound)
        priced += 0 if shared.free is None else self.prices.byte * (shared.free - held)
        return priced + 2 * shared.unit  # costs are rounded

    def hopeful(self, items: Sequence[Item], beat: int, shared: Shared) -> list[Item]:
        """Of a client's items those that a plan can have which scores more than ``beat``."""
        spare = self.priced(0, 0, 0, shared) - beat
        top = self.prices.of(self.prices.pick(items))
        return [i for i in items if top - self.prices.of(i) < spare]


def find_prices(lists: Sequence[Sequence[Item]], bound: float, shared: Shared) -> Prices:
    """Good prices: of those tried, the ones at which the bound is lowest.

    An operation never costs more than the time of the round that it takes. Some choice of every
    client must fit the server's memory together.
    """
    counts = Counter(id(items) for items in lists)
    some = [(counts[key], items) for key, items in {id(i): i for i in lists}.items()]
    room = ceil(shared.flops * bound)

    def total(prices: Prices, what: Callable[[Item], int]) -> int:
        return sum(n * what(prices.pick(items)) for n, items in some)

    def at(flop: int) -> Prices:
        """With the least price of a byte at which what clients choose fits."""
        if shared.free is None or total(Prices(0, flop), lambda i: i.held) <= shared.free:
            return Prices(0, flop)
        free, most = shared.free, 1
        while total(Prices(most, flop), lambda i: i.held) > free:
            most *= 2
        return Prices(
            _least(lambda b: total(Prices(b, flop), lambda i: i.held) <= free, most // 2, most),
            flop,
        )

    def worth(prices: Prices) -> int:
        held = 0 if shared.free is None else prices.byte * shared.free
        return total(prices, prices.of) + held + prices.flop * room

    low, high = 0, int(shared.weight * shared.unit / shared.flops)
    tried = {flop: worth(at(flop)) for flop in (low, high)}
    for _ in range(24):  # the bound is convex in the price
        first, second = (2 * low + high) // 3, (low + 2 * high) // 3
        tried |= {flop: worth(at(flop)) for flop in (first, second) if flop not in tried}
        low, high = (low, second) if tried[first] <= tried[second] else (first, high)
    return at(min(tried, key=lambda flop: tried[flop]))


def _least(good: Callable[[int], bool], low: int, high: int) -> int:
    """The least good number between two, if all above it are good; else ``high``."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if good(middle) else (middle + 1, high)
    return low


def repaired(
    lists: Sequence[Sequence[Item]], prices: Prices, bound: float, shared: Shared
) -> tuple[int, tuple[int, ...]]:
    """A good plan that the server can hold: what clients choose at a price, then one by one better.

    The least that clients leave at the server must fit it.
    """
    picks = [prices.pick(items) for items in lists]
    if not shared.fits(sum(p.held for p in picks)):
        picks = [min(items, key=lambda i: (i.held, -i.score)) for items in lists]
    far, held = sum(p.far for p in picks), sum(p.held for p in picks)
    score, better = sum(p.score for p in picks), True

    def worth(far: int, score: int) -> int:
        return score - shared.cost(max(bound, shared.seconds(far)))

    while better:
        better = False
        for n, items in enumerate(lists):
            old = picks[n]
            new = max(
                (i for i in items if shared.fits(held - old.held + i.held)),
                key=lambda i, o=old: worth(far - o.far + i.far, score - o.score + i.score),
            )
            gain = worth(far - old.far + new.far, score - old.score + new.score)
            if gain > worth(far, score):
                far, held = far - old.far + new.far, held - old.held + new.held
                score, picks[n], better = score - old.score + new.score, new, True
    return worth(far, score), tuple(p.place for p in picks)
