"""Whoever dies at whatever point, all ends as if nobody had: adapters, moments, what clients keep.

One of them alone:

    python -m pytest tests/faults/test_crash_points.py -m "" -k "memory_settles"
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from network.cluster import CLIENTS, CUTS, Cluster, Program, until
from network.crash import CLIENT, SERVER, Point

Recipe = Callable[..., Path]
ROUNDS = 4
PLAN: Mapping[str, Any] = {
    "plan__cut": None,
    "plan__cuts": CUTS,
    "adapter__dropout": 0.1,
    "train__steps": 4,
    "rounds": ROUNDS,
    "strategy": {"name": "flexp", "moments": "keep"},
}


@dataclass
class Clean:
    """What a run leaves that nothing happened to."""

    left: dict[str, Any] = field(default_factory=dict[str, Any])


@pytest.fixture(scope="module")
def clean() -> Clean:
    return Clean()


def left(cluster: Cluster, out: Path) -> dict[str, Any]:
    """What a run leaves: scores, everything of the server's last checkpoint, and every client's
    adapter and memory."""
    folder = out / "mine"
    kept: dict[str, Any] = {"scores": json.loads((folder / "result.json").read_text())["rows"]}
    last = folder / "checkpoint" / f"{ROUNDS:06d}"
    kept["checkpoint"] = json.loads((last / "checkpoint.json").read_text())["files"]
    for client in CLIENTS:
        device = cluster.folder / "devices" / client
        kept[client] = (device / "adapter" / "adapter_model.safetensors").read_bytes()
        (run,) = (device / "memory").iterdir()
        kept[f"memory of {client}"] = (run / f"{ROUNDS:06d}.parcel").read_bytes()
    return kept


def play(cluster: Cluster, recipe: Path, mine: Path, victim: str, point: Point | None) -> None:
    """A run in which the victim dies once, at the point, and is started again."""

    def serve(crash: Point | None = None) -> Program:
        last = point is CLIENT["it hears of the end"]  # who comes back then finds nobody else
        stay = ("--stay", "20") if last else ()
        return cluster.serve(recipe, "--clients", ",".join(CLIENTS), *stay, crash=crash)

    def join(client: str, crash: Point | None = None) -> Program:
        return cluster.join(client, mine / f"{client}.jsonl", crash=crash)

    server = serve(point if victim == "server" else None)
    joined = {c: join(c, point if victim == c else None) for c in CLIENTS}
    if point is not None:
        dying = server if victim == "server" else joined[victim]
        until(dying.over, f"{victim} to die", 60, dying.text)
        assert dying.code == -9, dying.text()
        if victim == "server":
            server = serve()
        else:
            joined[victim] = join(victim)
    for program in (*joined.values(), server):
        assert program.wait() == 0, program.text() + server.text()


def points() -> list[Any]:
    """All of them."""
    every = [("server", name, point) for name, point in SERVER.items()]
    every += [("ben", name, point) for name, point in CLIENT.items()]
    return [
        pytest.param(victim, point, id=f"{victim}-{name}".replace(" ", "_"))
        for victim, name, point in every
    ]


@pytest.mark.faults
@pytest.mark.parametrize(("victim", "point"), points())
def test_who_dies_at_a_point_is_not_missed(
    whole: Cluster,
    recipe_of: Recipe,
    mine: Path,
    tmp_path: Path,
    clean: Clean,
    victim: str,
    point: Point,
) -> None:
    if not clean.left:
        first = Cluster(whole.nursery, tmp_path / "clean")
        first.folder.mkdir()
        play(first, recipe_of(out=str(tmp_path / "clean" / "out"), **PLAN), mine, "", None)
        clean.left = left(first, tmp_path / "clean" / "out")
    recipe = recipe_of(out=str(tmp_path / "served"), **PLAN)
    play(whole, recipe, mine, victim, point)
    found = left(whole, tmp_path / "served")
    assert {k for k, v in clean.left.items() if found[k] != v} == set()
    assert [str(p) for p in tmp_path.rglob("*.tmp")] == []
