"""Who comes late, leaves, comes back, or only wants to talk."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from network.cluster import CLIENTS, CUTS, Cluster, Program, alone, same
from network.test_faults import ended

from flexp import answers, assets

Recipe = Callable[..., Path]


def join(cluster: Cluster, client: str, mine: Path, *argv: str, log: str = "") -> Program:
    return cluster.join(client, mine / f"{client}.jsonl", "--name", client, *argv, log=log)


@pytest.mark.slow
def test_a_late_joiner_is_there_from_the_next_round_on(
    cluster: Cluster, recipe_of: Recipe, mine: Path, tmp_path: Path
) -> None:
    """The recipe that the run leaves says when it came; in one process it gives the same."""
    changes: dict[str, Any] = {
        "plan__cut": None,
        "plan__cuts": CUTS,
        "train__steps": 60,
        "rounds": 4,
    }
    recipe = recipe_of(out=str(tmp_path / "served"), **changes)
    server = cluster.serve(recipe, "--quorum", "2")
    first = [join(cluster, c, mine) for c in CLIENTS[:2]]
    server.wait_for("round 1 of 4")
    last = join(cluster, CLIENTS[2], mine)
    ended(*first, last, server)
    entry = json.loads((tmp_path / "served" / "mine" / "roster.json").read_text())
    joins = entry["clients"][CLIENTS[2]]["joins"]
    assert 1 <= joins <= 3
    again = recipe_of(
        out=str(tmp_path / "again"), participation={CLIENTS[2]: {"joins": joins}}, **changes
    )
    same(cluster, alone(again, tmp_path / "alone"))


@pytest.mark.slow
def test_who_leaves_is_not_waited_for_and_may_come_back(
    cluster: Cluster, recipe_of: Recipe, mine: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "plan__cut": None,
        "plan__cuts": CUTS,
        "train__steps": 60,
        "rounds": 6,
    }
    recipe = recipe_of(out=str(tmp_path / "served"), **changes)
    server = cluster.serve(recipe, "--clients", ",".join(CLIENTS))
    joined = [join(cluster, c, mine) for c in CLIENTS]
    joined[2].wait_for("round 1 of 6")
    joined[2].kill(signal.SIGINT)
    assert joined[2].wait() == 130
    server.wait_for("carl dee failed: has left")
    back = join(cluster, CLIENTS[2], mine)
    ended(joined[0], joined[1], back, server)
    assert "has left; it may come back" in server.text()
    assert cluster.adapter(CLIENTS[2]).is_dir()


@pytest.mark.slow
def test_after_the_end_newcomers_learn_and_members_learn_more(
    cluster: Cluster, recipe_of: Recipe, mine: Path, tmp_path: Path
) -> None:
    """Nothing of it changes what the run gave: a turn after the end is not merged."""
    changes: dict[str, Any] = {"plan__cut": None, "plan__cuts": CUTS}
    recipe = recipe_of(out=str(tmp_path / "served"), **changes)
    server = cluster.serve(recipe, "--quorum", "2", "--stay", "6")
    first = [join(cluster, c, mine) for c in CLIENTS[:2]]
    ended(*first)
    result = (tmp_path / "served" / "mine" / "result.json").read_bytes()
    once = (cluster.adapter("anna") / "adapter_model.safetensors").read_bytes()
    new = join(cluster, CLIENTS[2], mine)
    ended(new)
    assert cluster.adapter(CLIENTS[2]).is_dir()
    assert "3 turns" in new.text()
    again = join(cluster, "anna", mine, log="anna again")
    ended(again)
    assert (cluster.adapter("anna") / "adapter_model.safetensors").read_bytes() == once
    more = join(cluster, "anna", mine, "--more", "2", log="anna more")
    ended(more)
    assert "5 turns" in more.text()
    assert (cluster.adapter("anna") / "adapter_model.safetensors").read_bytes() != once
    ended(server)
    assert (tmp_path / "served" / "mine" / "result.json").read_bytes() == result


@pytest.mark.slow
def test_a_personal_model_talks_through_the_server(
    cluster: Cluster, recipe_of: Recipe, tiny_lm: Path, mine: Path, tmp_path: Path
) -> None:
    """What it says is what the exported adapter says in the whole model; so after a restart."""
    changes: dict[str, Any] = {
        "model__source": str(tiny_lm),
        "task": {"kind": "causal-lm", "max_length": 8},
        "plan__cut": None,
        "plan__cuts": CUTS,
        "train__steps": 20,
    }
    recipe = recipe_of(out=str(tmp_path / "served"), **changes)
    server = cluster.serve(recipe, "--clients", ",".join(CLIENTS), "--stay", "60")
    ended(*[join(cluster, c, mine) for c in CLIENTS])
    whole = answers.predict(cluster.adapter("ben"), ["lovely day film"], assets.Cache(tmp_path))
    at, folder = f"127.0.0.1:{cluster.port}", str(tmp_path / "devices" / "ben")
    for number in (1, 2):
        via = ("chat", "--via", at, "--folder", folder, "--name", "ben", "--json")
        said = cluster.start(f"chat {number}", *via, "--prompt", "lovely day film")
        assert said.wait() == 0, said.text()
        document = json.loads(said.text()[said.text().index("{") :])
        assert document["predictions"][0]["adapter"] == whole["predictions"][0]["adapter"]
        assert document["sent_bytes"] > 0
        server.kill()
        server = cluster.serve(recipe, "--stay", "60")
    stranger = cluster.start("chat 3", "chat", "--via", at, "--name", "eve", "--prompt", "lovely")
    assert stranger.wait() == 2
    assert "taken part in no run" in stranger.text()
    server.kill()


@pytest.mark.slow
def test_a_label_comes_through_the_server(
    cluster: Cluster, recipe_of: Recipe, mine: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"plan__cut": None, "plan__cuts": CUTS, "train__label_prior": True}
    recipe = recipe_of(out=str(tmp_path / "served"), **changes)
    server = cluster.serve(recipe, "--clients", ",".join(CLIENTS), "--stay", "30")
    ended(*[join(cluster, c, mine) for c in CLIENTS])
    text = "film lovely day"
    whole = answers.predict(cluster.adapter("anna"), [text], assets.Cache(tmp_path))
    at, folder = f"127.0.0.1:{cluster.port}", str(tmp_path / "devices" / "anna")
    via = ("predict", "--via", at, "--folder", folder, "--name", "anna", "--json", text)
    said = cluster.start("predict", *via)
    assert said.wait() == 0, said.text()
    (one,) = json.loads(said.text()[said.text().index("{") :])["predictions"]
    (other,) = whole["predictions"]
    assert one["label"] == other["label"]
    for label, chance in other["probabilities"].items():
        assert abs(one["probabilities"][label] - chance) < 1e-6
    server.kill()
