"""Every recipe in recipes/methods: what it says can be run, tried on toys of its kind."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from fixtures_images import KINDS, RESNET, VIT, drawing
from fixtures_models import FILLER, NEGATIVE, POSITIVE

from flexp import assets, commands, recipe_file
from flexp.strategies import build

FOLDER = Path(__file__).parents[1] / "recipes" / "methods"
FILES = [file for file in sorted(FOLDER.glob("*.yaml")) if not file.stem.endswith(".methods")]
WORDS = {"negative": NEGATIVE, "neutral": FILLER, "positive": POSITIVE}
recipes = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of two domains with a label each."""
    stream, rows = random.Random(0), list[dict[str, Any]]()
    for n in range(90):
        label = ("negative", "neutral", "positive")[n % 3]
        said = [stream.choice(FILLER), stream.choice(WORDS[label]), stream.choice(FILLER)]
        rows.append({"text": " ".join(said), "label": label, "domain": "ab"[n % 2], "role": n % 3})
    file = tmp_path_factory.mktemp("texts") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per class."""
    folder, stream = tmp_path_factory.mktemp("pictures"), random.Random(0)
    for n in range(60):
        path = folder / KINDS[n % 3] / f"{n}.pgm"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(drawing(KINDS[n % 3], stream))
    return folder


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A residual network and a transformer of three blocks each, as configs."""
    home = tmp_path_factory.mktemp("drawn")
    for name, config in {"convolutions": RESNET, "vit": VIT}.items():
        (home / name).mkdir()
        (home / name / "config.json").write_text(json.dumps({"drawn": True, **config}))
    return home


@recipes
def test_a_recipe_names_its_method_and_says_how_it_is_run(file: Path) -> None:
    recipe = recipe_file.read(file)
    assert recipe.strategy.name == file.stem.split("-")[0]
    assert recipe.name == file.stem
    assert build(recipe.strategy.name, recipe.strategy.options)
    assert f"flexp run recipes/methods/{file.name}" in file.read_text("utf-8")


@recipes
def test_a_round_of_it_runs_on_toys(
    file: Path, texts: Path, pictures: Path, drawn: Path, tiny_model: Path, tiny_lm: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    asked = recipe_file.read(file)
    toys = {
        "classification": (texts, tiny_model),
        "causal-lm": (texts, tiny_lm),
        "images": (pictures, drawn / ("vit" if asked.model.source == "vit" else "convolutions")),
    }
    data, model = toys[asked.task.kind]
    pictured = asked.task.kind == "images"
    changes: dict[str, Any] = {
        "rounds": 1,
        "out": str(tmp_path),
        "data.path": str(data),
        "data.clients": 3,
        "data.rows": 12,
        "data.split": [0.5, 0.25, 0.25],
        "data.one_class": "allow",
        "data.minimum": 6,
        "model.source": str(model),
        "train.steps": 1,
        "train.epochs": None,
        "train.batch": 4,
        "plan.cut": [1, 1 if asked.plan.labels == "keep" else 0],
        "plan.devices": [],
        "task.labels": [],
    }
    if not pictured:
        changes |= {"adapter.targets": [], "adapter.feedforward": []}
    for option in ("anchors", "newcomers"):  # names of clients, of which three are left
        if named := asked.strategy.options.get(option):
            left = [client for client in named if client in ("client-0", "client-1", "client-2")]
            changes[f"strategy.{option}"] = left
    if any(own.model for own in asked.clients.values()):
        other = shutil.copytree(model, tmp_path / "other")  # the toy, by another name
        changes |= {"clients": {"client-2": {"model": str(other)}}, "plan.cuts": {}}
    if asked.data.biggest is not None:
        changes |= {"data.biggest": 3, "data.client": "role"}
    recipe = recipe_file.read(file, [f"{k}={json.dumps(v)}" for k, v in changes.items()])
    commands.run(recipe, assets.Cache(tmp_path / "no-assets"), [])
    rows = json.loads((tmp_path / recipe.name / "result.json").read_text("utf-8"))["rows"]
    losses = [r["value"] for r in rows if r["metric"] == "loss" and r["client"] != "all"]
    assert len({r["client"] for r in rows}) >= 3
    assert losses
    assert all(math.isfinite(loss) for loss in losses)
