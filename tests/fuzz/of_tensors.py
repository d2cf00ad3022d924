"""Targets 1 to 3: frames, headers of safetensors files, and all that reads such files."""

from __future__ import annotations

import functools
import io
import json
import shutil
import struct
import zlib
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import safetensors
import torch
import toys
from fuzz.draws import at, scratch
from safetensors.torch import save as write_safetensors

from flexp import checkpoint, export, headers
from flexp.assets.catalogue import CATALOGUE
from flexp.assets.manifest import read_manifest
from flexp.client.store import StoredMemory
from flexp.dice import Dice
from flexp.errors import (
    CheckpointError,
    ExportError,
    FlexpError,
    LinkError,
    ModelError,
    ParcelError,
)
from flexp.headers import BITS, MODEL, PARCEL, Caps
from flexp.link import frame
from flexp.link.control import Echo, Hello, Measured, Outcome
from flexp.link.messages import Answer, Backward, Do, Forward, Join, StepKey, Submit
from flexp.model import files
from flexp.model.backbone import Backbone
from flexp.model.cut import Cut, Seat
from flexp.model.files import Manifest
from flexp.model.ops import Assign, Optim, Step
from flexp.parcel import Parcel, decode, digest, encode
from flexp.selection import FAR, NEAR
from flexp.server.tenants import Tenants
from flexp.strategies.local import Local
from flexp.tensors import Term

# ---- 1: frames


def frames() -> list[bytes]:
    """A frame of every shape that matters, plain and packed."""
    key = StepKey("run.1", 0, 1, 2, 3, "forward")
    hidden = torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 64)
    forward = Forward(
        key, (Term("personal", 0.5), Term("x", float("nan"), "y")), {"personal": NEAR & ~FAR},
        "hidden", hidden, (torch.ones(4),), {"input_ids": (2, 3)}, torch.ones(2, 3).long(), None,
        Dice(1)("d"), True, (Step("personal", "g"), Assign("a", (Term("b"),), clip=(0.0, 1.0))),
    )  # fmt: skip
    bodies: list[Any] = [
        Hello(1, "0.1", "2.13", "phone", "p"),
        Measured(10**9, 1e9),
        Outcome(3, cells={"own": {"accuracy": 0.5}}),
        Echo(b"bytes", 3),
        Join(key, Seat(Cut(1, 1)), {"personal": Optim("sgd", 0.1)}),
        forward,
        Backward(key, hidden.bfloat16(), True),
        Do(key, (Assign("x", (Term("a", 2.0, "b", True),), FAR),)),
        Submit(key, {"personal": {"w": torch.ones(2)}}, {"personal": FAR}, {"m": torch.tensor(3)},
            {"rows": 3, "deep": [{"a": None}]}),
        Answer({"hidden": hidden, "none": torch.zeros(0, 2)}, ((0.5, 1.0),), {"ok": True}),
    ]  # fmt: skip
    plain = [frame.encode(n, body) for n, body in enumerate(bodies)]
    packed = [frame.encode(9, forward, wire) for wire in ("bf16", "fp16", "int8", "int8-group")]
    return [*plain, *packed]


def run_frame(data: bytes) -> None:
    """LinkError, or a frame that has just these bytes; and it comes in pieces as it went."""
    try:
        found = frame.decode(bytearray(data))
    except LinkError:
        found = None
    if found is not None and b"wire" not in data:  # what was rounded is not rounded back
        assert frame.encode(found.number, found.body) == data, "not the one spelling of a frame"
    joiner = frame.Joiner(1 << 20)
    cut = 1 + zlib.crc32(data) % (len(data) + 1)
    head = len(data).to_bytes(8, "little")
    pieces = [p for p in (head + data[:cut], data[cut:]) if p]
    if data:
        whole = [w for piece in pieces if (w := joiner.add(piece)) is not None]
        assert whole == [data], "the pieces of a frame are another frame"
    with suppress(LinkError):
        frame.Joiner(1 << 16).add(data)


# ---- 2: headers of safetensors files


