"""Seconds of things that take turns: A B A B, so that a change of the machine meets them all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

Work = Callable[[], object]


@dataclass
class Samples:
    """Seconds of one thing, round by round: of this process's processors, and on the wall."""

    cpu: list[float] = field(default_factory=list[float])
    wall: list[float] = field(default_factory=list[float])

    @property
    def seconds(self) -> float:
        """The median of processor seconds."""
        return statistics.median(self.cpu)

    @property
    def wall_seconds(self) -> float:
        """The median of wall seconds."""
        return statistics.median(self.wall)

    def over(self, other: Samples) -> float:
        """How many times as long as ``other``: the median of the rounds' ratios."""
        return statistics.median(a / b for a, b in zip(self.cpu, other.cpu, strict=True))

    def wall_over(self, other: Samples) -> float:
        """The same on the wall."""
        return statistics.median(a / b for a, b in zip(self.wall, other.wall, strict=True))

    def spread(self, other: Samples) -> list[float]:
        """The least and the most of the rounds' ratios."""
        ratios = [a / b for a, b in zip(self.cpu, other.cpu, strict=True)]
        return [round(min(ratios), 3), round(max(ratios), 3)]


def in_turns(works: Mapping[str, Work], rounds: int, *, warm: int = 1) -> dict[str, Samples]:
    """Each once in every round, after ``warm`` rounds that do not count."""
    out = {name: Samples() for name in works}
    for n in range(warm + rounds):
        for name, work in works.items():
            cpu, wall = timed(work)
            if n >= warm:
                out[name].cpu.append(cpu)
                out[name].wall.append(wall)
    return out


def timed(work: Work) -> tuple[float, float]:
    """Processor and wall seconds; never 0, which no ratio could be taken of."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    cpu = time.process_time() - cpu
    return max(cpu, 1e-9), max(time.perf_counter() - wall, 1e-9)
