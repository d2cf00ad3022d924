"""What the compute thread takes together, and for whom it waits: with a clock of the test's."""

from __future__ import annotations

import threading
from collections.abc import Generator
from dataclasses import replace
from typing import Any

import pytest
import torch
from fixtures_clock import Clock
from wires import U, Wire, served

from flexp.link.messages import Answer, Backward, StepKey
from flexp.server.line import FILLED, MOST, Line, Request
from flexp.server.worth import Cost, Costs, Habits


def nothing() -> Generator[Any, Any, Answer]:
    yield from ()
    return Answer()


@pytest.fixture(scope="module")
def wire() -> Generator[Wire]:
    trunk, wires = served(U)
    yield wires[0]
    trunk.close()


def forward(wire: Wire, client: str, rows: int, length: int, kind: str | None = "kind") -> Request:
    hidden = torch.empty(rows, length, 1)
    return Request(client, replace(wire.forward(), hidden=hidden), nothing(), kind)


def backward(client: str, mates: set[str]) -> Request:
    key = StepKey("run", 0, 0, 0, 1, "backward")
    return Request(client, Backward(key, torch.empty(0), hidden=True), nothing(), "backward", mates)


def line(clock: Clock) -> Line:
    """Everybody usually comes back a second after the answer to a forward."""
    found = Line(clock)
    for client in "abcd":
        found.habits.usual[client, "forward"] = found.habits.usual[client, "backward"] = 1.0
    return found


def clients(requests: list[Request]) -> str:
    return "".join(r.client for r in requests)


def test_only_one_kind_is_taken_and_of_each_client_its_first_message(
    wire: Wire, clock: Clock
) -> None:
    held = line(clock)
    for client, kind in (("a", "x"), ("b", "y"), ("c", "x"), ("a", "x"), ("b", "x"), ("d", None)):
        held.put(forward(wire, client, 2, 8, kind))
    taken: list[str] = []
    while some := held.take():
        taken.append(clients(some))
    assert taken == ["ac", "b", "ab", "d"]