def tensors() -> list[bytes]:
    """Small files of all kinds."""
    made = {
        "a.weight": torch.arange(6.0).reshape(2, 3),
        "b": torch.zeros(0, 4),
        "c": torch.tensor([True, False]),
        "d": torch.tensor(3, dtype=torch.int64),
    }
    wide = json.dumps({"w": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    return [
        write_safetensors(made, {"format": "pt"}),
        write_safetensors({"x": torch.zeros(2, dtype=torch.float64)}),
        write_safetensors({}),
        len(wide).to_bytes(8, "little") + wide + b"ab",
        encode(parcel()),
    ]


def parcel() -> Parcel:
    return Parcel(
        {"personal": {"w": torch.ones(2, 3)}, "expert/3": {}},
        {"mask": torch.tensor([True]), "m": torch.ones(2).bfloat16()},
        {"rows": 12, "deep": {"x": [1.5, None]}},
    )


class _Pairs(list[Any]):
    """A JSON object as it is written, with names twice."""


def slowly(data: bytes, caps: Caps) -> bool:
    """Whether a header is one that may be, looked at byte by byte."""
    if len(data) < 10:
        return False
    (size,) = struct.unpack("<Q", data[:8])
    text, body = data[8 : 8 + size], data[8 + size :]
    short = size <= caps.header and len(text) == size
    if not short or text[0:1] != b"{" or text.count(b"{") > caps.braces:
        return False

    def refuse(_: str) -> None:
        raise ValueError

    try:
        rows = json.loads(text.decode("utf-8"), object_pairs_hook=_Pairs, parse_constant=refuse)
    except (ValueError, RecursionError):
        return False
    if not _once(rows):
        return False
    owners, ends, seen = [0] * len(body), {0}, list[tuple[int, int]]()
    for name, info in rows:
        if name == "__metadata__":
            if not isinstance(info, _Pairs) or not all(isinstance(v, str) for _, v in info):
                return False
            continue
        span = _span(name, info, len(body), caps)
        if span is None:
            return False
        seen.append(span)
        ends.add(span[1])
        for n in range(*span):
            owners[n] += 1
    empty_fits = all(begin in ends for begin, end in seen if begin == end)
    return len(seen) <= caps.tensors and set(owners) <= {1} and empty_fits


def _once(value: Any) -> bool:
    """Whether no object anywhere has a name twice."""
    if isinstance(value, _Pairs):
        names = [name for name, _ in value]
        return len(names) == len(set(names)) and all(_once(v) for _, v in value)
    return not isinstance(value, list) or all(_once(v) for v in value)


def _span(name: str, info: Any, size: int, caps: Caps) -> tuple[int, int] | None:
    held = dict(info) if isinstance(info, _Pairs) else {}
    shape, offsets, dtype = held.get("shape"), held.get("data_offsets"), held.get("dtype")
    whole = [
        type(rows) is list and all(type(n) is int and n >= 0 for n in rows)
        for rows in (shape, offsets)
    ]
    if len(held) != 3 or not all(whole) or type(dtype) is not str or dtype not in caps.types:
        return None
    count, room = 1, 1
    for n in cast("list[int]", shape):
        count, room = count * n, room * max(n, 1)
    rows = cast("list[int]", offsets)
    named = 0 < len(name) <= 512 and not any("\ud800" <= c <= "\udfff" for c in name)
    if not named or len(rows) != 2 or len(cast("list[int]", shape)) > 8 or room > 1 << 48:
        return None
    fits = rows[0] <= rows[1] <= size and (rows[1] - rows[0]) * 8 == count * BITS[dtype]
    return (rows[0], rows[1]) if fits else None


def run_header(data: bytes) -> None:
    """Taken exactly when the slow reader takes it; then the library's parser takes it too."""
    for caps in (PARCEL, MODEL):
        try:
            table = headers.read(io.BytesIO(data), len(data), caps)
        except ParcelError:
            assert not slowly(data, caps), "refused, but nothing is wrong with it"
            continue
        assert slowly(data, caps), "taken, but something is wrong with it"
        if caps is PARCEL:
            found = dict(safetensors.deserialize(data))
            assert found.keys() == table.spans.keys()
            for name, span in table.spans.items():
                info = cast("dict[str, Any]", found[name])
                assert (info["dtype"], tuple(info["shape"])) == (span.dtype, span.shape)


# ---- 3: everything that reads such files, and what lies beside them


@functools.cache
def body() -> Backbone:
    return toys.backbone()


@functools.cache
def model() -> Path:
    """The folder of a tiny model."""
    folder = scratch() / "model"
    toys.model_of("bert-cls", 2).save_pretrained(folder)
    return folder


def small_model() -> bytes:
    return (model() / "model.safetensors").read_bytes()


def read_parcel(data: bytes) -> None:
    found = decode(data)
    again = decode(encode(found))
    assert again.facts == found.facts
    assert {s: digest(t) for s, t in again.adapters.items()} == {
        s: digest(t) for s, t in found.adapters.items()
    }
    assert digest(again.tensors) == digest(found.tensors)


def read_turn(data: bytes) -> None:
    at("memory/000001.parcel", data)
    StoredMemory(scratch() / "memory").open(1)


def read_folder(data: bytes) -> None:
    at("folder/config.json", b"{}")
    at("folder/model.safetensors", data)
    found = files.manifest(scratch() / "folder")
    assert Manifest.from_json(found.to_json()) == found


def read_list(data: bytes) -> None:
    found = Manifest.from_json(data.decode("utf-8", "replace"))
    for name, piece in found.pieces.items():
        files.head_of(name, piece)
        assert Path(files.file_of(name)).name == files.file_of(name)
        assert (scratch() / piece.file).resolve().parent == scratch().resolve()
    assert len(found.digest) == 64


def read_config(data: bytes) -> None:
    files.check_config(data.decode("utf-8", "replace"))


def read_card(data: bytes) -> None:
    export.card_of(at("adapter/flexp.json", data).parent)


def read_asset(data: bytes) -> None:
    asset = next(iter(CATALOGUE.values()))
    read_manifest(asset, at("asset/asset.json", data).parent)


def read_index(data: bytes) -> None:
    at(f"shards/{headers.INDEX}", data)
    folder = scratch() / "shards"
    for path in headers.shards(folder):
        assert path.parent == folder


def read_checkpoint(data: bytes) -> None:
    at("runs/000001/checkpoint.json", data)
    checkpoint.done(scratch() / "runs")


def read_state(data: bytes) -> None:
    """A checkpoint with this as the strategy's state and as a tenant."""
    folder = scratch() / "state"
    for name in ("clients", "tenants"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    at("state/shared.parcel", encode(Parcel()))
    at("state/state.parcel", data)
    at("state/tenants/phone.parcel", data)
    engine: Any = SimpleNamespace(memories={}, tenants=Tenants(body(), lambda spec, rank: {}))
    checkpoint.read(folder, Local(), engine)


def read_weights(data: bytes) -> None:
    """The library's own loader, which is slow: only of files that the check lets pass."""
    folder = scratch() / "weights"
    if not folder.is_dir():
        shutil.copytree(model(), folder)
    at("weights/model.safetensors", data)
    Backbone.open(folder, task="classification")


def read_adapter(data: bytes) -> None:
    headers.of_file(at("peft/adapter_model.safetensors", data))


READERS = (
    read_parcel, read_turn, read_folder, read_list, read_config, read_card, read_asset, read_index,
    read_checkpoint, read_state, read_adapter, read_weights,
)  # fmt: skip
LOADING = (ParcelError, ModelError, ExportError, CheckpointError)


def run_loaders(data: bytes) -> None:
    """Only typed errors; what was read can be written and read again."""
    if not data:
        return
    reader = READERS[data[0] % len(READERS)]
    if reader is read_weights and zlib.crc32(data) % 4:  # takes as long as hundreds of others
        return
    try:
        reader(data[1:])
    except LOADING:
        pass
    except FlexpError as problem:
        raise AssertionError(f"{type(problem).__name__} from a file that was read") from problem


def files_of_all_kinds() -> list[bytes]:
    """A valid file for each reader, with its number before it."""
    whole = encode(parcel())
    asset = next(iter(CATALOGUE.values()))
    state = checkpoint.encode_state({"round": 1, "held": (torch.ones(2), [None, "x"])})
    seat = {"seat": [1, 1, "keep", None, False, 1], "turns": 2}
    card = {"base": "m", "task": "causal-lm", "labels": [], "max_length": 9, "revision": None}
    seeds: list[bytes] = [
        whole,
        whole,
        small_model(),
        files.manifest(model()).to_json().encode(),
        (model() / "config.json").read_bytes(),
        json.dumps({**card, "prior": [0.5]}).encode(),
        json.dumps({"sha256": asset.sha256, "files": {"a": [3, "00"]}}).encode(),
        json.dumps({"weight_map": {"w": "a.safetensors"}}).encode(),
        json.dumps({"version": 1, "round": 1, "recipe": {}, "files": {}}).encode(),
        encode(Parcel(state.adapters, state.tensors, {**state.facts, **cast("Any", seat)})),
        write_safetensors({"lora_A": torch.ones(2, 2)}, {"format": "pt"}),
        small_model(),
    ]
    assert len(seeds) == len(READERS)
    return [bytes([n]) + seed for n, seed in enumerate(seeds)]
