"""Messages that wait for the compute thread, and which of them it takes together."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Collection, Generator, Hashable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from flexp.link.messages import Answer, Forward, Message, Phase
from flexp.server.worth import Costs, Habits

MOST = 1024  # tokens of one pass, with what fills them up; a larger message is alone
FILLED = 1.25  # tokens of one pass over those that are real


@dataclass(eq=False)
class Request:
    """One message, and what carries it out: a generator that yields what is to be computed.

    ``kind`` is what it has in common with messages that can be computed with it; None: it is alone.
    ``mates`` are those who should be differentiated with it, for their forwards were one pass.
    """

    client: str
    message: Message
    work: Generator[Any, Any, Answer]
    kind: Hashable = None
    mates: Collection[str] = ()
    done: Future[Answer] = field(default_factory=Future[Answer])

    @property
    def phase(self) -> Phase:
        """What it is, as "forward"."""
        return self.message.key.phase

    @property
    def size(self) -> tuple[int, int]:
        """Rows and length of what it computes with."""
        if not isinstance(self.message, Forward):
            return 0, 0
        rows, length = self.message.hidden.shape[:2]
        return len(self.message.rows) or int(rows), int(length)


class Line:
    """First come, first served; who can be computed with the first one comes along.

    Of one client the messages keep their order. A pass is no longer than ``MOST`` tokens, nor than
    what fits into memory (``room``), and only as many of them fill up shorter rows as ``FILLED``
    allows. It is no longer, either, than what saves time: all of it are answered when it ends.

    Whoever is expected soon is waited for, but no longer than a pass costs whatever its size: that
    is what coming along saves. Forwards of those only are one pass who usually come back together,
    since its graph is walked back once; who is late for that is computed again, so it is waited for
    as long as that takes.

    Clients in ``lockstep`` are served group by group: the next group's when all of it wait or have
    ended. So what is computed together does not depend on how fast anything was, and while one
    group is served the others compute.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        *,
        room: Callable[[], float] = lambda: math.inf,
    ) -> None:
        self.clock, self.room = clock, room
        self.costs, self.habits = Costs(), Habits()
        self.waiting: list[Request] = []
        self.lockstep: list[set[str]] = []  # the next group first
        self.sure: list[Request] = []  # of the group that is being served, and not taken yet
        self.changed = threading.Condition()

    def put(self, request: Request) -> None:
        """A message to be served."""
        with self.changed:
            self.habits.asks(request.client, self.clock())
            self.waiting.append(request)
            self.changed.notify_all()

    def served(self, request: Request) -> None:
        """A client has its answer."""
        with self.changed:
            self.habits.has(request.client, request.phase, self.clock())

    def begins(self, groups: Iterable[Collection[str]]) -> None:
        """From now on these clients are in lockstep, until each ``ends``."""
        with self.changed:
            self.lockstep += [set(group) for group in groups if group]

    def ends(self, client: str) -> None:
        """Nobody waits for this client any more."""
        with self.changed:
            left = [group - {client} for group in self.lockstep]
            self.lockstep = [group for group in left if group]
            self.changed.notify_all()

    def take(self) -> list[Request]:
        """What is computed next; nothing if all that waited has been taken."""
        with self.changed:
            if not self.waiting:
                return []
            if self.lockstep and (sure := self._agreed()):
                return self._taken(self._chosen(sure))
            chosen = self._chosen(self.waiting)
            began = self.clock()
            while (end := began + self._worth(chosen)) > self.clock() and self._comes(chosen, end):
                self.changed.wait(end - self.clock())
                chosen = self._chosen(self.waiting)
            return self._taken(chosen)

    def _agreed(self) -> list[Request]:
        """The messages of the group that is served, by name; none once all clients have ended.

        Who is in no group is served as soon as nobody of a group is being served.
        """
        if self.sure:
            return self.sure

        def next_ones() -> list[Request] | None:
            groups = set[str]().union(*self.lockstep)
            outside = [w for w in self.waiting if w.client not in groups]
            if outside or not self.lockstep:
                return outside[:1]
            mine = [w for w in self.waiting if w.client in self.lockstep[0]]
            return mine if self.lockstep[0] <= {w.client for w in mine} else None

        self.changed.wait_for(lambda: next_ones() is not None)
        found = next_ones() or []
        if found and self.lockstep and found[0].client in self.lockstep[0]:
            self.lockstep.append(self.lockstep.pop(0))
        self.sure = sorted(found, key=lambda w: w.client)
        return self.sure

    def _worth(self, chosen: list[Request]) -> float:
        """For how many seconds others are waited for."""
        first = chosen[0]
        if first.kind is None:
            return 0.0
        if self._missing(chosen):
            return self.costs.whole(first.phase)
        tokens = sum(math.prod(request.size) for request in chosen)
        return 0.0 if tokens >= self._most(first.phase) else self.costs.fixed(first.phase)

    def _comes(self, chosen: list[Request], end: float) -> bool:
        """Whether somebody is expected by then who is not here."""
        whom = self._missing(chosen) or self.habits.answered.keys()
        here = {request.client for request in self.waiting}
        return self.habits.expected(whom - here, self.clock(), end)

    def _missing(self, chosen: list[Request]) -> set[str]:
        here = {request.client for request in self.waiting}
        return {mate for request in chosen for mate in request.mates} - here

    def _taken(self, chosen: list[Request]) -> list[Request]:
        self.waiting = [w for w in self.waiting if w not in chosen]
        self.sure = [w for w in self.sure if w not in chosen]
        return chosen

    def _chosen(self, line: list[Request]) -> list[Request]:
        """The first one and all who fit with it."""
        first, chosen, seen = line[0], list[Request](), set[str]()
        most = self._most(first.phase)
        rows = longest = real = 0
        for request in line:
            if request.client in seen:
                continue
            seen.add(request.client)
            n, length = request.size
            filled = (rows + n) * max(longest, length)
            fits = filled <= most and filled <= FILLED * (real + n * length)
            if request is first or (fits and self._goes_with(request, first)):
                chosen.append(request)
                rows, longest, real = rows + n, max(longest, length), real + n * length
        return chosen

    def _most(self, phase: Phase) -> float:
        """Tokens of a pass; in lockstep it does not depend on how long anything took."""
        most = min(MOST, self.room())
        return most if self.lockstep else min(most, self.costs.enough(phase))

    def _goes_with(self, request: Request, first: Request) -> bool:
        if first.kind is None or request.kind != first.kind:
            return False
        if self.lockstep or not isinstance(first.message, Forward) or not first.message.keep:
            return True
        return self.habits.alike(first.client, request.client, "forward")
