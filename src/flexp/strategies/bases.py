"""Adapters that everybody trains side by side: how they come to differ, and their means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flexp.dice import Dice
from flexp.parcel import Parcel
from flexp.strategies.base import ClientId, Turn
from flexp.tensors import Tensors, mean

BLEND = "blend"  # a fact of a reply: how much of each base the client has worn


@dataclass(frozen=True)
class Bases:
    """The bases; at first there may be one. ``seed`` is for the noise by which they differ."""

    seed: int
    held: tuple[Tensors, ...]

    def offered(self) -> dict[str, Tensors]:
        """They by slot."""
        return {f"base/{k}": base for k, base in enumerate(self.held)}

    def averaged(self, replies: Mapping[ClientId, Parcel], turn: Turn) -> Bases:
        """Each base as the mean over clients, by rows times what they tell of it, if they do.

        One for which nobody counts stays.
        """
        rows, found = turn.weights([*replies]), list[Tensors]()
        for slot, before in self.offered().items():
            told = [share(reply, slot, len(self.held)) for reply in replies.values()]
            each = zip(replies.values(), rows, told, strict=True)
            counted = [(r.adapters[slot], n * a) for r, n, a in each if n * a > 0]
            trained, weights = [t for t, _ in counted], [w for _, w in counted]
            found.append(mean(trained, weights) if counted else before)
        return replace(self, held=tuple(found))

    def dealt(self, count: int, replies: Mapping[ClientId, Parcel], turn: Turn) -> list[Tensors]:
        """One as several: clients are dealt out like cards, and each base is a hand's mean.

        There are no more of them than clients.
        """
        names = [*replies]
        hands = [names[k::count] for k in range(min(count, len(names)))]
        return [self.averaged({c: replies[c] for c in hand}, turn).held[0] for hand in hands]

    def made(self, count: int, dealt: Sequence[Tensors], noise: float) -> Bases:
        """So many bases: those dealt, and the first one with noise for the others.

        ``noise`` is its standard deviation, relative to the root mean square of each tensor.
        """
        dice, rest = Dice(self.seed), range(len(dealt), count)
        noisy = (noised(self.held[0], noise, dice("base", n=k)) for k in rest)
        return replace(self, held=(*dealt, *noisy))


def noised(adapter: Tensors, noise: float, dice: Dice) -> Tensors:
    """An adapter with noise in each tensor, drawn by its name."""
    out: Tensors = {}
    for name, value in adapter.items():
        drawn = torch.randn(value.shape, generator=dice("tensor", name=name).generator())
        size = noise * float(value.square().mean().sqrt())
        out[name] = value + size * drawn.to(value)
    return out


def share(reply: Parcel, slot: str, count: int) -> float:
    """What part of a client's model a base is, as it tells; 1 if it tells nothing sound."""
    told = reply.facts.get(BLEND)
    if not isinstance(told, Sequence) or isinstance(told, str) or len(told) != count:
        return 1.0
    part = told[int(slot.removeprefix("base/"))]
    return float(part) if isinstance(part, float | int) and 0 <= part <= 1 else 1.0


def numbers(vector: Tensor) -> list[float]:
    """A vector as plain numbers."""
    return [float(x) for x in vector]
