"""Long suites leave what they found in ``benchmarks/results/suite-NAME.json``.

`pytest --suite NAME` writes it: commit, date, load, versions, and for each case its seed, its
counts, how it ended, and the one command that repeats it. A case says them by the fixture ``case``.
"""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGUN = pytest.StashKey[dict[str, Any]]()
LIBRARIES = ("flexp-sfl", "torch", "grpcio", "numpy", "pytest")


@dataclass
class Case:
    """One case of a suite: what it was begun with, and what it counted."""

    name: str
    options: str = ""
    seed: int | None = None
    counts: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def command(self) -> str:
        """How to play it again, alone."""
        return f"OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q {self.options}'{self.name}'"

    def begin(self, seed: int, **options: Any) -> None:
        """Says what the case depends on; if it fails, this is what is read first."""
        self.seed = seed
        self.options = "".join(f"--{name} {value} " for name, value in options.items())
        print(f"seed {seed}; again: {self.command}", flush=True)

    def count(self, **counts: Any) -> None:
        """Adds numbers to the result."""
        self.counts |= counts

    def row(self, outcome: str, seconds: float) -> dict[str, Any]:
        """The case as it stands in the result."""
        head = {"case": self.name, "outcome": outcome, "seconds": round(seconds, 1)}
        return {**head, "seed": self.seed, "again": self.command, **self.counts}


def write(name: str, rows: Iterable[Mapping[str, Any]], begun: Mapping[str, Any]) -> Path:
    """Writes the result of a suite that began with these ``facts``."""
    cases = list(rows)
    totals = {kind: sum(row["outcome"] == kind for row in cases) for kind in ("passed", "failed")}
    document = {"suite": name, **begun, "load_after": load(), **totals, "cases": cases}
    path = RESULTS / f"suite-{name}.json"
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return path


def facts() -> dict[str, Any]:
    """What a result depends on, beside its seeds."""
    found = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {
        "commit": _git("rev-parse", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no", "src", "tests")),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "load": load(),
        "processors": os.cpu_count(),
        "versions": {**found, "python": platform.python_version()},
    }


def load() -> list[float]:
    """Processes that want to run, on average over 1, 5 and 15 minutes."""
    return [round(n, 2) for n in os.getloadavg()]


def _git(*words: str) -> str:
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # an unpacked archive
        return ""
    return done.stdout.strip()


# ---- for pytest, which loads this module as a plugin


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--suite", help="write what came of it to benchmarks/results/suite-NAME.json")
    parser.addoption("--for", default="60s", help="how long a soak lasts, as 90s, 20m or 2h")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--suite"):
        config.stash[BEGUN] = facts()


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    """What a test says of itself for the result of its suite."""
    made = Case(request.node.nodeid)
    request.node.user_properties.append(("case", vars(made)))  # filled in as the test goes on
    return made


@pytest.fixture
def duration(request: pytest.FixtureRequest) -> float:
    """For how many seconds a soak is to last."""
    asked = str(request.config.getoption("--for"))
    return float(asked[:-1]) * {"s": 1, "m": 60, "h": 3600}[asked[-1]]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    name = config.getoption("--suite")
    if not name:
        return
    rows: list[dict[str, Any]] = []
    for kind in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(kind, ()):
            told = [Case(**held) for key, held in report.user_properties if key == "case"]
            made = told[0] if told else Case(report.nodeid)
            rows.append(made.row("failed" if kind == "error" else kind, report.duration))
    terminalreporter.write_line(f"written: {write(name, rows, config.stash[BEGUN])}")