def test_a_pass_is_not_too_long_and_not_filled_up_too_far(wire: Wire, clock: Clock) -> None:
    held = line(clock)
    held.put(forward(wire, "a", MOST // 8 - 1, 8))
    held.put(forward(wire, "b", 2, 8))
    held.put(forward(wire, "c", 1, 8))
    assert clients(held.take()) == "ac"
    assert clients(held.take()) == "b"
    long, short = 100, int(100 / FILLED) - 25
    held.put(forward(wire, "a", 4, long))
    held.put(forward(wire, "b", 4, short))
    held.put(forward(wire, "c", 4, long))
    assert clients(held.take()) == "ac"
    held.put(forward(wire, "d", MOST, 8))
    assert clients(held.take()) == "b"
    assert clients(held.take()) == "d"  # larger than a pass: alone, but not for ever


def test_forwards_of_those_who_come_back_at_other_times_are_no_pass(
    wire: Wire, clock: Clock
) -> None:
    held = line(clock)
    held.habits.usual["b", "forward"] = 3.0
    for client in "abc":
        held.put(forward(wire, client, 1, 8))
    held.put(forward(wire, "stranger", 1, 8))
    assert clients(held.take()) == "ac"
    assert clients(held.take()) == "b"
    assert clients(held.take()) == "stranger"
    held.begins(["ab"])  # in lockstep everybody comes back together
    held.put(forward(wire, "b", 1, 8))
    held.put(forward(wire, "a", 1, 8))
    held.put(forward(wire, "c", 1, 8))
    assert clients(held.take()) == "c"
    assert clients(held.take()) == "ab"


def test_lockstep_takes_nothing_before_everybody_waits(wire: Wire, clock: Clock) -> None:
    held, taken = Line(clock), list[str]()
    held.begins(["abc"])
    held.put(forward(wire, "b", 1, 8))
    thread = threading.Thread(target=lambda: taken.append(clients(held.take())))
    thread.start()
    held.put(forward(wire, "a", 1, 8))
    thread.join(0.05)
    assert taken == []
    held.ends("c")
    thread.join(10)
    assert taken == ["ab"]


def test_lockstep_serves_all_who_waited_before_it_waits_again(wire: Wire, clock: Clock) -> None:
    held = Line(clock)
    held.begins(["ab"])
    held.put(forward(wire, "b", 1, 8, "y"))
    held.put(forward(wire, "a", 1, 8, "x"))
    assert clients(held.take()) == "a"
    assert clients(held.take()) == "b"  # "a" computes, and is not waited for


def test_who_is_in_no_group_is_served_while_others_are_waited_for(wire: Wire, clock: Clock) -> None:
    held = Line(clock)
    held.begins(["ab"])
    held.put(forward(wire, "a", 1, 8))
    held.put(forward(wire, "whole", 1, 8, None))
    assert clients(held.take()) == "whole"
    held.put(forward(wire, "b", 1, 8))
    assert clients(held.take()) == "ab"


def test_groups_are_served_in_turn(wire: Wire, clock: Clock) -> None:
    """Also if the other one has long been there: what is a pass depends on nothing else."""
    held = Line(clock)
    held.begins(["ab", "cd"])
    for client in "dcba":
        held.put(forward(wire, client, 1, 8))
    assert clients(held.take()) == "ab"
    held.put(forward(wire, "a", 1, 8))
    held.put(forward(wire, "b", 1, 8))
    assert clients(held.take()) == "cd"
    assert clients(held.take()) == "ab"


def test_who_is_expected_soon_is_waited_for_no_longer_than_it_saves(
    wire: Wire, clock: Clock
) -> None:
    held = line(clock)
    waits: list[float | None] = []

    def wait(seconds: float | None = None) -> bool:
        waits.append(seconds)
        clock.now += seconds or 0.0
        return False

    held.changed.wait = wait  # pyright: ignore[reportAttributeAccessIssue]
    held.costs.held["forward"] = Cost(1.0, 100.0, 0.2, 10_000.0, 20.0)  # a guess: a tenth of a pass
    held.habits.has("b", "forward", clock.now - 0.99)
    held.put(forward(wire, "a", 1, 8))
    assert clients(held.take()) == "a"
    assert waits == [pytest.approx(0.02)]
    waits.clear()
    held.habits.answered.clear()
    held.habits.has("b", "forward", clock.now)  # in a second only
    held.put(forward(wire, "a", 1, 8))
    assert clients(held.take()) == "a"
    held.habits.has("b", "forward", clock.now - 9.0)  # overdue
    held.put(forward(wire, "a", 1, 8))
    assert clients(held.take()) == "a"
    assert waits == []


def test_who_was_in_one_pass_is_waited_for_as_long_as_a_pass_takes(clock: Clock) -> None:
    held = line(clock)
    waits: list[float | None] = []

    def wait(seconds: float | None = None) -> bool:
        waits.append(seconds)
        held.put(backward("b", {"a"}))
        return True

    held.changed.wait = wait  # pyright: ignore[reportAttributeAccessIssue]
    held.costs.held["backward"] = Cost(1.0, 100.0, 0.2, 10_000.0, 20.0)
    held.habits.has("b", "forward", clock.now - 0.9)
    held.put(backward("a", {"b"}))
    assert clients(held.take()) == "ab"
    assert waits == [pytest.approx(0.2)]


def test_the_fixed_part_of_a_pass_is_found() -> None:
    costs = Costs()
    assert costs.fixed("forward") == 0.0
    for tokens in (100, 100, 100):
        costs.took("forward", tokens, 0.003 + 1e-4 * tokens)
    assert costs.fixed("forward") == pytest.approx(0.1 * 0.013)  # a guess
    for tokens in (50, 200, 400):
        costs.took("forward", tokens, 0.003 + 1e-4 * tokens)
    assert costs.fixed("forward") == pytest.approx(0.003)
    assert costs.whole("forward") > costs.fixed("forward")


def known(held: Line) -> None:
    """Passes of a fixed part of 3 ms and 0.1 ms per token: 300 tokens are enough."""
    for tokens in (50, 200, 400):
        held.costs.took("forward", tokens, 0.003 + 1e-4 * tokens)


def test_a_pass_is_no_longer_than_saves_time(wire: Wire, clock: Clock) -> None:
    """Nor is anybody waited for who would make it longer."""
    held = line(clock)
    known(held)
    assert held.costs.enough("forward") == pytest.approx(300)
    for client, rows in (("a", 10), ("b", 4), ("c", 4)):
        held.put(forward(wire, client, rows, 20))
    assert clients(held.take()) == "ab"
    assert clients(held.take()) == "c"
    held.put(forward(wire, "a", 16, 20))
    held.habits.has("d", "forward", clock.now - 0.999)  # is expected at once
    held.changed.wait = lambda timeout=None: pytest.fail("waits")  # pyright: ignore[reportAttributeAccessIssue]
    assert clients(held.take()) == "a"


def test_a_group_in_lockstep_is_one_pass_however_long_it_takes(wire: Wire, clock: Clock) -> None:
    held = line(clock)
    known(held)
    held.begins(["abc"])
    for client in "abc":
        held.put(forward(wire, client, 10, 20))
    assert clients(held.take()) == "abc"


def test_a_pass_is_no_longer_than_fits_into_memory(wire: Wire, clock: Clock) -> None:
    held = Line(clock, room=lambda: 250.0)
    held.begins(["abc"])
    for client in "abc":
        held.put(forward(wire, client, 6, 20))
    assert clients(held.take()) == "ab"
    assert clients(held.take()) == "c"


def test_habits_are_learnt_by_what_was_answered() -> None:
    habits = Habits()
    for at in (0.0, 10.0, 20.0):
        habits.asks("a", at)
        habits.has("a", "forward", at + 1)
        habits.asks("a", at + 3)
        habits.has("a", "backward", at + 4)
    assert habits.usual["a", "forward"] == 2.0
    assert habits.usual["a", "backward"] == 6.0
    assert habits.expected(["a"], 29.0, 30.5)
    assert not habits.expected(["a"], 25.0, 26.0)
    habits.asks("a", 30.0)
    habits.has("a", "leave", 31.0)
    assert not habits.expected(["a"], 36.9, 37.1)
