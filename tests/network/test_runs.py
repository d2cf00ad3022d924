"""Runs over the network end like runs in one process, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from fixtures_images import RESNET
from network.cluster import CLIENTS, CUTS, Cluster, Recipe, alone, same
from network.proxy import ConnectProxy

from flexp import answers, assets, commands, recipe_file


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
            {
                "plan__labels": "loss",
                "plan__cuts": {c: [n + 1, 0] for n, c in enumerate(CLIENTS)},
                "privacy": {"profile": "open"},
            },
            id="far loss",
        ),
        pytest.param(
            {
                "clients": {"ben": {"task": {"labels": ["mixed", "negative", "positive"]}}},
                "strategy": {"name": "flexp"},
            },
            id="labels of its own",
        ),
        pytest.param(
            {"link": {"wire": "fp32", "wires": {"ben": "int8", "anna": "bf16"}}}, id="wires"
        ),
        pytest.param(
            {"strategy": {"name": "fedavg"}, "link": {"window": 2}, "train__clip_norm": 0.5},
            id="two parts at once",
        ),
        pytest.param(
            {"strategy": {"name": "phsfl", "tune_rounds": 2}, "train__steps": 3},
            id="heads at the end",
        ),
        pytest.param(
            {
                "strategy": {"name": "pfsl", "checkpoint": 1},
                "plan__cuts": {**CUTS, "carl dee": [1, 1]},
            },
            id="own backs at the end",
            marks=pytest.mark.slow,
        ),
        pytest.param({"model__quantize": "nf4", "strategy": {"name": "flexp"}}, id="nf4"),
        pytest.param({"link": {"ahead": True}, "train__steps": 3}, id="ahead"),
        pytest.param(
            {"strategy": {"name": "fedavg"}, "link": {"ahead": True, "window": 2}},
            id="ahead, two parts at once",
            marks=pytest.mark.slow,
        ),
    ],
)
@pytest.mark.daily("flexp", "logits", "wires", "two parts at once")
def test_real_processes_end_with_the_adapters_of_one(
    cluster: Cluster, recipe_of: Recipe, mine: Path, tmp_path: Path, changes: Mapping[str, object]
) -> None:
    """A server and three clients, each with a cut of its own, and dropout."""
    plain = {"plan__cut": None, "plan__cuts": CUTS, "adapter__dropout": 0.1, **changes}
    recipe = recipe_of(out=str(tmp_path / "served"), **plain)
    play(cluster, recipe, mine)
    same(cluster, alone(recipe, tmp_path / "alone"))


@pytest.mark.slow
def test_mode_fast_ends_with_the_adapters_of_exact_within_rounding(
    cluster: Cluster, recipe_of: Recipe, mine: Path, tmp_path: Path
) -> None:
    """What the server computes together depends on who waits when."""
    plain = {"plan__cut": None, "plan__cuts": CUTS, "adapter__dropout": 0.1}
    plain |= {"train__optimizer": "sgd", "train__lr": 0.1, "model__dtype": "float32"}
    recipe = recipe_of(out=str(tmp_path / "served"), mode="fast", **plain)
    play(cluster, recipe, mine)
    exact = recipe_of(out=str(tmp_path / "served"), mode="exact", **plain)
    same(cluster, alone(exact, tmp_path / "alone"), within=1e-5)


@pytest.mark.slow
def test_the_recipe_that_a_run_leaves_gives_the_same_in_one_process(
    cluster: Cluster, recipe_of: Recipe, mine: Path, tmp_path: Path
) -> None:
    """Cuts come from what the devices say of themselves, and the recipe says what they said."""
    recipe = recipe_of(out=str(tmp_path / "served"), plan__cut=None, adapter__dropout=0.1)
    server = cluster.serve(recipe, "--clients", ",".join(CLIENTS))
    limits = ("1GB", "200kB", "2GB")
    joined = [
        cluster.join(c, mine / f"{c}.jsonl", "--name", c, "--max-memory", limit)
        for c, limit in zip(CLIENTS, limits, strict=True)
    ]
    assert joined[1].wait() == 2
    assert "200000" in joined[1].text() or "200 kB" in joined[1].text()
    joined[1] = cluster.join(CLIENTS[1], mine / "ben.jsonl", "--name", "ben", log="ben again")
    for program in (joined[0], joined[2], joined[1], server):
        assert program.wait() == 0, program.text()
    same(cluster, alone(tmp_path / "served" / "mine" / "recipe.yaml", tmp_path / "alone"))


@pytest.mark.slow
def test_without_a_barrier_the_recorded_order_gives_the_same_in_one_process(
    cluster: Cluster, recipe_of: Recipe, mine: Path, tmp_path: Path
) -> None:
    """Every batch moves the one trunk as it comes; what came when is in the run's events."""
    strategy = {"name": "flexp", "server": "sequential"}
    recipe = recipe_of(
        out=str(tmp_path / "served"), plan__cut=None, plan__cuts=CUTS, strategy=strategy
    )
    play(cluster, recipe, mine)
    found = recipe_file.read(recipe, [f"out={tmp_path / 'alone'}"])
    cache = assets.Cache(recipe.parent / "no-assets")
    commands.run(found, cache, [], replay=tmp_path / "served" / "mine")
    same(cluster, tmp_path / "alone" / "mine" / "adapters")


def test_a_client_behind_an_http_proxy_gets_through(
    cluster: Cluster, recipe_of: Recipe, mine: Path, tmp_path: Path
) -> None:
    """The environment names the proxy, and only the proxy knows where the server is."""
    recipe = recipe_of(out=str(tmp_path / "served"))
    server = cluster.serve(recipe, "--quorum", "1")
    with ConnectProxy({"localhost:7143": ("127.0.0.1", cluster.port)}) as proxy:
        env = {"http_proxy": f"http://127.0.0.1:{proxy.port}", "no_proxy": ""}
        anna = ("anna", mine / "anna.jsonl", "--name", "anna")
        program = cluster.join(*anna, at="localhost:7143", env=env)
        assert program.wait() == 0, program.text()
        assert proxy.tunnels
    assert server.wait() == 0, server.text()


def test_images_run_over_a_network(
    cluster: Cluster, images_of: Recipe, album: Path, tmp_path: Path
) -> None:
    """Every device has its own folder per class, its own cut, and draws its own blocks."""
    cuts = {"anna": [1, 0], "ben": [1, 1], "carl dee": [2, 1]}
    changes: dict[str, Any] = {"plan": {"cuts": cuts}, "strategy": {"name": "flexp"}}
    recipe = images_of(RESNET, out=str(tmp_path / "served"), **changes)
    server = cluster.serve(recipe, "--clients", ",".join(CLIENTS), "--stay", "30")
    joined = [cluster.join(c, album / c) for c in CLIENTS]
    for program in joined:
        assert program.wait() == 0, program.text()
    adapters = alone(recipe, tmp_path / "alone")
    same(cluster, adapters)
    path = next((album / "ben" / "down").iterdir())
    at, folder = f"127.0.0.1:{cluster.port}", str(tmp_path / "devices" / "anna")
    said = cluster.start(
        "predict",
        *("predict", "--via", at, "--folder", folder, "--name", "anna", "--json", str(path)),
    )
    assert said.wait() == 0, said.text()
    (one,) = json.loads(said.text()[said.text().index("{") :])["predictions"]
    (other,) = answers.predict(adapters / "anna", [str(path)], assets.Cache(tmp_path))[
        "predictions"
    ]
    for label, chance in other["probabilities"].items():
        assert one["probabilities"][label] == pytest.approx(chance, abs=1e-6)
    server.kill()
