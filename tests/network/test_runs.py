"""Runs over the network end like runs in one process, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from network.cluster import Cluster
from safetensors.torch import load_file

from flexp import assets, commands, recipe_file

Recipe = Callable[..., Path]
CLIENTS = ("anna", "ben", "carl dee")
CUTS = {"anna": [1, 0], "ben": [2, 1], "carl dee": [3, 1]}


def alone(recipe: Path, out: Path) -> Path:
    """The same recipe in one process; the folder of its adapters."""
    found = recipe_file.read(recipe, [f"out={out}"])
    commands.run(found, assets.Cache(recipe.parent / "no-assets"), [])
    return out / found.name / "adapters"


def same(cluster: Cluster, adapters: Path, clients: tuple[str, ...] = CLIENTS) -> None:
    for client in clients:
        one = load_file(adapters / client / "adapter_model.safetensors")
        other = load_file(cluster.adapter(client) / "adapter_model.safetensors")
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert torch.equal(value, other[name]), (client, name)


def play(cluster: Cluster, recipe: Path, mine: Path, *argv: str) -> None:
    """A whole run without a fault, everybody by name on plain text."""
    server = cluster.serve(recipe, "--clients", ",".join(CLIENTS), *argv)
    joined = [cluster.join(c, mine / f"{c}.jsonl", "--name", c) for c in CLIENTS]
    for program in (*joined, server):
        assert program.wait() == 0, program.text()


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"strategy": {"name": "flexp"}}, id="flexp"),
        pytest.param({"strategy": {"name": "fedavg"}, "train__clip_norm": 0.5}, id="fedavg"),
        pytest.param({"strategy": {"name": "splitfed_v2"}}, id="one net for all"),
        pytest.param(
            {
                "plan__labels": "logits",
                "plan__cuts": {c: [n + 1, 0] for n, c in enumerate(CLIENTS)},
            },
            id="logits",
        ),
        pytest.param(
            {"link": {"wire": "fp32", "wires": {"ben": "int8", "anna": "bf16"}}}, id="wires"
        ),
        pytest.param(
            {"strategy": {"name": "fedavg"}, "link": {"window": 2}, "train__clip_norm": 0.5},
            id="two parts at once",
        ),
    ],
)
def test_real_processes_end_with_the_adapters_of_one(
    cluster: Cluster, recipe_of: Recipe, mine: Path, tmp_path: Path, changes: Mapping[str, object]
) -> None:
    """A server and three clients, each with a cut of its own, and dropout."""
    plain = {"plan__cut": None, "plan__cuts": CUTS, "adapter__dropout": 0.1, **changes}
    recipe = recipe_of(out=str(tmp_path / "served"), **plain)
    play(cluster, recipe, mine)
    same(cluster, alone(recipe, tmp_path / "alone"))
