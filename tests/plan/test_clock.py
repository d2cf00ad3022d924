"""Simulated time by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flexp.plan.clock import Load, Work, finish_times, run_seconds, seconds_of, step_load
from flexp.plan.costs import BlockCosts
from flexp.plan.devices import Device
from flexp.plan.work import BlockWork

# 1 GFLOP/s; 1 MB/s up, 2 MB/s down; 0.1 s there and back.
PHONE = Device("phone", 10**9, 1e9, 1e6, 2e6, 0.1)
LAPTOP = replace(PHONE, name="laptop", flops=4e9, latency=0.0)
SERVER = 1e10
# 2 s near, 0.5 s far, 3 s up, 1 s down, 4 x 0.1 s of messages.
LOAD = Load(int(2e9), int(5e9), 3_000_000, 2_000_000, 4)
TURN = Work(0, 0, "a", LOAD)


def heavy(far: float) -> Load:
    return replace(LOAD, far_flops=int(far))


def test_a_turn_by_hand() -> None:
    assert seconds_of(LOAD, PHONE, SERVER) == pytest.approx(2 + 0.5 + 3 + 1 + 0.4)
    alone = Load(int(2e9), 0, 0, 0, 3)
    assert seconds_of(alone, Device("box", 10**9, 1e9), None) == 2


def test_a_wave_takes_as_long_as_its_slowest_client_and_waves_follow() -> None:
    devices = {"a": PHONE, "b": LAPTOP}
    fast = replace(TURN, client="b")  # 0.5 + 0.5 + 3 + 1
    assert run_seconds([TURN, fast], devices, SERVER) == pytest.approx(6.9)
    assert run_seconds([TURN, replace(fast, wave=1)], devices, SERVER) == pytest.approx(6.9 + 5)
    assert run_seconds([TURN, replace(fast, round=1)], devices, SERVER) == pytest.approx(6.9 + 5)


def test_the_server_answers_the_messages_of_a_wave_one_by_one() -> None:
    """Each turn has 4 messages, and spends 6.4 / 4 = 1.6 s elsewhere before each."""
    both = {"a": PHONE, "b": PHONE}
    busy = [replace(TURN, client=c, load=heavy(5e10)) for c in "ab"]
    # 1.25 s a message: b waits for a's first one, and then comes while a is elsewhere.
    assert run_seconds(busy, both, SERVER) == pytest.approx(6.4 + 5 + 1.25)
    # a's take 3.75 s and never wait: 1.6-5.35, 6.95-10.7, 12.3-16.05, 17.65-21.4; b's follow them.
    many = [replace(TURN, client="a", load=heavy(1.5e11)), busy[1]]
    assert run_seconds(many, both, SERVER) == pytest.approx(21.4 + 1.25)
    # Nine keep the server busy from the first message on: 36 times 1.25 s.
    crowd = [replace(TURN, client=str(n), load=heavy(5e10)) for n in range(9)]
    assert run_seconds(crowd, dict.fromkeys("012345678", PHONE), SERVER) == pytest.approx(1.6 + 45)


@pytest.mark.parametrize(("window", "parts", "waits"), [(1, 1, 2), (1, 4, 8), (2, 2, 2), (2, 4, 4)])
def test_a_forward_that_goes_ahead_waits_with_the_backward_before_it(
    window: int, parts: int, waits: int
) -> None:
    work = BlockWork(0, (1,) * 4, (1,) * 4, 0, 0, 0)
    sizes = BlockCosts(4, 2, 0, (0,) * 4, 0, (0,) * 4, 0, 8, 2, 4, window=window)
    here = step_load(sizes, work, (1, 1), accumulate=parts)
    late = step_load(replace(sizes, ahead=True), work, (1, 1), accumulate=parts)
    assert here.messages == waits
    assert late == replace(here, messages=waits // 2)  # and nothing else is less
    assert step_load(replace(sizes, ahead=True), work, (2, 2), accumulate=parts).messages == 0


@pytest.mark.parametrize("lost", ["flops", "uplink", "downlink"])
def test_what_is_not_declared_is_not_guessed(lost: str) -> None:
    device = replace(PHONE, **{lost: None})
    assert seconds_of(LOAD, device, SERVER) is None
    assert seconds_of(LOAD, PHONE, None) is None
    assert run_seconds([TURN], {"a": device}, SERVER) is None
    assert run_seconds([], {}, None) == 0


def test_a_straggler_computes_and_sends_slowly() -> None:
    assert seconds_of(LOAD, PHONE.slowed(10), SERVER) == pytest.approx(20 + 0.5 + 30 + 10 + 4)
    assert Device("box", 10**9).slowed(3) == Device("box", 10**9)


def test_a_client_that_failed_counts_with_what_it_took_and_an_absent_one_not() -> None:
    devices = {"a": PHONE, "b": LAPTOP}
    failed = Work(0, 0, "b", Load(int(4e9), 0, 0, 0, 0))
    assert run_seconds([TURN, failed], devices, SERVER) == pytest.approx(6.9)
    assert run_seconds([failed], devices, SERVER) == pytest.approx(1)


def test_without_a_barrier_nobody_waits_but_for_the_server() -> None:
    devices = {"a": PHONE, "b": LAPTOP}
    fast = replace(TURN, client="b")
    turns = [TURN, fast, replace(TURN, round=1), replace(fast, round=1)]
    assert finish_times(turns, devices, SERVER) == pytest.approx([6.9, 5, 13.8, 10])
    assert run_seconds(turns, devices, SERVER) == pytest.approx(13.8)
    # The server takes 5 s for each: b's ends first, at 9.5 s; a's (11.4 s) is served behind it.
    busy = [replace(t, load=heavy(5e10)) for t in turns[:2]]
    assert finish_times(busy, devices, SERVER) == pytest.approx([11.4, 9.5])
    slow = [replace(t, load=heavy(2e11)) for t in turns[:2]]  # 20 s each: 24.5 and 26.4 alone
    assert finish_times(slow, devices, SERVER) == pytest.approx([40, 24.5])
    assert finish_times(turns, {"a": Device("a", 10**9), "b": LAPTOP}, SERVER) is None
    assert finish_times([], {}, None) == []
