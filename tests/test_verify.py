"""What `flexp verify` says of a run's folder, and that a copy of a folder goes on as the folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from network.cluster import CLIENTS, Cluster, alone, same
from network.conftest import cluster, nursery
from network.test_faults import ended

from flexp import assets, commands, recipe_file
from flexp.audit import AuditLog
from flexp.errors import FlexpError

Recipe = Callable[..., Path]
Flexp = Callable[..., tuple[int, str, str]]
__all__ = ["cluster", "nursery"]


def served(cluster: Cluster, recipe_of: Recipe, mine: Path, rounds: int = 4) -> tuple[Path, Path]:
    """A server that is killed in the middle of its run; the recipe, and the server's folder."""
    out = cluster.folder / "served"
    recipe = recipe_of(out=str(out), train__steps=40, rounds=rounds)
    server = cluster.serve(recipe, "--clients", ",".join(CLIENTS))
    for client in CLIENTS:
        cluster.join(client, mine / f"{client}.jsonl")
    server.wait_for(f"flexp: round 2 of {rounds}")
    server.kill()
    return recipe, out


@pytest.mark.faults
def test_a_copy_of_a_servers_folder_goes_on_as_the_folder_itself(
    cluster: Cluster, recipe_of: Recipe, mine: Path, tmp_path: Path
) -> None:
    """Copied while the server was dead, then lost, then put back: a backup is a copy."""
    recipe, out = served(cluster, recipe_of, mine)
    shutil.copytree(out, tmp_path / "backup")
    shutil.rmtree(out)
    shutil.copytree(tmp_path / "backup", out)
    found = commands.verify(out / "mine")
    assert found["problems"] == {}
    assert found["rounds"]
    server = cluster.serve(recipe)
    ended(*cluster.programs[1:4], server)
    same(cluster, alone(recipe, tmp_path / "alone"))
    said = json.loads(cluster.done("verify", "verify", str(out / "mine"), "--json"))
    assert said["rounds"] == [4, 3, 2]
    log = (out / "mine" / "audit.jsonl").read_text("utf-8")
    assert "anna is here: 12 rows for training" in log
    assert said["records"] == log.count("\n")


@pytest.mark.parametrize("hurt", ["checkpoint", "audit"])
def test_what_was_changed_is_named(flexp: Flexp, recipe_of: Recipe, hurt: str) -> None:
    """One bit of either; the command ends with 1."""
    recipe = recipe_file.read(recipe_of(rounds=2))
    commands.run(recipe, assets.Cache(Path(recipe.out) / "none"), [])
    folder = Path(recipe.out) / recipe.name
    log = AuditLog(folder / "audit.jsonl", lambda: 1.0)
    log.append("note", who="anna", text="anna is here")
    log.close()
    newest = folder / "checkpoint" / "000002"
    file = newest / "state.parcel" if hurt == "checkpoint" else folder / "audit.jsonl"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    code, out, _ = flexp("verify", str(folder))
    assert code == 1
    found = commands.verify(folder)
    (where,) = found["problems"]
    assert Path(where) == (newest if hurt == "checkpoint" else file)
    assert found["rounds"] == ([1] if hurt == "checkpoint" else [2, 1])
    assert "".join(where.split()) in "".join(out.split())


def test_a_folder_without_anything_is_not_verified(tmp_path: Path) -> None:
    with pytest.raises(FlexpError, match="neither checkpoints nor an audit log"):
        commands.verify(tmp_path)
