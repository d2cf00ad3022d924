"""What a plan is to be good at: accuracy, time and memory, with a weight for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from math import isfinite

from flexp.errors import PlanError


@dataclass(frozen=True)
class Aims:
    """Weights, and accuracy measured at some ratios (blocks at the client / all blocks).

    A plan is worth the mean over clients of accuracy x accuracy at the ratio, less memory x the
    fraction of the device's memory, less time x the mean of the client's own step and the round's,
    as fractions of the slowest option. This form of the trade-off is ours; the paper names what it
    weighs and no formula. Without ``measured`` accuracy is flat, so time and memory decide.
    """

    accuracy: float = 1.0
    time: float = 1.0
    memory: float = 0.1
    measured: Mapping[float, float] = field(default_factory=dict[float, float], hash=False)

    def __post_init__(self) -> None:
        for name in ("accuracy", "time", "memory"):
            value = getattr(self, name)
            if not (isfinite(value) and value >= 0):
                raise PlanError(f"plan.weights.{name} is {value}. Give a number of at least 0.")
        for ratio, accuracy in self.measured.items():
            if not (0 <= ratio <= 1 and 0 <= accuracy <= 1):
                raise PlanError(
                    f"plan.accuracy has {ratio}: {accuracy}. Both are fractions: blocks at the "
                    "client of all blocks, and accuracy, from 0 to 1."
                )

    def accuracy_at(self, ratio: float) -> float:
        """The least concave curve over the measured points; as at the nearest one beside them."""
        points = self._curve
        if not points:
            return 0.0
        if ratio <= points[0][0]:
            return points[0][1]
        for (x, y), (right, top) in pairwise(points):
            if ratio <= right:
                return y + (top - y) * (ratio - x) / (right - x)
        return points[-1][1]

    @cached_property
    def _curve(self) -> list[tuple[float, float]]:
        """The upper hull of the points: more blocks help ever less, and noise does not dent it."""
        hull: list[tuple[float, float]] = []
        for x, y in sorted(self.measured.items()):
            while len(hull) > 1:
                (a, b), (c, d) = hull[-2:]
                if (d - b) * (x - a) > (y - b) * (c - a):
                    break
                hull.pop()
            hull.append((x, y))
        return hull
