"""A safetensors header that is too much or wrong is refused before any parser sees the file."""

from __future__ import annotations

import io
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as write_safetensors
from torch import nn

from flexp import assets, headers, safe
from flexp.client.memory import Memory
from flexp.client.store import StoredMemory
from flexp.errors import (
    AssetError,
    CheckpointError,
    ExportError,
    FlexpError,
    ModelError,
    ParcelError,
)
from flexp.export import open_with_peft
from flexp.headers import MODEL, PARCEL, Caps, of_file, of_model, read, shards
from flexp.model.backbone import Backbone
from flexp.model.files import manifest
from flexp.parcel import decode, load


def bomb(tensors: int) -> bytes:
    """A legal file of empty tensors: nothing but a header."""
    row = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    text = "{" + ",".join(f'"t{n:06d}":{row}' for n in range(tensors)) + "}"
    text += " " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text.encode()


BOMB = bomb(200_000)  # what is refused for its length
MANY = bomb(40_000)  # what is short enough for a model, but has too many tensors


class Counting(io.BytesIO):
    """Counts the bytes that are read of it."""

    taken = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.taken += len(data)
        return data


@pytest.fixture
def unparsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if any parser of such files is called."""

    def reached(*_: Any, **__: Any) -> Any:
        pytest.fail("a parser was called")

    monkeypatch.setattr(headers, "strict_json", reached)
    monkeypatch.setattr(safe, "parse", reached)
    monkeypatch.setattr("safetensors.torch.safe_open", reached)  # so does PEFT
    monkeypatch.setattr("transformers.modeling_utils.safe_open", reached)


def test_the_bombs_are_legal_and_as_large_as_they_should_be() -> None:
    assert 11_000_000 < len(BOMB) < 13_000_000
    assert PARCEL.header < len(MANY) - 8 < MODEL.header
    spans = read(io.BytesIO(bomb(9)), len(bomb(9)), MODEL).spans
    assert list(spans) == [f"t{n:06d}" for n in range(9)]


@pytest.mark.usefixtures("unparsed")
@pytest.mark.parametrize("caps", [PARCEL, MODEL], ids=["parcel", "model"])
def test_of_a_header_that_is_too_long_only_its_length_is_read(caps: Caps) -> None:
    file = Counting(BOMB)
    with pytest.raises(ParcelError, match=r"announce a header of 11"):
        read(file, len(BOMB), caps)
    assert file.taken == 8


@pytest.mark.usefixtures("unparsed")
def test_tensors_are_counted_before_they_are_parsed() -> None:
    file = Counting(MANY)
    with pytest.raises(ParcelError, match="more than 32768 tensors"):
        read(file, len(MANY), MODEL)
    assert file.taken == len(MANY)


def test_what_lies_behind_a_header_is_not_read() -> None:
    data = write_safetensors({"w": torch.zeros(1 << 16)})
    file = Counting(data)
    table = read(file, len(data), MODEL)
    assert file.taken == table.start == len(data) - (1 << 18)


# ---- every way by which such a file is read


def as_parcel(path: Path, model: Path) -> None:
    load(path)


def as_bytes(path: Path, model: Path) -> None:
    decode(path.read_bytes())


def as_memory(path: Path, model: Path) -> None:
    Memory.load(path)


def as_turn(path: Path, model: Path) -> None:
    folder = path.parent / "memory"
    memory = StoredMemory(folder)
    shutil.copy(path, folder / "000001.parcel")
    memory.open(1)


def as_adapter(path: Path, model: Path) -> None:
    shutil.copy(path, path.parent / "adapter_model.safetensors")
    open_with_peft(nn.Linear(1, 1), path.parent)


def as_model(path: Path, model: Path) -> None:
    shutil.copy(path, model / "model.safetensors")
    Backbone.open(model, task="classification")


def as_part(path: Path, model: Path) -> None:
    """As what was fetched from a server: a few blocks, and a file for each tensor."""
    as_shard(path, model)
    Backbone.open(model, task="classification", blocks=frozenset([0]))


def as_shard(path: Path, model: Path) -> None:
    (model / "model.safetensors").unlink()
    shutil.copy(path, model / "tensor-a.safetensors")
    index = {"weight_map": {"w": "tensor-a.safetensors"}}
    (model / headers.INDEX).write_text(json.dumps(index))


def as_manifest(path: Path, model: Path) -> None:
    as_shard(path, model)
    manifest(model)


def as_source(path: Path, model: Path) -> None:
    as_shard(path, model)
    assets.resolve(str(model), assets.Cache(path.parent / "none"))


def as_stray(path: Path, model: Path) -> None:
    """Beside the model's own file, where some other program may look."""
    shutil.copy(path, model / "adapter_model.safetensors")
    assets.resolve(str(model), assets.Cache(path.parent / "none"))


