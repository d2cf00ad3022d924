"""A client within a small memory; a real model over the network."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from network.cluster import Cluster
from network.test_runs import alone, same

Recipe = Callable[..., Path]
LIMIT = 3 << 29  # 1.5 GiB of address space
NAMES = ("ann", "bob", "cyd")
WORDS = ("to", "be", "or", "not", "that", "is", "the", "question", "whether", "nobler", "mind")


@pytest.fixture
def speeches(tmp_path: Path) -> Path:
    folder = tmp_path / "speeches"
    folder.mkdir()
    for n, name in enumerate(NAMES):
        stream = random.Random(n)
        rows = [{"text": " ".join(stream.choices(WORDS, k=12))} for _ in range(14)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return folder


def play(cluster: Cluster, recipe: Path, data: Path, *, limit: int = LIMIT) -> None:
    server = cluster.serve(recipe, "--clients", ",".join(NAMES), "--stay", "30")
    joined = [cluster.join(c, data / f"{c}.jsonl", "--name", c, address_space=limit) for c in NAMES]
    for program in joined:
        assert program.wait(500) == 0, program.text()
    at, folder = f"127.0.0.1:{cluster.port}", str(cluster.folder / "devices" / NAMES[0])
    via = ("chat", "--via", at, "--folder", folder, "--name", NAMES[0], "--prompt", "to be or")
    said = cluster.start("chat", *via, "--json", "--tokens", "12", address_space=limit)
    assert said.wait(200) == 0, said.text()
    server.kill()


@pytest.mark.slow
def test_smollm2_over_the_network_within_a_small_memory(
    cluster: Cluster,
    recipe_of: Recipe,
    asset: Callable[[str], Path],
    speeches: Path,
    tmp_path: Path,
) -> None:
    """Three cuts of the real model, 1.5 GiB of addresses each; adapters as in one process."""
    changes: dict[str, Any] = {
        "data": {"path": str(speeches)},
        "task": {"kind": "causal-lm", "max_length": 24},
        "model__source": str(asset("smollm2-135m")),
        "plan__cut": None,
        "plan__cuts": {"ann": [1, 0], "bob": [2, 1], "cyd": [4, 0]},
        "train": {"steps": 3, "batch": 4, "lr": 1e-3},
        "rounds": 2,
    }
    recipe = recipe_of(out=str(tmp_path / "served"), **changes)
    play(cluster, recipe, speeches)
    same(cluster, alone(recipe, tmp_path / "alone"), NAMES)


def test_bert_tiny_over_the_network_within_a_small_memory(
    cluster: Cluster, recipe_of: Recipe, asset: Callable[[str], Path], mine: Path, tmp_path: Path
) -> None:
    """The real BERT-tiny, cut in three ways."""
    names = ("anna", "ben", "carl dee")
    changes: dict[str, Any] = {
        "model__source": str(asset("bert-tiny")),
        "plan__cut": None,
        "plan__cuts": {"anna": [1, 0], "ben": [1, 1], "carl dee": [2, 0]},
    }
    recipe = recipe_of(out=str(tmp_path / "served"), **changes)
    server = cluster.serve(recipe, "--clients", ",".join(names))
    joined = [cluster.join(c, mine / f"{c}.jsonl", "--name", c, address_space=LIMIT) for c in names]
    for program in (*joined, server):
        assert program.wait() == 0, program.text()
    same(cluster, alone(recipe, tmp_path / "alone"), names)
