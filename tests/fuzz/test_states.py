"""The step table against the rules of its history, by every way of losing and repeating."""

from __future__ import annotations

from fuzz.draws import scratch
from fuzz.of_states import World
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule


class Steps(RuleBasedStateMachine):
    """A client, a server and what is between, one thing after another."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(scratch() / "machine")

    @rule(heard=st.booleans(), ahead=st.integers(0, 2))
    def send(self, heard: bool, ahead: int) -> None:
        self.world.send(heard=heard, ahead=ahead)

    @rule(which=st.integers(0, 40), other=st.booleans())
    def repeat(self, which: int, other: bool) -> None:
        self.world.again(which, other=other)

    @rule()
    def fail(self) -> None:
        self.world.failing()

    @rule()
    def leave(self) -> None:
        self.world.leave()

    @rule()
    def save(self) -> None:
        self.world.save()

    @rule(while_settling=st.booleans())
    def kill_client(self, while_settling: bool) -> None:
        self.world.kill_client(while_settling=while_settling)

    @rule(damaged=st.booleans())
    def kill_server(self, damaged: bool) -> None:
        self.world.kill_server(damaged=damaged)

    @invariant()
    def nothing_is_done_that_was_not_asked_for(self) -> None:
        assert self.world.applied == self.world.mine

    def teardown(self) -> None:
        self.world.leave()
        assert self.world.disk.facts.get("log", []) == [list(turn) for turn in self.world.log]


Steps.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestSteps = Steps.TestCase