WAYS: dict[str, tuple[Callable[[Path, Path], None], type[FlexpError]]] = {
    "parcel": (as_parcel, ParcelError),
    "bytes": (as_bytes, ParcelError),
    "memory": (as_memory, ParcelError),
    "turn": (as_turn, CheckpointError),
    "adapter": (as_adapter, ExportError),
    "model": (as_model, ModelError),
    "part": (as_part, ModelError),
    "manifest": (as_manifest, ModelError),
    "source": (as_source, AssetError),
    "stray": (as_stray, AssetError),
}


@pytest.mark.usefixtures("unparsed")
@pytest.mark.parametrize("way", WAYS)
def test_a_header_bomb_is_refused_by_every_way_in(
    way: str, tiny_model: Path, tmp_path: Path
) -> None:
    take, kind = WAYS[way]
    model, path = tmp_path / "model", tmp_path / "bomb"
    shutil.copytree(tiny_model, model)
    if way == "stray":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(headers, "strict_json", json.loads)
            of_model(model)
            path.write_bytes(BOMB)
            with pytest.raises(kind, match="announce a header"):
                take(path, model)
        return
    path.write_bytes(BOMB)
    with pytest.raises(kind, match="announce a header"):
        take(path, model)


# ---- a model's files


def test_a_folder_says_which_files_hold_the_model(tmp_path: Path) -> None:
    for name in ("b.safetensors", "a.safetensors", "consolidated.safetensors"):
        (tmp_path / name).write_bytes(write_safetensors({name: torch.zeros(1)}))
    assert [p.name for p in shards(tmp_path)] == ["a.safetensors", "b.safetensors"]
    (tmp_path / headers.INDEX).write_text('{"weight_map": {"x": "b.safetensors"}}')
    assert [p.name for p in shards(tmp_path)] == ["b.safetensors"]
    assert [p.name for p in of_model(tmp_path)] == ["b.safetensors"]
    shutil.copy(tmp_path / "a.safetensors", tmp_path / headers.SINGLE)
    assert [p.name for p in shards(tmp_path)] == [headers.SINGLE]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "[" * 100_000,
        '{"weight_map": []}',
        '{"weight_map": {"w": 3}}',
        '{"weight_map": {"w": []}}',
        '{"weight_map": {"w": ""}}',
        '{"weight_map": {"w": ".."}}',
        '{"weight_map": {"w": "../config.json"}}',
        '{"weight_map": {"w": "/etc/hostname"}}',
        '{"weight_map": {"w": "a\\u0000"}}',
        '{"weight_map": {"w": "\\ud800"}}',
    ],
)
def test_an_index_that_names_no_files_of_its_folder_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / headers.INDEX).write_text(text)
    with pytest.raises(ParcelError, match="not a list of shards"):
        shards(tmp_path)


def test_an_index_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "MAX_INDEX", 9)
    (tmp_path / headers.INDEX).write_text('{"weight_map": {}}')
    with pytest.raises(ParcelError, match="more than 9 bytes"):
        shards(tmp_path)


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    for name in ("absent", "."):
        with pytest.raises(ParcelError, match="no such file"):
            of_file(tmp_path / name)
    (tmp_path / "w").write_bytes(bytes(20))
    with pytest.raises(ParcelError, match=r'w" is not a usable safetensors file'):
        of_file(tmp_path / "w")


def test_models_may_have_types_that_parcels_may_not() -> None:
    data = write_safetensors({"w": torch.zeros(2, dtype=torch.float64)})
    assert read(io.BytesIO(data), len(data), MODEL).spans["w"].end == 16
    with pytest.raises(ParcelError, match="dtype"):
        read(io.BytesIO(data), len(data), PARCEL)
