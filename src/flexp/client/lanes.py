"""Two parts of a batch under way: one computes while the other is on its way or at the server.

Each part has a thread, and only one of them computes at a time: who does has the baton, and gives
it up while it waits for an answer. Parts begin in their order, and one sends its gradients only
when the part before has sent all of its own, so both sides add up what they would add up if one
part came after the other: the same bits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from typing import TypeVar

from torch import Tensor

from flexp.client.session import Session
from flexp.link.messages import Answer, Message, Posting
from flexp.model.personal import Ask

T = TypeVar("T")


class _Ended(Exception):
    """Another part has failed, so this one goes no further."""


class Relay:
    """The baton of one batch, and the first thing that went wrong."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.free = True
        self.problem: BaseException | None = None

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
    """One part's own way to the server; in its model it stands where the session would."""

    def __init__(self, session: Session, relay: Relay, number: int, before: Lane | None) -> None:
        self.session, self.relay, self.number, self.before = session, relay, number, before
        self.kept = self.posted = 0  # forwards that want a backward, and backwards that were sent
        self.holds = self.rested = self.over = False
        self.descends = False  # its loss is there: no forward comes any more

    def run(self, work: Callable[[Lane], T]) -> T:
        """Does the part's work, when the part before has come to its first rest."""
        before, relay = self.before, self.relay
        try:
            self._wait(lambda: before is None or before.rested or before.over)
            return work(self)
        except BaseException as problem:
            relay.stop(problem)
            raise
        finally:
            with relay.changed:
                self.over, relay.free = True, relay.free or self.holds
                relay.changed.notify_all()

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
        return self.over or (self.descends and self.posted == self.kept)

    def _send(self, message: Message) -> Answer:
        link = self.session.link
        if not isinstance(link, Posting):
            return link.send(message)
        reply = link.begin(message)
        reply.future.add_done_callback(self.relay.wake)
        self._rest(reply.future.done)
        return reply.take()

    def _rest(self, until: Callable[[], bool]) -> None:
        with self.relay.changed:
            self.holds, self.rested, self.relay.free = False, True, True
            self.relay.changed.notify_all()
        self._wait(until)

    def _wait(self, until: Callable[[], bool]) -> None:
        relay = self.relay
        with relay.changed:
            relay.changed.wait_for(lambda: relay.problem or (relay.free and until()))
            if relay.problem is not None:
                raise _Ended
            self.holds, relay.free = True, False


def side_by_side(
    session: Session, works: Sequence[Callable[[Lane], T]], crew: ThreadPoolExecutor
) -> Iterator[T]:
    """What the parts' works return, in order; as many at a time as the crew has threads.

    If one fails, all have ended when its error is raised.
    """
    relay, lanes, under_way = Relay(), list[Lane](), list[Future[T]]()
    for n, work in enumerate(works):
        lanes.append(Lane(session, relay, n, lanes[-1] if lanes else None))
        under_way.append(crew.submit(copy_context().run, lanes[-1].run, work))
    try:
        for future in under_way:
            yield future.result()
    except BaseException as problem:  # noqa: BLE001 nobody may go on, whatever it is
        relay.stop(problem)
        wait(under_way)
        assert relay.problem is not None
        raise relay.problem from None
