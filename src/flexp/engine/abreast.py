"""Turns of several clients abreast in one process, so that the trunk has something to put together.

Every client has a thread, and one thing computes at a time, with all cores: who has the baton. The
trunk takes what waits when nobody computes any more, so what it computes together is the same on
every machine and in every run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

from flexp.engine.base import Arrival
from flexp.link.messages import Answer, Link, Message
from flexp.server.line import Line
from flexp.strategies.base import ClientId

MOST = 32  # clients abreast: what they hold near is in memory at the same time


@dataclass(frozen=True)
class Handing:
    """A link whose client hands the baton on while it waits for an answer."""

    inner: Link
    baton: threading.Lock

    def send(self, message: Message) -> Answer:
        """Delivers one message."""
        self.baton.release()
        try:
            return self.inner.send(message)
        finally:
            self.baton.acquire()

    def close(self) -> None:
        """Closes the link inside."""
        self.inner.close()


@dataclass
class Abreast:
    """Clients under way; ``line`` is where their messages wait for the trunk."""

    line: Line
    baton: threading.Lock = field(default_factory=threading.Lock)

    def wrapped(self, client: ClientId, link: Link) -> Link:
        """A client's link."""
        del client
        return Handing(link, self.baton)

    def run(self, turns: Mapping[ClientId, Callable[[], Arrival]]) -> Iterator[Arrival]:
        """The turns' arrivals, in this order; so many at a time as may be abreast."""
        listed = list(turns.items())
        for at in range(0, len(listed), MOST):
            some = listed[at : at + MOST]
            self.line.begins(*(client for client, _ in some))
            done = [self._begin(client, turn) for client, turn in some]
            for future in done:
                yield future.result()

    def _begin(self, client: ClientId, turn: Callable[[], Arrival]) -> Future[Arrival]:
        done: Future[Arrival] = Future()

        def work() -> None:
            try:
                with self.baton:
                    arrival = turn()
            except BaseException as problem:  # noqa: BLE001 it is for who waits for the arrival
                done.set_exception(problem)
            else:
                done.set_result(arrival)
            finally:
                self.line.ends(client)

        threading.Thread(target=work, name=f"flexp-{client}", daemon=True).start()
        return done
