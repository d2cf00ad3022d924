"""Simulated time by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flexp.plan.clock import Work, run_seconds, turn_seconds
from flexp.plan.devices import Device

# 1 GFLOP/s; 1 MB/s up, 2 MB/s down; 0.1 s there and back.
PHONE = Device("phone", 1, 1e9, 1e6, 2e6, 0.1)
LAPTOP = replace(PHONE, name="laptop", flops=4e9, latency=0.0)
SERVER = 1e10
# 2 s near, 0.5 s far, 3 s up, 1 s down, 4 x 0.1 s of messages.
TURN = Work(0, 0, "a", int(2e9), int(5e9), 3_000_000, 2_000_000, 4)


def test_a_turn_by_hand() -> None:
    assert turn_seconds(TURN, PHONE, SERVER) == pytest.approx(2 + 0.5 + 3 + 1 + 0.4)
    alone = Work(0, 0, "a", int(2e9), 0, 0, 0, 3)
    assert turn_seconds(alone, Device("box", 1, 1e9), None) == 2


def test_a_wave_takes_as_long_as_its_slowest_client_and_waves_follow() -> None:
    devices = {"a": PHONE, "b": LAPTOP}
    fast = replace(TURN, client="b")  # 0.5 + 0.5 + 3 + 1
    assert run_seconds([TURN, fast], devices, SERVER) == pytest.approx(6.9)
    assert run_seconds([TURN, replace(fast, wave=1)], devices, SERVER) == pytest.approx(6.9 + 5)
    assert run_seconds([TURN, replace(fast, round=1)], devices, SERVER) == pytest.approx(6.9 + 5)


def test_the_server_works_for_all_of_a_wave() -> None:
    busy = [replace(TURN, client=c, far_flops=int(5e10)) for c in "ab"]
    assert run_seconds(busy, {"a": PHONE, "b": PHONE}, SERVER) == pytest.approx(2 + 5 + 3 + 1 + 0.4)
    many = [replace(TURN, client="a", far_flops=int(1.5e11)), busy[1]]
    assert run_seconds(many, {"a": PHONE, "b": PHONE}, SERVER) == pytest.approx(21.4)
    crowd = [replace(TURN, client=str(n), far_flops=int(5e10)) for n in range(9)]
    assert run_seconds(crowd, dict.fromkeys("012345678", PHONE), SERVER) == pytest.approx(45)


@pytest.mark.parametrize("lost", ["flops", "uplink", "downlink"])
def test_what_is_not_declared_is_not_guessed(lost: str) -> None:
    device = replace(PHONE, **{lost: None})
    assert turn_seconds(TURN, device, SERVER) is None
    assert turn_seconds(TURN, PHONE, None) is None
    assert run_seconds([TURN], {"a": device}, SERVER) is None
    assert run_seconds([], {}, None) == 0
