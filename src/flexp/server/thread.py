"""The one thread that computes for everybody, and what waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from flexp.errors import LinkError
from flexp.link.messages import Answer
from flexp.model.meter import Meter
from flexp.server.compute import Compute, Job
from flexp.server.line import Line, Request
from flexp.threads import adopt

T = TypeVar("T")
Work = Generator[Job, Any, Answer]  # what carries out a message; it gets what it has computed
PARKED = 0.005  # seconds between two looks at whether the compute thread may go on


class Ended(LinkError):
    """The server ends, so this one thread of it computes nothing more."""


class ComputeThread:
    """Carries out messages one after another, or some of them together, as the line has them.

    ``flops`` are counted for each client, if it is not None; then nothing is computed together.
    """

    def __init__(self, compute: Compute) -> None:
        self.compute = compute
        self.flops: dict[str, int] | None = None
        self.line = Line(room=lambda: compute.waiting.room)
        self.beside: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.thread = ThreadPoolExecutor(1, "flexp-trunk", adopt)

    def served(self, request: Request) -> Answer:
        """The answer to a request, after those before it; raises what went wrong."""
        self.line.put(request)
        self._later(self._serve)
        return request.done.result()

    def in_turn(self, work: Callable[[], T]) -> T:
        """Does something on the compute thread, after the messages that came before it."""
        return self._later(work).result()

    def between(self, work: Callable[[], T]) -> T:
        """Does something on the compute thread between two messages, also while it is parked."""
        done: Future[T] = Future()
        self.beside.put(partial(_settle, done, work))
        self._later(self._beside)
        return done.result()

    def _later(self, work: Callable[[], T]) -> Future[T]:
        try:
            return self.thread.submit(work)
        except RuntimeError as problem:  # it was closed, while others still ask
            raise Ended("The server is about to end.") from problem

    def park(self, until: threading.Event, tell: Callable[[], None]) -> None:
        """On the compute thread: tells, and waits; messages wait too, what is between them not."""
        tell()
        while not until.is_set():
            with suppress(Empty):
                self.beside.get(timeout=PARKED)()

    def _beside(self) -> None:
        with suppress(Empty):  # it was done while the thread was parked
            self.beside.get_nowait()()

    def close(self) -> None:
        """Stops the compute thread."""
        self.thread.shutdown()

    def _serve(self) -> None:
        """Takes what waits and can be computed together, and answers it."""
        taken = self.line.take()
        begun = [(r, job) for r in taken if (job := self._resumed(r, partial(next, r.work)))]
        if len(begun) > 1 and (found := self._together(begun)) is not None:
            for (request, _), result in zip(begun, found, strict=True):
                self._end(request, result)
            return
        for request, job in begun:
            self._alone(request, job)

    def _together(self, begun: Sequence[tuple[Request, Job]]) -> list[Any] | None:
        """What several ask for, in one pass; None if that failed: then each is tried alone."""
        began = time.perf_counter()
        try:
            found = self.compute.together([job for _, job in begun])
        except Exception:  # noqa: BLE001 whose fault it is shows when each is alone
            return None
        tokens, took = sum(job.tokens for _, job in begun), time.perf_counter() - began
        self.line.costs.took(begun[0][0].phase, tokens, took)
        return found

    def _alone(self, request: Request, job: Job) -> None:
        began = time.perf_counter()
        try:
            with self._counting(request.client):
                result = self.compute.alone(job)
        except BaseException as problem:  # noqa: BLE001 it is for who waits for the answer
            self._end(request, problem)
            return
        if request.kind is not None:
            self.line.costs.took(request.phase, job.tokens, time.perf_counter() - began)
        self._end(request, result)

    def _end(self, request: Request, result: Any) -> None:
        """Lets a message be answered, with what was computed for it or with what went wrong."""
        failed = isinstance(result, BaseException)
        self._resumed(request, partial(request.work.throw if failed else request.work.send, result))

    def _resumed(self, request: Request, go_on: Callable[[], Job]) -> Job | None:
        """Goes on with a message until something is to be computed; None if it is answered."""
        try:
            with self._counting(request.client):
                return go_on()
        except StopIteration as end:
            self.line.served(request)
            request.done.set_result(end.value)
        except BaseException as problem:  # noqa: BLE001 as above
            self.line.served(request)
            request.done.set_exception(problem)
        return None

    @contextmanager
    def _counting(self, client: str) -> Generator[None]:
        if self.flops is None:
            yield
            return
        with Meter() as meter:
            yield
        self.flops[client] = self.flops.get(client, 0) + meter.flops


def _settle(done: Future[T], work: Callable[[], T]) -> None:
    try:
        done.set_result(work())
    except BaseException as problem:  # noqa: BLE001 it is for who waits for the result
        done.set_exception(problem)
