"""Turns of several clients abreast in one process, so that the trunk has something to put together.

Every client has a thread, and is in one of two groups: while the trunk serves one, the other
computes. Each thread computes on one core, and as many clients compute at a time as there are cores
for them. What the trunk computes together is the same on every machine and in every run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from flexp.engine.base import Arrival
from flexp.link.messages import Answer, Link, Message
from flexp.server.trunk import Trunk
from flexp.strategies.base import ClientId
from flexp.threads import adopt

MOST = 8  # clients abreast: what they hold near is in memory at the same time


@dataclass(frozen=True)
class Handing:
    """A link whose client lets another one compute while it waits for an answer."""

    inner: Link
    cores: threading.Semaphore

    def send(self, message: Message) -> Answer:
        """Delivers one message."""
        self.cores.release()
        try:
            return self.inner.send(message)
        finally:
            self.cores.acquire()

    def close(self) -> None:
        """Closes the link inside."""
        self.inner.close()


class Abreast:
    """Clients under way at a trunk, on ``threads`` cores; with one, nothing computes beside."""

    def __init__(self, trunk: Trunk, threads: int) -> None:
        self.trunk, self.threads = trunk, threads
        self.cores = threading.Semaphore(max(1, threads - 1))

    def wrapped(self, client: ClientId, link: Link) -> Link:
        """A client's link."""
        del client
        return Handing(link, self.cores)

    def run(
        self, turns: Mapping[ClientId, Callable[[], Arrival]], apart: Collection[ClientId] = ()
    ) -> Iterator[Arrival]:
        """The turns' arrivals, in this order; so many at a time as may be abreast.

        Nobody waits for those who are ``apart``: they have the whole model and ask for nothing.
        """
        listed = list(turns.items())
        with self._on_one_core_each():
            for at in range(0, len(listed), MOST):
                some = listed[at : at + MOST]
                names = [client for client, _ in some if client not in apart]
                self.trunk.line.begins([names] if self.threads == 1 else [names[::2], names[1::2]])
                done = [self._begin(client, turn) for client, turn in some]
                for future in done:
                    yield future.result()

    def _begin(self, client: ClientId, turn: Callable[[], Arrival]) -> Future[Arrival]:
        done: Future[Arrival] = Future()

        def work() -> None:
            adopt()
            try:
                with self.cores:
                    arrival = turn()
            except BaseException as problem:  # noqa: BLE001 it is for who waits for the arrival
                done.set_exception(problem)
            else:
                done.set_result(arrival)
            finally:
                self.trunk.line.ends(client)

        threading.Thread(target=work, name=f"flexp-{client}", daemon=True).start()
        return done

    @contextmanager
    def _on_one_core_each(self) -> Generator[None]:
        """Within this a thread computes alone: two that share their cores wait for each other."""
        self._set(1)
        try:
            yield
        finally:
            self._set(self.threads)

    def _set(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self.trunk.in_turn(lambda: torch.set_num_threads(threads))
