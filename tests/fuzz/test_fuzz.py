"""Every target on its samples, on changed ones and on any bytes; the long run is `make fuzz`."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from fuzz.targets import TARGETS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# The library warns of a number that it will refuse one day, and that is refused here already.
pytestmark = pytest.mark.filterwarnings("ignore:Parsed a serial number")

# So many changed samples that each target takes about two seconds.
CHANGED = {
    "frame": 400,
    "header": 300,
    "loaders": 250,
    "steps": 60,
    "recipes": 60,
    "rows": 250,
    "planner": 60,
    "aggregation": 60,
    "audit": 120,
    "identity": 120,
    "resume": 60,
}
SCRIPTED = ("steps", "planner", "aggregation", "resume")  # any bytes are a case


def test_there_are_eleven() -> None:
    assert len(TARGETS) == len(CHANGED) == 11


@pytest.mark.parametrize("name", TARGETS)
def test_samples_are_as_they_should_be(name: str) -> None:
    target = TARGETS[name]
    seeds = target.seeds()
    assert seeds
    for seed in seeds:
        target.run(seed)


@pytest.mark.parametrize("name", TARGETS)
def test_changed_samples_break_no_promise(name: str) -> None:
    target = TARGETS[name]
    seeds = target.seeds()

    @settings(
        max_examples=CHANGED[name],
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(st.integers(0, len(seeds) - 1), st.integers(0, 1 << 32), st.integers(1, 3))
    def changed(which: int, seed: int, times: int) -> None:
        rng, data = random.Random(seed), seeds[which]
        for _ in range(times):
            data = target.mutator(data, rng)
        target.run(data)

    changed()


@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes_break_no_promise(name: str) -> None:
    run = TARGETS[name].run
    most = CHANGED[name] if name in SCRIPTED else 60

    @settings(max_examples=most, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.binary(max_size=160))
    def anything(data: bytes) -> None:
        run(data)

    anything()


FOUND = sorted(p for p in (Path(__file__).parent / "found").glob("*") if p.suffix != ".md")


@pytest.mark.parametrize("path", FOUND, ids=lambda p: p.name)
def test_what_was_found_before_is_not_found_again(path: Path) -> None:
    """Inputs that broke a promise, kept under their target's name."""
    name = re.match(r"[a-z]+", path.name)
    assert name is not None
    TARGETS[name[0]].run(path.read_bytes())
