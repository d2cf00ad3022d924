"""Parts of batches under way: one computes while the others are on their way or at the server.

Each part has a thread, and only one of them computes at a time: who does has the baton, and gives
it up while it waits for an answer. Parts begin in their order, and one sends its gradients only
when the part before has sent all of its own, so both sides add up what they would add up if one
part came after the other: the same bits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from flexp.client.session import Session
from flexp.link.messages import Answer, Message, Posting
from flexp.model.far import Ask
from flexp.threads import adopt


class _Ended(Exception):
    """Another part has failed, so this one goes no further."""


class Relay:
    """The baton, and the first thing that went wrong."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.free = True
        self.problem: BaseException | None = None

    def take(self, until: Callable[[], bool]) -> None:
        """Waits for the baton and something else, and takes the baton."""
        with self.changed:
            self.changed.wait_for(lambda: self.problem or (self.free and until()))
            if self.problem is not None:
                raise _Ended
            self.free = False

    def give(self) -> None:
        """Hands the baton on."""
        with self.changed:
            self.free = True
            self.changed.notify_all()

    def wake(self, _: object = None) -> None:
        """Lets everybody who waits look again."""
        with self.changed:
            self.changed.notify_all()

    def stop(self, problem: BaseException) -> None:
        """No part goes on; the first problem counts."""
        with self.changed:
            self.problem = self.problem or problem
            self.changed.notify_all()


class Lane:
    """One part's own way to the server; in its model it stands where the session would.

    ``begins`` says whether it may begin, and ``goes_on`` whether it may take an answer.
    """

    def __init__(
        self,
        session: Session,
        relay: Relay,
        number: int,
        *,
        before: Lane | None,
        begins: Callable[[], bool],
        goes_on: Callable[[], bool],
    ) -> None:
        self.session, self.relay, self.number, self.before = session, relay, number, before
        self.begins, self.goes_on = begins, goes_on
        self.kept = self.posted = 0  # forwards that want a backward, and backwards that were sent
        self.holds = self.rested = self.over = False
        self.value: Tensor | None = None  # its loss, if that is there: no forward comes any more

    def run(self, work: Callable[[Lane], Tensor]) -> Tensor:
        """Does the part's work, when it may begin."""
        try:
            self._wait(self.begins)
            return work(self)
        except BaseException as problem:
            self.relay.stop(problem)
            raise
        finally:
            self.over = True
            if self.holds:
                self.relay.give()
            else:
                self.relay.wake()

    def forward(
        self, ask: Ask, hidden: Tensor, coefs: Sequence[Tensor], *, keep: bool
    ) -> tuple[int, Tensor]:
        """One far forward; another part computes until its answer is here."""
        self.kept += keep
        return self.session.forward(
            ask, hidden, coefs, keep=keep, part=self.number, send=self._send
        )

    def backward(
        self, call: int, grad: Tensor, *, hidden: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """The far backward, after all those of the part before have been sent."""
        before = self.before
        if before is not None and not before.through():
            self._rest(before.through)
        self.posted += 1
        return self.session.backward(call, grad, hidden=hidden, send=self._send)

    def through(self) -> bool:
        """Whether all its gradients are sent."""
        return self.over or (self.value is not None and self.posted == self.kept)

    @property
    def on(self) -> bool:
        """Whether it has sent something and waits, or has done so before."""
        return self.rested or self.over

    def _send(self, message: Message) -> Answer:
        link = self.session.link
        if not isinstance(link, Posting):
            return link.send(message)
        reply = link.begin(message)
        reply.future.add_done_callback(self.relay.wake)
        self._rest(lambda: reply.future.done() and self.goes_on())
        return reply.take()

    def _rest(self, until: Callable[[], bool]) -> None:
        self.holds, self.rested = False, True
        self.relay.give()
        self._wait(until)

    def _wait(self, until: Callable[[], bool]) -> None:
        self.relay.take(until)
        self.holds = True


@dataclass
class UnderWay:
    """The parts of a batch; ``settled``: its step is done, and the next batch may go on."""

    lanes: list[Lane] = field(default_factory=list[Lane])
    futures: list[Future[Tensor]] = field(default_factory=list[Future[Tensor]])
    settled: bool = False

    def through(self) -> bool:
        """Whether all gradients are sent; the losses are there then."""
        return self.lanes[-1].through()

    def values(self) -> list[Tensor]:
        """The losses that are there, in the order of the parts."""
        return [lane.value for lane in self.lanes if lane.value is not None]

    def results(self) -> Iterator[Tensor]:
        """The losses, each when its part is over; raises what went wrong in it."""
        return (future.result() for future in self.futures)


class Crew:
    """The threads of one ``fit``; they are made when parts ask for them.

    ``session.window`` parts compute, and as many again wait for gradients if there are threads for
    them. If anything fails, all have ended when the first error is raised.
    """

    def __init__(self, session: Session, threads: int) -> None:
        self.session, self.relay = session, Relay()
        self.pool = ThreadPoolExecutor(threads, "flexp-part", adopt)

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, kind: Any, problem: BaseException | None, trace: Any) -> None:
        if problem is not None:
            self.relay.stop(problem)
        self.pool.shutdown()
        if problem is not None and self.relay.problem not in (None, problem):
            raise self.relay.problem from None

    def begin(
        self, works: Sequence[Callable[[Lane], Tensor]], before: UnderWay | None = None
    ) -> UnderWay:
        """Lets the parts of a batch begin.

        No answer is taken before as many as the window lets in have sent something, and before the
        step of the batch ``before`` is done.
        """
        now, window = UnderWay(), self.session.window

        def goes_on() -> bool:
            return (before is None or before.settled) and all(x.on for x in now.lanes[:window])

        for n in range(len(works)):
            last = now.lanes[-1] if n else None
            full = now.lanes[n - window] if n >= window else None
            begins = _after(last, full)
            lane = Lane(self.session, self.relay, n, before=last, begins=begins, goes_on=goes_on)
            now.lanes.append(lane)
        for lane, work in zip(now.lanes, works, strict=True):
            now.futures.append(self.pool.submit(copy_context().run, lane.run, work))
        return now

    @contextmanager
    def baton(self, until: Callable[[], bool] = lambda: True) -> Generator[None]:
        """Within this no part computes."""
        self.relay.take(until)
        try:
            yield
        finally:
            self.relay.give()


def _after(last: Lane | None, full: Lane | None) -> Callable[[], bool]:
    """When a part may begin: the one before rests, and one of the window has sent its gradients."""

    def begins() -> bool:
        return (last is None or last.on) and (full is None or full.through())

    return begins
