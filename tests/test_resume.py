"""A run that is killed and resumed ends like one that was never stopped, bit for bit."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flexp import assets, commands, events, recipe_file
from flexp.errors import CheckpointError, FlexpError

Recipe = Callable[..., Path]


class Killed(BaseException):
    """Not an Exception: nothing in the program may survive it."""


def run(recipe: Path, *overrides: str, die_at: int | None = None, resume: bool = False) -> Path:
    """Runs a recipe; ``die_at`` kills it when that many turns have ended."""
    found = recipe_file.read(recipe, overrides)
    ended = 0

    def sink(event: events.Event) -> None:
        nonlocal ended
        ended += isinstance(event, events.TurnEnded)
        if die_at is not None and ended > die_at:
            raise Killed

    cache = assets.Cache(recipe.parent / "no-assets")
    commands.run(found, cache, [sink], resume=resume)
    return Path(found.out) / found.name


def outcome(folder: Path) -> tuple[dict[str, Any], list[Any], list[Any]]:
    """Adapters, scores and events, without times."""
    adapters = {
        str(file.relative_to(folder)): {k: v.numpy().tobytes() for k, v in load_file(file).items()}
        for file in sorted((folder / "adapters").rglob("*.safetensors"))
    }
    rows = json.loads((folder / "result.json").read_text())["rows"]
    told = [
        event
        for event in events.read(folder / "events.jsonl")
        if not isinstance(event, events.TurnEnded | events.RunEnded)
    ]
    return adapters, rows, told


FLOWING = ("strategy.name=flexp", "strategy.server=sequential", "evaluate.every=2")


def test_a_run_without_barrier_is_resumed_and_replayed(recipe_of: Recipe) -> None:
    clean = outcome(run(recipe_of(name="clean"), *FLOWING))
    broken = recipe_of(name="broken")
    with pytest.raises(Killed):
        run(broken, *FLOWING, die_at=7)
    folder = run(broken, *FLOWING, resume=True)
    assert outcome(folder)[:2] == clean[:2]
    again = recipe_file.read(recipe_of(name="again"), FLOWING)
    commands.run(again, assets.Cache(folder / "none"), [], replay=folder)
    assert outcome(Path(again.out) / again.name)[0] == clean[0]
    with pytest.raises(FlexpError, match="has no order to replay"):
        commands.run(again, assets.Cache(folder / "none"), [], replay=folder / "adapters")


@pytest.mark.parametrize("method", ["flexp", "fedavg", "local"])
@pytest.mark.parametrize("die_at", [1, 3, 7])
@pytest.mark.daily("1-flexp", "3-local", "3-fedavg", "7-flexp")
def test_killed_and_resumed_equals_uninterrupted(
    recipe_of: Recipe, method: str, die_at: int
) -> None:
    recipe = recipe_of()
    name = f"strategy.name={method}"
    with pytest.raises(Killed):
        run(recipe, name, die_at=die_at)
    resumed = outcome(run(recipe, name, resume=True))
    shutil.rmtree(recipe.parent / "runs")
    clean = outcome(run(recipe, name))
    assert resumed == clean
    assert len(clean[0]) == 3


@pytest.mark.parametrize(
    "options",
    [
        ("strategy.name=phsfl", "strategy.tune_rounds=2"),
        ("strategy.name=pfsl", "strategy.checkpoint=1"),
    ],
    ids=["phsfl", "pfsl"],
)
def test_a_last_phase_is_resumed_like_any_round(recipe_of: Recipe, options: Any) -> None:
    """Killed in the second round of it, when one client has had that and two have not."""
    recipe = recipe_of()
    with pytest.raises(Killed):
        run(recipe, *options, die_at=7)
    resumed = outcome(run(recipe, *options, resume=True))
    shutil.rmtree(recipe.parent / "runs")
    assert resumed == outcome(run(recipe, *options))


def test_a_damaged_checkpoint_is_passed_over(recipe_of: Recipe) -> None:
    recipe = recipe_of()
    with pytest.raises(Killed):
        run(recipe, die_at=7)
    folder = recipe.parent / "runs" / "mine"
    newest = max((folder / "checkpoint").iterdir())
    state = newest / "state.parcel"
    data = bytearray(state.read_bytes())
    data[-1] ^= 1
    state.write_bytes(bytes(data))
    resumed = outcome(run(recipe, resume=True))
    shutil.rmtree(recipe.parent / "runs")
    assert resumed == outcome(run(recipe))


def test_what_was_not_written_with_a_checkpoint_is_no_part_of_it(recipe_of: Recipe) -> None:
    """Programs that make backups or show folders leave files in them, and of those is no digest."""
    recipe = recipe_of()
    with pytest.raises(Killed):
        run(recipe, die_at=7)
    newest = max((recipe.parent / "runs" / "mine" / "checkpoint").iterdir())
    (newest / "clients" / ".DS_Store").write_bytes(b"a view of a folder")
    shutil.copy(newest / "tenants" / "anna.parcel", newest / "tenants" / "zoe.parcel")
    resumed = outcome(run(recipe, resume=True))
    shutil.rmtree(recipe.parent / "runs")
    assert resumed == outcome(run(recipe))


def test_no_usable_checkpoint_is_an_error_that_names_each(recipe_of: Recipe) -> None:
    recipe = recipe_of()
    with pytest.raises(Killed):
        run(recipe, die_at=4)
    folder = recipe.parent / "runs" / "mine" / "checkpoint"
    for one in folder.iterdir():
        (one / "checkpoint.json").write_text("{")
    with pytest.raises(CheckpointError, match="000001"):
        run(recipe, resume=True)


def test_rounds_are_counted_once(recipe_of: Recipe) -> None:
    recipe = recipe_of()
    with pytest.raises(Killed):
        run(recipe, die_at=4)
    folder = run(recipe, resume=True)
    rounds = [e.round for e in events.read(folder / "events.jsonl") if isinstance(e, events.Merged)]
    assert rounds == [0, 1, 2]


@pytest.mark.slow
def test_a_language_model_killed_from_outside_and_resumed(recipe_of: Recipe, tiny_lm: Path) -> None:
    recipe = recipe_of(task__kind="causal-lm", model__source=str(tiny_lm), rounds=4)
    clean = run(recipe, "name=clean")
    command = [sys.executable, "-m", "flexp.cli", "run", str(recipe), "name=killed"]
    log = clean.parent / "killed" / "events.jsonl"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not (log.is_file() and "TurnEnded" in last(log, 2)):
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (clean.parent / "killed" / "adapters").exists()
    subprocess.run([*command, "--resume"], check=True, stdout=subprocess.DEVNULL)
    assert outcome(clean.parent / "killed")[:2] == outcome(clean)[:2]


def last(log: Path, round: int) -> str:
    """The lines of a round of a log, or of later ones."""
    found = log.read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in found if f'"round": {round - 1}' in line)


@pytest.mark.slow
def test_codes_in_mode_fast_are_those_of_exact_within_rounding_and_are_resumed(
    recipe_of: Recipe,
) -> None:
    recipe = recipe_of(model__quantize="nf4", model__dtype="float32")
    exact = outcome(run(recipe, "name=exact"))[0]
    whole = outcome(run(recipe, "mode=fast", "name=whole"))[0]
    assert whole.keys() == exact.keys()
    for name, tensors in exact.items():
        for key, value in tensors.items():
            mine = torch.frombuffer(bytearray(whole[name][key]), dtype=torch.float32)
            theirs = torch.frombuffer(bytearray(value), dtype=torch.float32)
            assert torch.allclose(mine, theirs, atol=1e-4)
    with pytest.raises(Killed):
        run(recipe, "mode=fast", "name=again", die_at=4)
    assert outcome(run(recipe, "mode=fast", "name=again", resume=True))[0] == whole
