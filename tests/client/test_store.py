"""A client's memory on its own disk: a file per turn, so that it can go back to any that counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flexp.client.store import StoredMemory
from flexp.errors import CheckpointError
from flexp.parcel import Parcel, save


def turn(memory: StoredMemory, value: float) -> None:
    memory.put("slot/personal", {"w": torch.full((2,), value)})
    memory.settle()
    memory.commit()


def test_it_goes_on_from_any_turn_that_counts(tmp_path: Path) -> None:
    memory = StoredMemory(tmp_path / "m")
    memory.open(0)
    for n in range(4):
        turn(memory, float(n + 1))
        assert memory.turns == n + 1
    again = StoredMemory(tmp_path / "m")
    assert again.held() == (1, 2, 3, 4)
    again.open(2)
    assert again.slots["slot/personal"]["w"].tolist() == [2.0, 2.0]
    turn(again, 9.0)  # the turn that did not count at the server happens anew
    assert again.turns == 3
    memory.open(3)
    assert memory.slots["slot/personal"]["w"].tolist() == [9.0, 9.0]


def test_what_may_be_needed_is_kept(tmp_path: Path) -> None:
    memory = StoredMemory(tmp_path / "m")
    memory.open(0)
    for n in range(5):
        turn(memory, float(n))
    memory.open(5, floor=4)
    assert memory.held() == (4, 5)
    memory.open(4, floor=9)  # a floor never takes away where it goes on
    assert memory.held() == (4, 5)


def test_a_turn_that_was_not_settled_leaves_nothing(tmp_path: Path) -> None:
    memory = StoredMemory(tmp_path / "m")
    memory.open(0)
    turn(memory, 1.0)
    memory.put("slot/personal", {"w": torch.zeros(2)})
    memory.rollback()
    assert memory.slots["slot/personal"]["w"].tolist() == [1.0, 1.0]
    assert memory.held() == (1,)


@pytest.mark.parametrize(
    "stray", ["1.parcel", "1x.parcel", "12-copy.parcel", "0000001.parcel", "²00000.parcel", "notes"]
)
def test_files_that_are_no_turns_are_passed_over(stray: str, tmp_path: Path) -> None:
    memory = StoredMemory(tmp_path / "m")
    memory.open(0)
    turn(memory, 1.0)
    (tmp_path / "m" / stray).write_bytes(b"somebody's")
    assert memory.held() == (1,)
    memory.open(1, floor=9)
    assert (tmp_path / "m" / stray).is_file()
    with pytest.raises(CheckpointError, match="turn -1"):
        memory.open(-1)


@pytest.mark.parametrize("hurt", ["a bit", "another turn's", "cut", "without a digest"])
def test_a_turn_that_is_not_as_it_was_written_is_refused(hurt: str, tmp_path: Path) -> None:
    """Tensors have no digest of their own: a flipped bit would be trained on, and nobody see it."""
    memory = StoredMemory(tmp_path)
    memory.open(0)
    turn(memory, 1.0)
    turn(memory, 2.0)
    file = tmp_path / "000002.parcel"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    if hurt == "a bit":
        file.write_bytes(data)
    elif hurt == "cut":
        file.write_bytes(data[:-4])
    elif hurt == "another turn's":
        file.write_bytes((tmp_path / "000001.parcel").read_bytes())
    else:
        save(file, Parcel(memory.slots, facts=memory.facts))
    again = StoredMemory(tmp_path)
    with pytest.raises(CheckpointError, match=r"000002\.parcel cannot be gone on from"):
        again.open(2)
    again.open(1)
    assert again.slots["slot/personal"]["w"].tolist() == [1.0, 1.0]


def test_a_turn_that_is_not_there_is_said(tmp_path: Path) -> None:
    memory = StoredMemory(tmp_path / "m")
    with pytest.raises(CheckpointError, match="turn 3 of this client"):
        memory.open(3)
    (tmp_path / "m" / ".000001.parcel.x.tmp").write_bytes(b"half")
    StoredMemory(tmp_path / "m")
    assert not list((tmp_path / "m").glob(".*.tmp"))
