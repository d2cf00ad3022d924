"""Forwards that wait for their backward: few, within a budget of bytes, and not for long.

A graph that has to go is not lost: what the forward was called with stays, and the backward runs it
once more. Everything that it depends on is kept or drawn by counter, so the bits are the same.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from flexp.errors import StepError
from flexp.model.dress import Leaves
from flexp.model.meter import Meter
from flexp.server.rows import Rows

T = TypeVar("T")
MAX_PENDING = 16  # forwards of one client that wait for their backward
SIZES = 4096  # shapes of which the bytes are known


@dataclass
class Shared:
    """The one graph of a joint pass: who has yet to differentiate it. That can be done once."""

    left: set[str]
    done: bool = False


@dataclass(frozen=True)
class Graph:
    """A forward that can be differentiated: its result, and by what.

    ``shared`` if it was computed in one pass with others.
    """

    out: Tensor
    hidden: Tensor
    coefs: list[Tensor]
    leaves: Leaves
    shared: Shared | None = None

    @property
    def spent(self) -> bool:
        """Whether others of its pass have been differentiated without it."""
        return self.shared is not None and self.shared.done


@dataclass(eq=False)
class Pending:
    """A kept forward; ``again`` computes its graph, to the last bit the one that it has now."""

    step: int
    part: int
    again: Callable[[], Graph]
    graph: Graph | None
    bytes: int
    at: float

    def whole(self) -> Graph:
        """Its graph, computed once more if it had to go."""
        return self.again() if self.graph is None or self.graph.spent else self.graph


@dataclass
class Waiting:
    """All clients' forwards that wait; graphs beyond ``budget`` bytes go, the oldest first.

    So do those that are older than ``patience`` seconds when ``sweep`` is called: of a client that
    is gone, or whose way is slow. Without either, all stay. Rows that are kept take what graphs
    leave. Any thread may call any method.
    """

    budget: int | None = None
    patience: float | None = None
    clock: Callable[[], float] = time.monotonic
    held: dict[str, dict[int, Pending]] = field(default_factory=dict[str, dict[int, Pending]])
    sizes: dict[Hashable, float] = field(default_factory=dict[Hashable, float])
    dearest: float = 0.0  # bytes of a graph per token, the most so far
    lock: threading.Lock = field(default_factory=threading.Lock)
    rows: Rows = field(default_factory=Rows)

    def keep(self, client: str, call: int, pending: Pending) -> None:
        """Keeps a forward, and forgets those of the client's earlier steps."""
        with self.lock:
            mine = self.held.setdefault(client, {})
            for old in [c for c, p in mine.items() if p.step < pending.step]:
                del mine[old]
            if len(mine) >= MAX_PENDING:
                raise StepError(f"More than {MAX_PENDING} forwards wait for their backward.")
            mine[call] = pending
            if self.budget is not None:
                self._fit(self.budget)

    @property
    def room(self) -> float:
        """Tokens of a pass whose graphs fit into the budget, as far as that is known."""
        return math.inf if self.budget is None or not self.dearest else self.budget / self.dearest

    def measured(self, shape: Hashable, again: Callable[[], T], tokens: int) -> tuple[T, int]:
        """What it computes and the bytes of that, which are measured at the first of its shape.

        If lengths are none of the shape's, bytes go by tokens as at the first one.
        """
        if self.budget is None:
            return again(), 0
        if shape in self.sizes:
            return again(), round(self.sizes[shape] * tokens)
        with Meter() as meter:
            found = again()
        if len(self.sizes) >= SIZES:
            self.sizes.clear()
        self.sizes[shape] = meter.live / tokens
        self.dearest = max(self.dearest, self.sizes[shape])
        return found, meter.live

    def of(self, client: str, call: int, step: int) -> Pending:
        """The forward of that call; StepError if there is none."""
        with self.lock:
            found = self.held.get(client, {}).get(call)
        if found is None or found.step != step:
            raise StepError(f"There is no forward that waits for the backward of call {call}.")
        return found

    def mates(self, client: str, call: int) -> set[str]:
        """Whose forwards were one pass with that of a call, and are not differentiated yet."""
        with self.lock:
            found = self.held.get(client, {}).get(call)
            shared = None if found is None or found.graph is None else found.graph.shared
            return set() if shared is None or shared.done else shared.left - {client}

    def done(self, client: str, call: int) -> None:
        """Its backward has come."""
        with self.lock:
            del self.held[client][call]

    def begin(self, client: str) -> None:
        """Nothing waits at the beginning of a turn."""
        self.rows.drop(client)
        with self.lock:
            self.held[client] = {}

    def drop(self, client: str) -> None:
        """Nothing waits at the end of one."""
        self.rows.drop(client)
        with self.lock:
            self.held.pop(client, None)

    def sweep(self) -> int:
        """Lets graphs go that are too old; how many."""
        with self.lock:
            if self.patience is None:
                return 0
            end = self.clock() - self.patience
            old = [p for p in self._graphs() if p.at < end]
            for pending in old:
                pending.graph = None
            return len(old)

    def bytes(self) -> int:
        """Bytes of the graphs that are there."""
        with self.lock:
            return sum(p.bytes for p in self._graphs())

    def _fit(self, budget: int) -> None:
        graphs = sorted(self._graphs(), key=lambda p: p.at)
        over = sum(p.bytes for p in graphs) - budget
        self.rows.fit(max(0, -over))
        for pending in graphs:
            if over <= 0:
                return
            over -= pending.bytes
            pending.graph = None

    def _graphs(self) -> list[Pending]:
        return [
            p for mine in self.held.values() for p in mine.values() if p.graph and not p.graph.spent
        ]
