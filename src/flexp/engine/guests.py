"""Clients out on the network: the call that each has now, and the order that it works on."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

from flexp.engine.base import Assignment
from flexp.engine.host import CHECKPOINTS
from flexp.engine.look import Cells
from flexp.link.control import Order, Refused
from flexp.link.listen import Call
from flexp.link.messages import StepKey
from flexp.link.metered import Ledger
from flexp.model.ops import SlotSpec
from flexp.strategies.base import ClientId

TICK = 0.2  # seconds between two looks at who has gone
REPLACED = (
    'Another process has joined as "{name}", and the newest counts: this one stops. Let one '
    "process use an identity."
)


@dataclass(frozen=True)
class Policy:
    """For whom a round does not wait any longer; times in seconds.

    A client may be away for ``patience`` while it has an order. A turn of training that is not over
    after ``deadline`` (None: no deadline) has failed, once ``enough`` others have ended well.
    """

    patience: float = 60.0
    deadline: float | None = None
    enough: int = 1


WAITS_FOR_ALL = Policy()  # who is away has a minute


@dataclass(eq=False)
class Job:
    """An order under way, and what becomes of it."""

    work: Assignment
    specs: Mapping[str, SlotSpec]
    order: Order
    done: SimpleQueue[Job]
    began: float
    ledger: Ledger = field(default_factory=Ledger)
    error: str = ""
    cells: Cells = field(default_factory=dict[str, dict[str, float]])
    over: bool = False
    away: bool = False  # it is over because its client was not there
    taken: threading.Event | None = None  # without a barrier: set when the next order is given


@dataclass(eq=False)
class Guest:
    """A client out on the network: the call that it has now, and the order that it works on."""

    name: ClientId
    call: Call | None = None
    process: str = ""
    ready: bool = False
    rows: int = 0  # it says that it has these for training
    lost: float = 0.0  # since when there is no call
    number: int = 0  # of its newest order
    job: Job | None = None
    left: StepKey | None = None  # the last message of its last turn
    ended: str = "it has begun anew"  # why its newest order is over
    floors: tuple[int, ...] = (0,) * CHECKPOINTS  # turns that counted at those that are kept


class Guests:
    """All of them; every method may be called from any thread.

    ``policy`` says for whom is not waited any longer.
    """

    def __init__(self, policy: Policy, clock: Callable[[], float]) -> None:
        self.policy, self.clock = policy, clock
        self.lock = threading.RLock()
        self.held: dict[ClientId, Guest] = {}

    def __getitem__(self, name: ClientId) -> Guest:
        """What is known of a client; it need not have called yet."""
        with self.lock:
            return self.held.setdefault(name, Guest(name, lost=self.clock()))

    def present(self) -> list[Call]:
        """The calls of those who are here."""
        with self.lock:
            return [guest.call for guest in self.held.values() if guest.call is not None]

    def anybody(self) -> bool:
        """Whether somebody is here that can take an order."""
        with self.lock:
            return any(guest.ready for guest in self.held.values())

    def give(self, job: Job) -> None:
        """Gives a client an order: now, or when it calls."""
        with self.lock:
            guest = self[job.work.client]
            guest.job = job
            if guest.call is not None and guest.ready:
                guest.call.tell(job.order)

    def ended(self, jobs: Sequence[Job], done: SimpleQueue[Job]) -> Iterator[Job]:
        """Jobs as they end; who stays away for too long has failed."""
        left = len(jobs)
        while left:
            try:
                yield done.get(timeout=TICK)
                left -= 1
            except Empty:
                self._give_up(jobs)
                self._end_the_round(jobs)

    def end(self, job: Job, error: str = "") -> None:
        """An order is over, once."""
        with self.lock:
            if job.over:
                return
            job.over, job.error = True, error
            guest = self[job.work.client]
            guest.job, guest.ended = None, error or "it has ended"
            job.done.put(job)

    def resumes(self, call: Call, *, knows_server: bool) -> bool:
        """Whether a call is of the process that a client had, which then just goes on with it."""
        with self.lock:
            guest = self[call.name]
            if not knows_server or guest.process != call.process:
                return False
            old, guest.call, guest.ready = guest.call, call, True
        if old is not None and old is not call:
            old.close()
        return True

    def attach(self, call: Call) -> bool:
        """Takes a call as a client's present one: the newest counts. Whether another one goes."""
        with self.lock:
            guest = self[call.name]
            old, guest.call = guest.call, call
            again, guest.process = guest.process == call.process, call.process
            guest.ready = False
        if old is None or old is call:
            return False
        if again:
            old.close()
        else:
            replaced(old)
        return not again

    def go_on(self, call: Call, order: int) -> None:
        """Tells who just goes on its order, if it has not heard of it."""
        with self.lock:
            job = self[call.name].job
            if job is not None and job.order.number > order:
                call.tell(job.order)

    def seated(self, call: Call) -> None:
        """A call that can take orders from now on, and the one that waits for it."""
        with self.lock:
            guest = self[call.name]
            guest.ready = guest.call is call
            if guest.ready and guest.job is not None:
                call.tell(guest.job.order)

    def gone(self, call: Call) -> bool:
        """A call has ended; whether it was a client's present one."""
        with self.lock:
            guest = self.held.get(call.name)
            if guest is None or guest.call is not call:
                return False
            guest.call, guest.ready, guest.lost = None, False, self.clock()
            return True

    def left(self, call: Call, *, back: bool = False) -> None:
        """A client goes by itself: an order that it has is waited for only if it will be back."""
        with self.lock:
            guest = self[call.name]
            if guest.call is call:
                guest.call, guest.ready = None, False
                guest.lost = self.clock() if back else -math.inf

    def _give_up(self, jobs: Sequence[Job]) -> None:
        with self.lock:
            for job in jobs:
                guest = self[job.work.client]
                if job.over or (guest.call is not None and guest.ready):
                    continue
                away = self.clock() - guest.lost
                if away > self.policy.patience:
                    told = "has left" if math.isinf(away) else f"away for {away:.0f} seconds"
                    job.away = True
                    self.end(job, told)

    def _end_the_round(self, jobs: Sequence[Job]) -> None:
        """After the deadline, with enough replies, whoever is still at work has failed."""
        deadline, enough = self.policy.deadline, self.policy.enough
        with self.lock:
            late = [job for job in jobs if not job.over and job.order.kind == "train"]
            if deadline is None or sum(job.over and not job.error for job in jobs) < enough:
                return
            for job in late:
                if self.clock() - job.began > deadline:
                    job.away = True
                    self.end(job, f"not done within the deadline of {deadline:g} seconds")


def replaced(call: Call) -> None:
    """Ends the call of a process that another one with its name has taken the place of."""
    call.tell(Refused(REPLACED.format(name=call.name)))
    call.close()


def turn_name(run: str, order: int) -> str:
    """The run's name in the keys of one order, so that no message counts for another one."""
    return f"{run}.{order}"
