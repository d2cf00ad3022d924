"""A disk that is full: who cannot write says so and ends, nothing is lost, and it goes on later."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from network.cluster import CLIENTS, CUTS, Cluster, alone, same
from network.test_faults import ended

Recipe = Callable[..., Path]
Disk = Callable[[str], None]
pytestmark = pytest.mark.faults


@pytest.fixture
def small(tmp_path: Path) -> Iterator[tuple[Path, Disk]]:
    """A folder on a file system of its own, and what sets how much it holds."""
    folder = tmp_path / "small"
    folder.mkdir()

    def size(text: str, how: str = "remount,") -> None:
        asked = ["mount", "-t", "tmpfs", "-o", f"{how}size={text}", "tmpfs", str(folder)]
        found = subprocess.run(asked, check=False, capture_output=True, text=True)
        if found.returncode:
            pytest.skip(f"no file system can be made here: {found.stderr.strip()}")

    if os.geteuid():
        pytest.skip("only root makes file systems")
    size("64M", how="")
    yield folder, size
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("room", ["12k", "48k", "80k", "120k"])
def test_a_server_whose_disk_is_full_goes_on_when_there_is_room(
    whole: Cluster,
    recipe_of: Recipe,
    mine: Path,
    tmp_path: Path,
    small: tuple[Path, Disk],
    room: str,
) -> None:
    folder, size = small
    recipe = recipe_of(out=str(folder / "out"), plan__cut=None, plan__cuts=CUTS, rounds=4)
    size(room)
    server = whole.serve(recipe, "--clients", ",".join(CLIENTS))
    joined = [whole.join(c, mine / f"{c}.jsonl") for c in CLIENTS]
    assert server.wait() == 2, server.text()
    assert "No space left on device" in server.text()
    assert "Make room" in server.text() or "free space" in server.text()
    assert "Traceback" not in server.text()
    size("64M")
    server = whole.serve(recipe, "--clients", ",".join(CLIENTS))
    ended(*joined, server)
    assert list(folder.rglob("*.tmp")) == []
    same(whole, alone(recipe, tmp_path / "alone"))


@pytest.mark.parametrize("room", ["40k", "200k", "320k"])
def test_a_client_whose_disk_is_full_goes_on_when_there_is_room(
    whole: Cluster,
    recipe_of: Recipe,
    mine: Path,
    tmp_path: Path,
    small: tuple[Path, Disk],
    room: str,
) -> None:
    """Its turns fail by themselves; the others are not held up, nor is anything of theirs lost."""
    folder, size = small
    changes = {"plan__cut": None, "plan__cuts": CUTS, "rounds": 4}
    recipe = recipe_of(out=str(tmp_path / "served"), **changes)
    server = whole.serve(recipe, "--clients", ",".join(CLIENTS))
    size(room)
    joined = [whole.join(c, mine / f"{c}.jsonl") for c in CLIENTS[:2]]
    mine_is = ("--folder", str(folder / "carl dee"))
    carl = whole.join(CLIENTS[2], mine / f"{CLIENTS[2]}.jsonl", *mine_is)
    assert carl.wait() == 2, carl.text()
    assert "No space left on device" in carl.text()
    assert "Traceback" not in carl.text()
    size("64M")
    back = whole.join(CLIENTS[2], mine / f"{CLIENTS[2]}.jsonl", *mine_is)
    ended(*joined, back, server)
    assert (folder / "carl dee" / "adapter" / "adapter_model.safetensors").is_file()
    assert list(folder.rglob("*.tmp")) == []
