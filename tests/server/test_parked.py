"""The compute thread while it waits for what comes next for a client that has just left."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest

from flexp.server.trunk import Trunk

SECONDS = 20.0


@pytest.fixture
def trunk() -> Iterator[Trunk]:
    none = cast("Any", None)
    made = Trunk(none, none, none)
    yield made
    made.close()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as made:
        yield made


def test_two_clients_that_leave_at_once_wait_for_each_other(
    trunk: Trunk, threads: ThreadPoolExecutor
) -> None:
    """The second one's last message waits, and what is to be done for the first one is done."""
    told = [threading.Event() for _ in range(2)]
    taken = [threading.Event() for _ in range(2)]

    def leave(n: int) -> None:
        trunk.in_turn(lambda: trunk.park(taken[n], told[n].set))

    leaving = [threads.submit(leave, 0)]
    assert told[0].wait(SECONDS)
    leaving.append(threads.submit(leave, 1))
    for n in range(2):
        assert told[n].wait(SECONDS)
        assert threads.submit(trunk.between, lambda: "admitted").result(SECONDS) == "admitted"
        assert n or not told[1].is_set()
        taken[n].set()
        leaving[n].result(SECONDS)


def test_what_was_asked_before_the_thread_was_parked_is_done(
    trunk: Trunk, threads: ThreadPoolExecutor
) -> None:
    """A last message that stands before it in the line would else wait for it, and it for that."""
    begun, go, taken = threading.Event(), threading.Event(), threading.Event()

    def leave() -> None:
        begun.set()
        assert go.wait(SECONDS)
        trunk.park(taken, lambda: None)

    leaving = threads.submit(trunk.in_turn, leave)
    assert begun.wait(SECONDS)
    asked = threads.submit(trunk.between, lambda: "undone")
    go.set()
    try:
        assert asked.result(SECONDS) == "undone"
    finally:
        taken.set()
    leaving.result(SECONDS)


def test_an_error_beside_is_for_who_asked(trunk: Trunk, threads: ThreadPoolExecutor) -> None:
    told, taken = threading.Event(), threading.Event()
    leaving = threads.submit(trunk.in_turn, lambda: trunk.park(taken, told.set))
    assert told.wait(SECONDS)
    asked = threads.submit(trunk.between, lambda: {}["no seat"])
    with pytest.raises(KeyError, match="no seat"):
        asked.result(SECONDS)
    taken.set()
    leaving.result(SECONDS)
