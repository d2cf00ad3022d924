"""Frames on their way: nobody who puts one in waits, and what waits is known."""

from __future__ import annotations

import threading

import pytest
from fixtures_clock import Clock

from flexp.link.frame import CHUNK, Joiner
from flexp.link.outbox import Outbox

SECONDS = 20.0


@pytest.fixture
def box(clock: Clock) -> Outbox:
    return Outbox(clock)


def test_what_goes_out_is_what_was_put_in(box: Outbox) -> None:
    frames = [b"a", bytes(CHUNK), b"b" * (2 * CHUNK + 5)]
    for data in frames:
        box.put(data)
    box.close()
    box.put(b"too late")
    joiner = Joiner()
    whole = [data for piece in box.pieces() if (data := joiner.add(piece)) is not None]
    assert [bytes(data) for data in whole] == frames
    assert box.held == 0


def test_a_piece_counts_until_the_next_one_is_asked_for(box: Outbox) -> None:
    box.put(bytes(2 * CHUNK))
    box.close()
    pieces = box.pieces()
    next(pieces)
    assert box.held == 2 * CHUNK
    next(pieces)
    assert box.held == 2 * CHUNK - CHUNK
    assert len(list(pieces)) == 1
    assert box.held == 0


def test_nothing_is_stuck_while_nothing_waits_or_something_goes(box: Outbox, clock: Clock) -> None:
    clock.now = 100
    assert box.stuck() == 0
    box.put(bytes(3 * CHUNK))
    assert box.stuck() == 0
    pieces = box.pieces()
    next(pieces)
    clock.now = 130
    box.put(b"more waits, and nothing has gone by it")
    assert box.stuck() == 30
    next(pieces)
    assert box.stuck() == 0


def test_who_waits_for_room_goes_on_when_there_is_some_or_it_is_over(box: Outbox) -> None:
    box.put(bytes(100))
    assert box.wait(100)
    found: list[bool] = []
    waiting = threading.Thread(target=lambda: found.append(box.wait(99)))
    waiting.start()
    pieces = box.pieces()
    next(pieces)
    assert not found
    box.put(b"x")
    next(pieces)
    waiting.join(SECONDS)
    assert found == [True]
    waiting = threading.Thread(target=lambda: found.append(box.wait(0)))
    waiting.start()
    box.close()
    waiting.join(SECONDS)
    assert found == [True, False]


def test_a_pause_ends_when_the_stream_does(box: Outbox) -> None:
    assert box.pause(0.001)
    threading.Timer(0.01, box.close).start()
    assert not box.pause(SECONDS)
