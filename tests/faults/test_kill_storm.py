"""kill -9 of anybody at any moment: whatever is committed is what a run without it commits."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import suites
from faults import league
from faults.league import CLIENTS, Digests, League
from network.cluster import Cluster, Nursery

from flexp.engine.host import CHECKPOINTS

KILLS, STEPS = 20, 6
SPACING, TAIL = 2, 4  # rounds between two kills at least, and after the last
ROUNDS = 4 * KILLS  # of the long storm: a quick machine plays more than those between two kills


@dataclass
class Storm:
    """Kills drawn from a seed, each followed by a start of the same command."""

    league: League
    clean: Digests
    seed: int
    kills: int
    compared: int = 0
    killed: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)

    def play(self) -> None:
        """From the first round to a good end of everybody."""
        self.league.begin()
        while len(self.killed) < self.kills:
            self.league.wait_for_round(SPACING * len(self.killed) + 1)
            league.pause(self.dice.uniform(0.0, 0.5))
            self.league.still_on()
            for victim in self.victims():
                self.kill(victim)
            before = self.league.done()
            self.league.wait_for_round(before + 1)
            self.compared += league.same(self.league.committed(), self.clean)
        self.league.ended()
        self.compared += league.same(self.league.committed(), self.clean)

    def victims(self) -> list[str]:
        """One; sometimes a second one, before the first is back at work."""
        left = self.kills - len(self.killed)
        count = min(left, 2 if self.dice.random() < 0.25 else 1)
        return [self.dice.choice(("server", *CLIENTS)) for _ in range(count)]

    def kill(self, victim: str) -> None:
        self.league.programs[victim].kill()
        self.killed.append(victim)
        league.pause(self.dice.uniform(0.0, 0.3))
        self.league.start(victim)


def rounds_for(kills: int) -> int:
    return SPACING * kills + TAIL


@pytest.fixture(scope="module")
def clean_of(
    light: Nursery, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], tuple[Digests, Digests]]:
    """Of a run of so many rounds that nothing happens to: all that it committed, and its end."""
    known: dict[int, tuple[Digests, Digests]] = {}

    def of(rounds: int) -> tuple[Digests, Digests]:
        if rounds not in known:
            folder = tmp_path_factory.mktemp("clean")
            cluster = Cluster(light, folder)
            recipe = league.recipe(folder, rounds=rounds, steps=STEPS)
            played = League(cluster, recipe, env={"LIGHT_KEEP": "1"})
            try:
                played.begin()
                played.ended()
                known[rounds] = played.committed(), played.adapters()
            finally:
                cluster.reap()
        return known[rounds]

    return of


def storm(
    cluster: Cluster,
    clean_of: Callable[[int], tuple[Digests, Digests]],
    seed: int,
    kills: int,
    rounds: int = 0,
) -> Storm:
    rounds = rounds or rounds_for(kills)
    clean, adapters = clean_of(rounds)
    assert len(clean) == rounds * (1 + len(CLIENTS)), "the clean run has not kept everything"
    played = League(cluster, league.recipe(cluster.folder, rounds=rounds, steps=STEPS))
    made = Storm(played, clean, seed, kills)
    made.play()
    assert played.adapters() == adapters
    assert league.leftovers(cluster.folder) == []
    assert all((p / "checkpoint.json").is_file() for p in played.checkpoints.iterdir())
    assert psutil.Process(cluster.nursery.process.pid).children(recursive=True) == []
    return made


@pytest.mark.slow
def test_three_kills_change_nothing(
    cluster: Cluster, clean_of: Callable[[int], tuple[Digests, Digests]]
) -> None:
    """The server and two clients, wherever they are."""
    assert len(storm(cluster, clean_of, seed=5, kills=3).killed) == 3


@pytest.mark.slow
def test_damaged_checkpoints_are_passed_over(
    cluster: Cluster, clean_of: Callable[[int], tuple[Digests, Digests]]
) -> None:
    """All but the oldest that is there: both sides still have what it takes to go on from that."""
    rounds = rounds_for(3)
    clean, adapters = clean_of(rounds)
    played = League(cluster, league.recipe(cluster.folder, rounds=rounds, steps=STEPS))
    played.begin()
    played.wait_for_round(rounds // 2)
    played.programs["server"].kill()
    oldest, *newer = sorted(p.parent for p in played.checkpoints.glob("[0-9]*/checkpoint.json"))
    for path in newer:
        damage(path / "state.parcel")
    played.start("server")
    played.ended()
    assert len(newer) >= CHECKPOINTS - 1
    assert f"resuming after round {int(oldest.name)} of" in played.programs["server"].text()
    league.same(played.committed(), clean)
    assert played.adapters() == adapters


def damage(path: Path) -> None:
    """One bit, somewhere in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(10))
def test_twenty_kills_change_nothing(
    cluster: Cluster,
    clean_of: Callable[[int], tuple[Digests, Digests]],
    seed: int,
    case: suites.Case,
) -> None:
    case.begin(seed=seed)
    made = storm(cluster, clean_of, seed, KILLS, ROUNDS)
    case.count(kills=len(made.killed), digests=made.compared, server=made.killed.count("server"))
