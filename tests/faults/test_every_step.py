"""A run that dies at any of its steps, on one thread or two, and what is the same then."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import suites
import torch
from network.cluster import CUTS
from test_resume import Killed, outcome, run

from flexp.client.fit import Fit

Recipe = Callable[..., Path]
STEPS = 50
PLAN: dict[str, Any] = {
    "plan__cut": None,
    "plan__cuts": CUTS,
    "adapter__dropout": 0.1,
    "train__steps": 6,
    "rounds": 3,
    "strategy": {"name": "flexp", "moments": "keep"},
}


def dying(patch: pytest.MonkeyPatch, at: int) -> None:
    """After so many steps of all clients together the process is no more."""
    plain, taken = Fit._move, 0

    def move(fit: Fit, norms: Mapping[str, float]) -> None:
        nonlocal taken
        plain(fit, norms)
        taken += 1
        if taken == at:
            raise Killed

    patch.setattr(Fit, "_move", move)


def resumed_after(recipe: Path, step: int) -> Any:
    """What a run leaves that died after that step and was gone on with."""
    shutil.rmtree(recipe.parent / "runs", ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch:
        dying(patch, step)
        with pytest.raises(Killed):
            run(recipe)
    return outcome(run(recipe, resume=True))


@pytest.mark.parametrize("step", [1, 19, 50])
def test_a_run_resumed_after_a_step_is_the_run(recipe_of: Recipe, step: int) -> None:
    recipe = recipe_of(**PLAN)
    clean = outcome(run(recipe))
    assert resumed_after(recipe, step) == clean


@pytest.mark.faults
def test_a_run_resumed_after_any_step_is_the_run(recipe_of: Recipe, case: suites.Case) -> None:
    recipe = recipe_of(**PLAN)
    clean = outcome(run(recipe))
    equal = [step for step in range(1, STEPS + 1) if resumed_after(recipe, step) == clean]
    case.count(steps=STEPS, equal=len(equal))
    assert equal == list(range(1, STEPS + 1))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.faults
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_one_thread_and_two(
    recipe_of: Recipe, case: suites.Case, threads: Callable[[int], None], mode: str
) -> None:
    """The same count of threads gives the same bits; whether two give those of one is recorded.

    The program itself takes one thread in exact mode, whatever it is told.
    """
    recipe = recipe_of(mode=mode, model__dtype="float32", **PLAN)
    found: dict[tuple[int, int], Any] = {}
    for count in (1, 2):
        for again in (0, 1):
            threads(count)
            shutil.rmtree(recipe.parent / "runs", ignore_errors=True)
            found[count, again] = outcome(run(recipe))
    case.count(one_is_two=found[1, 0] == found[2, 0])
    assert found[1, 0] == found[1, 1]
    assert found[2, 0] == found[2, 1]
