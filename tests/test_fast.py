"""Mode fast: clients abreast, what waits computed together, and results that repeat."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flexp import commands, recipe_file
from flexp.assets import Cache
from flexp.engine import abreast
from flexp.server.compute import Compute, Job
from flexp.server.line import Line

Recipe = Callable[..., Path]
Adapters = dict[str, dict[str, torch.Tensor]]


@pytest.fixture
def played(
    recipe_of: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Adapters, list[int]]]:
    """Runs a recipe: everybody's adapter, and how many messages each pass had."""
    sizes: list[int] = []
    plain = Compute.together

    def counted(compute: Compute, jobs: list[Job]) -> list[object]:
        sizes.append(len(jobs))
        return plain(compute, jobs)

    monkeypatch.setattr(Compute, "together", counted)

    def play(**changes: object) -> tuple[Adapters, list[int]]:
        sizes.clear()
        path = recipe_of(**changes)
        out = tmp_path / f"runs-{len(list(tmp_path.iterdir()))}"
        recipe = recipe_file.read(path, [f"out={out}"])
        commands.run(recipe, Cache(tmp_path / "cache"), [])
        files = sorted(out.glob("**/adapter_model.safetensors"))
        return {f.parent.name: load_file(f) for f in files}, list(sizes)

    return play


def gap(one: Adapters, other: Adapters) -> float:
    assert one.keys() == other.keys()
    assert len(one) > 1
    return max(float((v - other[c][k]).abs().max()) for c in one for k, v in one[c].items())


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    assert torch.get_num_threads() == request.param, "a run has left its own setting"
    torch.set_num_threads(before)


@pytest.mark.parametrize("strategy", ["flexp", "ditto"])
@pytest.mark.daily("one thread-ditto", "two threads-flexp")
def test_fast_is_exact_within_rounding(
    strategy: str, played: Callable[..., tuple[Adapters, list[int]]], threads: int
) -> None:
    """With two threads in two groups: nothing depends on which of them is quicker."""
    how: dict[str, object] = {"strategy": {"name": strategy}, "model__dtype": "float32"}
    exact, alone = played(mode="exact", **how)
    fast, together = played(mode="fast", **how)
    assert alone == []
    assert max(together) == (len(exact) if threads == 1 else 2)
    assert gap(exact, fast) < 1e-5
    again, _ = played(mode="fast", **how)
    assert gap(fast, again) == 0.0


def test_slots_that_all_wear_are_trained_in_turn(
    played: Callable[..., tuple[Adapters, list[int]]],
) -> None:
    """The order of steps of the one copy counts, so nobody is abreast."""
    how: dict[str, object] = {"strategy": {"name": "splitfed_v2"}, "model__dtype": "float32"}
    exact, _ = played(mode="exact", **how)
    fast, together = played(mode="fast", **how)
    assert together == []
    assert gap(exact, fast) < 1e-6  # steps are fused


def test_more_clients_than_are_abreast_come_in_turns(
    played: Callable[..., tuple[Adapters, list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(abreast, "MOST", 2)
    how: dict[str, object] = {"strategy": {"name": "local"}, "model__dtype": "float32"}
    fast, together = played(mode="fast", **how)
    assert set(together) == {2}
    assert len(fast) == 3


def test_a_client_with_the_whole_model_is_not_waited_for(
    played: Callable[..., tuple[Adapters, list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, groups = Line.begins, list[list[str]]()

    def begins(line: Line, some: list[list[str]]) -> None:
        groups.extend(some)
        plain(line, some)

    monkeypatch.setattr(Line, "begins", begins)
    cuts = {"anna": [4, 0], "ben": [1, 1], "carl dee": [2, 1]}
    how: dict[str, object] = {
        "strategy": {"name": "fedavg"},
        "model__dtype": "float32",
        "plan__cut": None,
        "plan__cuts": cuts,
    }
    exact, _ = played(mode="exact", **how)
    fast, together = played(mode="fast", **how)
    assert set(together) == {2}
    assert groups == [["ben", "carl dee"]] * 3
    # A fused step has other last bits, and AdamW makes much of them where a gradient is nearly 0.
    assert gap(exact, fast) < 1e-4
    every = [(v - fast[c][k]).abs().flatten() for c in exact for k, v in exact[c].items()]
    assert float(torch.cat(every).median()) < 1e-7


def test_a_client_that_fails_holds_up_nobody(
    played: Callable[..., tuple[Adapters, list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its place in lockstep is given up, and the others go on without it."""
    from flexp.client.desk import Desk
    from flexp.errors import FlexpError

    plain, names = Desk.fit, set[str]()

    def fit(desk: Desk, *args: object, **kwargs: object) -> object:
        names.add(threading.current_thread().name)
        if desk.client == "anna":
            raise FlexpError("odd")
        return plain(desk, *args, **kwargs)  # pyright: ignore[reportArgumentType, reportCallIssue]

    monkeypatch.setattr(Desk, "fit", fit)
    fast, together = played(mode="fast", strategy={"name": "fedavg"})
    assert set(together) == {2}
    assert len(fast) == 3
    assert len(names) == 3
