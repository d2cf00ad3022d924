"""A model's folder as tensors: the same digest however they are spread, and parts that open."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexp.errors import ModelError
from flexp.model.backbone import Backbone
from flexp.model.files import (
    INDEX,
    Manifest,
    check_config,
    file_of,
    head_of,
    manifest,
    read_part,
    wanted,
    write_index,
)


def test_where_tensors_lie_does_not_matter(tiny_model: Path, tmp_path: Path) -> None:
    whole = manifest(tiny_model)
    parts = split(tiny_model, tmp_path / "parts", list(whole.pieces))
    assert manifest(parts).digest == whole.digest
    assert Manifest.from_json(whole.to_json()).digest == whole.digest


def split(folder: Path, out: Path, names: list[str]) -> Path:
    """A folder with one file for each of these tensors."""
    out.mkdir()
    whole = manifest(folder)
    for name in whole.small:
        shutil.copy(folder / name, out / name)
    for name in names:
        piece = whole.pieces[name]
        data = read_part(folder, whole, piece.file, piece.begin, piece.end - piece.begin)
        (out / file_of(name)).write_bytes(head_of(name, piece) + data)
    write_index(out, names)
    return out


def test_any_change_of_a_tensor_or_the_config_is_seen(tiny_model: Path, tmp_path: Path) -> None:
    before = manifest(tiny_model)
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    tensors = load_file(copy / "model.safetensors")
    name = sorted(tensors)[3]
    tensors[name].view(-1)[0] += 1e-6
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    after = manifest(copy)
    assert after.digest != before.digest
    assert [n for n in after.pieces if not after.pieces[n].same(before.pieces[n])] == [name]
    shutil.copy(tiny_model / "model.safetensors", copy / "model.safetensors")
    assert manifest(copy).digest == before.digest
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    assert manifest(copy).digest != before.digest


def test_a_part_opens_like_the_whole(tiny_model: Path, tmp_path: Path) -> None:
    """Two blocks of four: the others' tensors are not there, and what is runs the same."""
    whole = Backbone.open(tiny_model, task="classification")
    absent = [f"{whole.blocks_path}.{i}" for i in (1, 2)]
    names = wanted(manifest(tiny_model).pieces, absent)
    assert len(names) < len(manifest(tiny_model).pieces)
    folder = split(tiny_model, tmp_path / "part", names)
    part = Backbone.open(folder, task="classification", blocks=frozenset([0, 3]))
    ids = {"input_ids": torch.tensor([[3, 4, 5]]), "attention_mask": torch.ones(1, 3).long()}
    with torch.no_grad():
        front = part.run(ids, last=1)
        assert torch.equal(front, whole.run(ids, last=1))
        middle = whole.run(ids, first=1, last=3, feed=front)
        assert torch.equal(part.run(ids, first=3, feed=middle), whole.run(ids))


def test_only_a_models_own_files_are_given(tiny_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    (copy / "diary.txt").write_text("private")
    (copy / "rows.json").write_text("[]")
    found = manifest(copy)
    assert not {"diary.txt", "rows.json"} & set(found.small)
    for odd in ("diary.txt", "../copy/config.json", "/etc/hostname"):
        with pytest.raises(ModelError, match="no file"):
            read_part(copy, found, odd, 0, 10)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda plain: plain["small"].update({"../x": [1, "0"]}), id="path"),
        pytest.param(lambda plain: plain["small"].update({".ssh": [1, "0"]}), id="hidden"),
        pytest.param(lambda plain: plain.pop("config"), id="no config"),
        pytest.param(lambda plain: plain["pieces"].update({"w": [1]}), id="short"),
    ],
)
def test_a_list_from_another_machine_is_checked(
    tiny_model: Path, change: Callable[[dict[str, object]], None]
) -> None:
    plain = json.loads(manifest(tiny_model).to_json())
    change(plain)
    with pytest.raises(ModelError):
        Manifest.from_json(json.dumps(plain))


@pytest.mark.parametrize(
    "text",
    [
        '{"auto_map": {"AutoConfig": "evil.py"}}',
        '{"_attn_implementation_internal": "x"}',
        "[]",
        "{",
    ],
)
def test_a_config_that_asks_for_code_is_refused(text: str) -> None:
    with pytest.raises(ModelError):
        check_config(text)


def test_the_index_lists_what_is_there(tmp_path: Path) -> None:
    write_index(tmp_path, ["b", "a"])
    assert json.loads((tmp_path / INDEX).read_text())["weight_map"] == {
        "a": file_of("a"),
        "b": file_of("b"),
    }
