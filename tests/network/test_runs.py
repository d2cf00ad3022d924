"""Runs over the network end like runs in one process, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from network.cluster import CLIENTS, CUTS, Cluster, Recipe, alone, same


def play(cluster: Cluster, recipe: Path, mine: Path, *argv: str) -> None:
    """A whole run without a fault, everybody by name on plain text."""
    server = cluster.serve(recipe, "--clients", ",".join(CLIENTS), *argv)
    joined = [cluster.join(c, mine / f"{c}.jsonl") for c in CLIENTS]
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
