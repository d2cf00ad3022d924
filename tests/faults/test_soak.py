"""Clients come and go for a long time, and the server holds no more than in the beginning."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pytest
import suites
from faults import league
from faults.league import CUTS, League
from network.cluster import Cluster

MIB = 1 << 20
SLOPE = 1.0  # MiB per 1,000 steps, at most
BUDGET = 64.0  # MiB that this server may take beside what it begins with
STEADY = ("anna", "ben")  # nothing happens to them, so that their memory is measured all along
RESTLESS = ("carl", "dora", "emil", "fay", "gus", "hal")
LATE = ("ida", "jon", "kim", "leo")
COMING = 0.25  # of the time: until then newcomers come
FIRST = 0.4  # of all samples, in which libraries make their caches and nothing is fitted
ENOUGH = 5_000  # steps: a line through fewer says nothing of a slope


@dataclass
class Soak:
    """What is done to a league for a time, drawn from a seed, and what is measured meanwhile."""

    league: League
    gauge: Path
    seconds: float
    seed: int
    late: list[str] = field(default_factory=lambda: list(LATE))
    done: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("kill", "leave", "new"), 0))
    clients: list[tuple[int, dict[str, int]]] = field(default_factory=list)

    def play(self) -> None:
        """Begins, lets clients come and go, and ends the server as its owner would."""
        dice = random.Random(self.seed)
        self.league.begin("--patience", "2")
        self.league.wait_for_round(1)
        began = time.monotonic()
        while (passed := time.monotonic() - began) < self.seconds:
            self.rest(dice.uniform(1.0, 4.0))
            assert not self.league.programs["server"].over()
            if self.late and passed > self.seconds * COMING * (1 - len(self.late) / len(LATE)):
                self.league.start(self.late.pop(0))
                self.done["new"] += 1
            else:
                self.trouble(dice)
        server = self.league.programs["server"]
        server.kill(signal.SIGINT)
        assert server.wait() == 130, server.text()[-4000:]

    def trouble(self, dice: random.Random) -> None:
        """One of them is killed, or leaves; it is back at once, or after a while."""
        name = dice.choice(RESTLESS)
        program = self.league.programs[name]
        assert not program.over(), program.text()[-4000:]
        if dice.random() < 0.5:
            program.kill()
            self.done["kill"] += 1
        else:
            program.kill(signal.SIGINT)
            assert program.wait() == 130, program.text()[-4000:]
            self.done["leave"] += 1
            self.rest(dice.uniform(0.0, 4.0))
        self.league.start(name)

    def rest(self, seconds: float) -> None:
        """Measures the steady ones every second for so long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            held = {n: psutil.Process(self.league.programs[n].pid) for n in STEADY}
            rows = self.samples()
            if rows:
                self.clients.append(
                    (rows[-1]["steps"], {n: p.memory_info().rss for n, p in held.items()})
                )
            league.pause(min(1.0, seconds))

    def samples(self) -> list[dict[str, int]]:
        """What the server has told of itself so far."""
        if not self.gauge.is_file():
            return []
        return [json.loads(line) for line in self.gauge.read_text("utf-8").splitlines()[:-1]]


def slope(steps: Sequence[int], rss: Sequence[int]) -> float:
    """MiB per 1,000 steps of the straight line that fits best."""
    return float(np.polyfit(np.array(steps) / 1000, np.array(rss) / MIB, 1)[0])


def settled(rows: Sequence[dict[str, int]]) -> Sequence[dict[str, int]]:
    """The samples after the beginning."""
    return rows[int(len(rows) * FIRST) :]


@pytest.mark.soak
def test_who_comes_and_goes_leaves_nothing_behind(
    cluster: Cluster, case: suites.Case, duration: float
) -> None:
    case.begin(seed=1, **{"for": f"{duration:.0f}s"})
    gauge, names = cluster.folder / "gauge.jsonl", (*STEADY, *RESTLESS)
    every = (*names, *LATE)
    cuts = {name: [*list(CUTS.values())[n % 4]] for n, name in enumerate(every)}
    plan = {"cuts": cuts, "server": {"memory": "1GB"}}
    recipe = league.recipe(cluster.folder, rounds=50_000, steps=20, plan=plan)
    made = League(cluster, recipe, clients=names, env={"LIGHT_GAUGE": str(gauge)})
    soak = Soak(made, gauge, duration, seed=1)
    soak.play()
    count(case, soak)
    rows = soak.samples()
    late = settled(rows)
    half = len(late) // 2
    if case.counts["fitted"] >= ENOUGH:
        assert case.counts["server_slope"] <= SLOPE
        assert max(case.counts["client_slopes"].values()) <= SLOPE
    assert case.counts["server_peak"] <= case.counts["server_first"] + 1.2 * BUDGET
    for what in ("guests", "tables", "pending"):
        assert max(row[what] for row in rows) <= len(every), what
    for what in ("threads", "files"):
        before, after = (max(row[what] for row in part) for part in (late[:half], late[half:]))
        assert after <= before + 4, (what, before, after)
    for client in names:
        assert len(list(made.memory(client).glob("*/*"))) <= 8, client


def count(case: suites.Case, soak: Soak) -> None:
    """What was measured, for the result."""
    rows = soak.samples()
    late = settled(rows)
    steady = soak.clients[int(len(soak.clients) * FIRST) :]
    case.count(
        seconds_asked=soak.seconds,
        steps=rows[-1]["steps"],
        fitted=rows[-1]["steps"] - late[0]["steps"],
        churn=soak.done,
        budget=BUDGET,
        server_first=round(rows[0]["rss"] / MIB, 1),
        server_peak=round(max(row["rss"] for row in rows) / MIB, 1),
        server_slope=round(slope([r["steps"] for r in late], [r["rss"] for r in late]), 3),
        client_slopes={
            n: round(slope([s for s, _ in steady], [held[n] for _, held in steady]), 3)
            for n in STEADY
        },
        last=rows[-1],
    )
