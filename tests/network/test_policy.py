"""For whom a round waits, and for whom not: with a clock that a test winds."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest
from network.cluster import CLIENTS, CUTS, Cluster
from network.test_faults import ended, join

from flexp.engine.base import Assignment
from flexp.engine.guests import Guests, Job, Policy
from flexp.engine.network import NetworkEngine
from flexp.link.control import Order, Outcome
from flexp.link.listen import Call
from flexp.model.cut import Cut, Seat
from flexp.parcel import Parcel

Recipe = Callable[..., Path]


class Round:
    """A wave of three clients that are all there."""

    def __init__(self, policy: Policy, kind: Any = "train") -> None:
        self.now, self.done = 0.0, SimpleQueue[Job]()
        self.guests = Guests(policy, lambda: self.now)
        self.jobs: dict[str, Job] = {}
        for name in "abc":
            call = Call(None, "here", name=name, process=name)
            self.guests.attach(call)
            work = Assignment(name, Seat(Cut(1, 1)), Parcel())
            order = Order(1, kind, work.seat, round=0, wave=0, before=0, turns=0)
            self.jobs[name] = Job(work, {}, order, self.done, self.now)
            self.guests.give(self.jobs[name])
            self.guests.seated(call)
        self.ended = self.guests.ended(list(self.jobs.values()), self.done)

    def rest(self) -> dict[str, str]:
        """Who ends from now on, and with which error."""
        return {job.work.client: job.error for job in self.ended}


LATE = "not done within the deadline of 5 seconds"


def test_after_the_deadline_nobody_is_waited_for() -> None:
    wave = Round(Policy(deadline=5))
    wave.guests.end(wave.jobs["a"])
    assert next(wave.ended).work.client == "a"
    wave.now = 5.1
    assert wave.rest() == {"b": LATE, "c": LATE}
    assert all(wave.jobs[name].away for name in "bc")  # it may be done in the next round
    assert wave.guests["b"].ended == LATE


@pytest.mark.parametrize("enough", [1, 2])
def test_the_deadline_ends_no_round_with_too_few_replies(enough: int) -> None:
    """One has failed, which is no reply; the round goes on until enough others are done."""
    wave = Round(Policy(deadline=5, enough=enough))
    wave.guests.end(wave.jobs["a"], "it broke")
    wave.now = 60
    later = _until_asked(wave, {"b": enough >= 1, "c": enough >= 2})
    assert later == {"a": "it broke", "b": "", "c": LATE if enough == 1 else ""}


def _until_asked(wave: Round, well: dict[str, bool]) -> dict[str, str]:
    """Ends those turns well, one after another, while the round still waits for them."""
    found: dict[str, str] = {next(wave.ended).work.client: "it broke"}
    for name in (n for n, is_well in well.items() if is_well):
        assert not wave.jobs[name].over
        wave.guests._end_the_round(list(wave.jobs.values()))
        assert not wave.jobs[name].over
        wave.guests.end(wave.jobs[name])
        found[name] = next(wave.ended).error
    return found | wave.rest()


def test_only_training_has_a_deadline() -> None:
    wave = Round(Policy(deadline=5, enough=0), "look")
    wave.now = 60
    wave.guests._end_the_round(list(wave.jobs.values()))
    assert not any(job.over for job in wave.jobs.values())


def test_a_round_may_end_without_a_reply() -> None:
    wave = Round(Policy(deadline=5, enough=0))
    wave.now = 6
    assert wave.rest() == dict.fromkeys("abc", LATE)


def test_whom_its_system_ends_has_the_patience_of_a_lost_connection() -> None:
    """And who leaves by itself has none."""
    wave = Round(Policy(patience=60))
    for name in "ab":
        call = wave.guests[name].call
        assert call is not None
        wave.guests.left(call, back=name == "a")
    wave.guests.end(wave.jobs["c"])
    wave.now = 59.0
    assert [next(wave.ended).work.client for _ in "bc"] == ["c", "b"]
    assert not wave.jobs["a"].over
    wave.now = 61.0
    assert wave.rest() == {"a": "away for 61 seconds"}


@pytest.mark.parametrize(
    ("said", "told"), [("", "it ended without a reply"), ("\x1b[2J", "\ufffd[2J")]
)
def test_a_turn_is_not_ended_by_scores(said: str, told: str) -> None:
    """Else it would be neither a reply nor a failure; an error's kind is for people to read."""
    wave = Round(Policy())
    call = wave.guests["a"].call
    assert call is not None
    engine: Any = SimpleNamespace(guests=wave.guests)
    NetworkEngine.outcome(engine, call, Outcome(1, said))
    assert wave.jobs["a"].error == told


@pytest.fixture
def stopped() -> Iterator[list[Any]]:
    held: list[Any] = []
    yield held
    for program in held:
        program.kill(signal.SIGCONT)


@pytest.mark.slow
def test_a_late_result_is_refused_with_the_number_of_its_round(
    cluster: Cluster, recipe_of: Recipe, mine: Path, tmp_path: Path, stopped: list[Any]
) -> None:
    """Its client goes on from what counts, in a later round.

    On a busy machine it may be late before it is stopped, which is the same.
    """
    changes: dict[str, Any] = {"plan__cut": None, "plan__cuts": CUTS, "rounds": 6}
    recipe = recipe_of(out=str(tmp_path / "served"), train__steps=60, **changes)
    policy = ("--deadline", "3", "--enough", "2")
    server = cluster.serve(recipe, "--clients", ",".join(CLIENTS), *policy)
    joined = [join(cluster, client, mine) for client in CLIENTS]
    joined[2].wait_for(r"round \d of 6")
    joined[2].kill(signal.SIGSTOP)
    stopped.append(joined[2])
    server.wait_for("carl dee failed: not done within the deadline of 3 seconds")
    joined[2].kill(signal.SIGCONT)
    joined[2].wait_for(r"This turn of round \d is over at the server: not done within")
    ended(*joined, server)
    assert "round 6 of 6" in joined[2].text() or cluster.adapter("carl dee").is_dir()
