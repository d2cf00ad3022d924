"""Parcels come back as they went, in one way of writing them, and bad bytes are ParcelErrors."""

from __future__ import annotations

import json
import math
import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save as write_safetensors

from flexp import headers, safe
from flexp.errors import ParcelError
from flexp.parcel import Facts, Parcel, decode, digest, encode, load, save, write_atomic
from flexp.tensors import Tensors

TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
JSONS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def one_tensor(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(list(safe.CODES)))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    raw = draw(st.binary(min_size=math.prod(shape), max_size=math.prod(shape)))
    return torch.tensor(list(raw), dtype=torch.float32).reshape(shape).to(dtype)


TENSORS = st.dictionaries(TEXT, one_tensor(), max_size=3)
PARCELS = st.builds(
    Parcel,
    st.dictionaries(TEXT | st.just("expert/3"), TENSORS, max_size=3),
    TENSORS,
    st.dictionaries(TEXT, JSONS, max_size=3),
)


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype is b[k].dtype and a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a
    )


def example() -> Parcel:
    w = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    return Parcel(
        {"expert/3": {"layer.0.A": w, "layer.0.B": w.bfloat16()}, "personal": {}},
        {"mask": torch.tensor([True, False]), "step": torch.tensor(4), "none": torch.zeros(0, 2)},
        {"rows": 12, "loss": 0.5, "tags": ["a", None], "deep": {"x": True}},
    )


def raw(header: object, body: bytes = b"", *, note: object = None) -> bytes:
    """A file with exactly this header, well-formed or not."""
    text = header if isinstance(header, str) else json.dumps(header)
    if isinstance(header, dict) and "__metadata__" not in header:
        meta = note or {"version": 1, "facts": {}, "slots": []}
        text = json.dumps({"__metadata__": {"flexp": json.dumps(meta)}, **header})
    return struct.pack("<Q", len(text.encode())) + text.encode() + body


def f32(begin: object, end: object, shape: object = (1,), dtype: object = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@settings(deadline=None)
@given(PARCELS)
def test_a_parcel_comes_back_as_it_went(parcel: Parcel) -> None:
    data = encode(parcel)
    got = decode(data)
    assert got.adapters.keys() == parcel.adapters.keys()
    assert all(same(got.adapters[slot], parcel.adapters[slot]) for slot in parcel.adapters)
    assert same(got.tensors, parcel.tensors)
    assert got.facts == parcel.facts
    assert encode(got) == data


def test_equal_content_gives_equal_bytes_in_any_order() -> None:
    one = example()
    two = Parcel(
        {slot: dict(reversed(t.items())) for slot, t in reversed(list(one.adapters.items()))},
        dict(reversed(one.tensors.items())),
        dict(reversed(list(one.facts.items()))),
    )
    assert encode(one) == encode(two)


def test_the_file_is_ordinary_safetensors() -> None:
    names = set(safe.tensors_in(encode(example()))[0])
    assert "adapter/expert%2F3/layer.0.A" in names
    assert "tensor/mask" in names


def test_views_shared_memory_and_graphs_are_written_as_values() -> None:
    bank = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    weight = torch.nn.Parameter(torch.ones(2))
    sent = {"column": bank[:, 1], "row": bank[1], "again": bank[1], "weight": weight}
    got = decode(encode(Parcel(tensors=sent))).tensors
    assert same(got, {k: t.detach() for k, t in sent.items()})
    assert not got["weight"].requires_grad
    got["row"][0] = 99.0
    assert got["again"][0] == bank[1, 0] == 4.0


@pytest.mark.parametrize(
    "facts",
    [
        {"loss": math.nan},
        {"loss": [math.inf]},
        {"x": {1: "a"}},
        {"x": {"y": object()}},
        {"x": b"bytes"},
        {"x": torch.tensor(1)},
        {"n": 10**5000},
    ],
)
def test_facts_that_are_not_json_are_refused(facts: Any) -> None:
    with pytest.raises(ParcelError):
        encode(Parcel(facts=facts))


def test_facts_may_be_deep_but_not_bottomless() -> None:
    def nested(depth: int) -> Facts:
        return {"x": nested(depth - 1)} if depth else {}

    assert decode(encode(Parcel(facts=nested(30)))).facts == nested(30)
    with pytest.raises(ParcelError, match="32 deep"):
        encode(Parcel(facts=nested(40)))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(2, dtype=torch.float64),
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2, device="meta"),
        torch.zeros(2).to_sparse(),
    ],
)
def test_tensors_that_do_not_travel_are_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(ParcelError, match='"tensor/w" is'):
        encode(Parcel(tensors={"w": tensor}))
    with pytest.raises(ParcelError):
        digest({"w": tensor})


@pytest.mark.parametrize(
    "parcel",
    [
        Parcel({"": {}}),
        Parcel({"s": {"": torch.zeros(1)}}),
        Parcel(tensors={"": torch.zeros(1)}),
        Parcel(tensors={"x" * 600: torch.zeros(1)}),
        Parcel({"\ud800": {}}),
        Parcel(tensors={"\ud800": torch.zeros(1)}),
        Parcel(tensors={f"{i}": torch.zeros(0) for i in range(headers.PARCEL.tensors + 1)}),
        Parcel(facts={"x": "y" * headers.PARCEL.header}),
    ],
    ids=["no slot", "no name", "no name too", "long", "odd slot", "odd name", "many", "header"],
)
def test_what_could_not_be_read_back_is_not_written(parcel: Parcel) -> None:
    with pytest.raises(ParcelError):
        encode(parcel)


EXAMPLE = encode(example())
GOOD = raw({"tensor/w": f32(0, 4)}, bytes(4))
BAD = {
    "nothing": b"",
    "short": b"\x02\0\0\0\0\0\0\0{",
    "header longer than data": struct.pack("<Q", 999) + b"{}",
    "header of a petabyte": struct.pack("<Q", 1 << 50) + bytes(100),
    "not utf-8": struct.pack("<Q", 4) + b"\xff\xff\xff\xff",
    "utf-16": struct.pack("<Q", 6) + "{}".encode("utf-16"),
    "a list": raw("[]"),
    "a number": raw("3 "),
    "nested forever": raw("[" * 200_000),
    "not JSON": raw("{oops}"),
    "NaN": raw('{"__metadata__": NaN}'),
    "no metadata": raw('{"tensor/w": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "metadata of numbers": raw({"__metadata__": {"flexp": 1}}),
    "metadata is a list": raw({"__metadata__": []}),
    "other metadata": write_safetensors({"w": torch.zeros(1)}, {"format": "pt"}),
    "two metadata": raw({"__metadata__": {"flexp": "{}", "x": "y"}}),
    "newer": raw({}, note={"version": 2, "facts": {}, "slots": []}),
    "version true": raw({}, note={"version": True, "facts": {}, "slots": []}),
    "facts a list": raw({}, note={"version": 1, "facts": [], "slots": []}),
    "facts infinite": raw(
        {"__metadata__": {"flexp": '{"version":1,"facts":{"x":1e999},"slots":[]}'}}
    ),
    "slots unsorted": raw({}, note={"version": 1, "facts": {}, "slots": ["b", "a"]}),
    "slots twice": raw({}, note={"version": 1, "facts": {}, "slots": ["a", "a"]}),
    "slots numbers": raw({}, note={"version": 1, "facts": {}, "slots": [1]}),
    "slot nameless": raw({}, note={"version": 1, "facts": {}, "slots": [""]}),
    "unknown slot": raw({"adapter/a/w": f32(0, 4)}, bytes(4)),
    "slot unquoted": raw(
        {"adapter/%61/w": f32(0, 4)}, bytes(4), note={"version": 1, "facts": {}, "slots": ["a"]}
    ),
    "slot not text": raw({"adapter/%ff/w": f32(0, 4)}, bytes(4)),
    "no kind": raw({"w": f32(0, 4)}, bytes(4)),
    "no name": raw({"tensor/": f32(0, 4)}, bytes(4)),
    "long name": raw({"tensor/" + "w" * 600: f32(0, 4)}, bytes(4)),
    "half a character": raw({"tensor/\ud800": f32(0, 4)}, bytes(4)),
    "twice": raw(
        '{"tensor/w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        '"tensor/w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        bytes(1),
    ),
    "long header": raw(
        {}, note={"version": 1, "facts": {"x": "y" * headers.PARCEL.header}, "slots": []}
    ),
    "too many": raw({f"tensor/{i}": f32(0, 0, [0]) for i in range(headers.PARCEL.tensors + 1)}),
    "entry a list": raw({"tensor/w": []}, bytes(4)),
    "entry with more": raw({"tensor/w": f32(0, 4) | {"x": 1}}, bytes(4)),
    "dtype": raw({"tensor/w": f32(0, 8, [1], "F64")}, bytes(8)),
    "dtype a list": raw({"tensor/w": f32(0, 4, [1], ["F32"])}, bytes(4)),
    "shape negative": raw({"tensor/w": f32(0, 4, [-1, -1])}, bytes(4)),
    "shape true": raw({"tensor/w": f32(0, 4, [True])}, bytes(4)),
    "shape float": raw({"tensor/w": f32(0, 4, [1.0])}, bytes(4)),
    "shape text": raw({"tensor/w": f32(0, 4, "1")}, bytes(4)),
    "shape too big": raw({"tensor/w": f32(0, 4, [2])}, bytes(4)),
    "shape overflows": raw({"tensor/w": f32(0, 0, [0, 2**62, 2**62])}),
    "shape of many": raw({"tensor/w": f32(0, 4, [1] * 9)}, bytes(4)),
    "offset negative": raw({"tensor/w": f32(-4, 0)}, bytes(4)),
    "offset backwards": raw({"tensor/w": f32(4, 0)}, bytes(4)),
    "offset outside": raw({"tensor/w": f32(0, 4)}, bytes(3)),
    "offset huge": raw({"tensor/w": f32(2**64, 2**64 + 4)}, bytes(4)),
    "one offset": raw({"tensor/w": {"dtype": "F32", "shape": [1], "data_offsets": [4]}}, bytes(4)),
    "overlap": raw({"tensor/a": f32(0, 4), "tensor/b": f32(2, 6)}, bytes(6)),
    "same place": raw({"tensor/a": f32(0, 4), "tensor/b": f32(0, 4)}, bytes(4)),
    "gap": raw({"tensor/a": f32(0, 4), "tensor/b": f32(8, 12)}, bytes(12)),
    "gap in front": raw({"tensor/a": f32(4, 8)}, bytes(8)),
    "bytes behind": GOOD + b"x",
    "bool of 2": raw({"tensor/w": f32(0, 1, [1], "BOOL")}, b"\x02"),
}


def test_the_bad_examples_differ_from_this_good_one() -> None:
    assert decode(GOOD).tensors["w"].tolist() == [0.0]


@pytest.mark.parametrize("data", BAD.values(), ids=list(BAD))
def test_bytes_that_no_parcel_has_are_refused(data: bytes) -> None:
    with pytest.raises(ParcelError):
        decode(data)


# Sound safetensors, so only what they hold can be wrong.
SOUND = {
    *("no metadata", "other metadata", "two metadata", "newer", "version true", "facts a list"),
    *("facts infinite", "slots unsorted", "slots twice", "slots numbers", "slot nameless"),
    *("unknown slot", "slot unquoted", "slot not text", "no kind", "no name", "bool of 2"),
}


@pytest.mark.parametrize("name", [name for name in BAD if name not in SOUND])
def test_odd_headers_never_reach_the_parser(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(_: bytes) -> Tensors:
        pytest.fail("the parser was called")

    monkeypatch.setattr(safe, "parse", reached)
    with pytest.raises(ParcelError):
        decode(BAD[name])


def test_the_limit_counts_all_bytes() -> None:
    data = encode(example())
    assert decode(data, limit=len(data)).facts["rows"] == 12
    with pytest.raises(ParcelError, match=f"limit of {len(data) - 1}"):
        decode(data, limit=len(data) - 1)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_raise_nothing_else(data: bytes) -> None:
    with pytest.raises(ParcelError):
        decode(data)
    with pytest.raises(ParcelError):
        decode(struct.pack("<Q", len(data)) + data)


@settings(deadline=None)
@given(st.integers(0, len(EXAMPLE) - 1))
def test_truncated_parcels_are_refused(size: int) -> None:
    with pytest.raises(ParcelError):
        decode(EXAMPLE[:size])


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_mutated_parcels_are_refused_or_still_canonical_parcels(data: st.DataObject) -> None:
    changed = bytearray(EXAMPLE)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(changed) - 1))
        changed[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    try:
        got = decode(bytes(changed))
    except ParcelError:
        return
    again = decode(encode(got))
    assert again.facts == got.facts
    assert {s: digest(t) for s, t in again.adapters.items()} == {
        s: digest(t) for s, t in got.adapters.items()
    }


ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "BOOL", "F64", 3]),
        "shape": st.lists(st.integers(-1, 3), max_size=3),
        "data_offsets": st.lists(st.integers(-1, 12), min_size=1, max_size=3),
    }
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(["tensor/a", "tensor/b", "c"]), ENTRY), st.integers(0, 12))
def test_a_header_is_taken_exactly_when_a_slow_reader_takes_it(
    entries: dict[str, dict[str, Any]], size: int
) -> None:
    sizes = {"F32": 4, "U8": 1, "BOOL": 1}
    owners: list[str] = []
    good = all(name.startswith("tensor/") for name in entries)
    for name, entry in entries.items():
        shape, offsets = entry["shape"], entry["data_offsets"]
        if len(offsets) != 2 or entry["dtype"] not in sizes or min([*shape, *offsets]) < 0:
            good = False
            continue
        good &= offsets[1] - offsets[0] == math.prod(shape) * sizes[entry["dtype"]]
        good &= not (offsets[0] == offsets[1] and offsets[0] > size)
        owners += [f"{name} {i}" for i in range(*offsets)]
    places = sorted(int(owner.split()[1]) for owner in owners)
    good &= places == list(range(size))
    try:
        decode(raw(entries, bytes(size)))
    except ParcelError:
        assert not good
    else:
        assert good


def test_a_file_comes_back_and_no_other_file_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save(path, Parcel(facts={"old": 1}))
    save(path, example())
    assert encode(load(path)) == encode(example())
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "a.safetensors"
    write_atomic(path, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(ParcelError, match=r"a\.safetensors.*No space left"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_the_bytes_are_on_disk_before_the_name_points_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(handle: int) -> None:
        done.append("fsync")
        fsync(handle)

    def spy_replace(source: str, target: Path) -> None:
        assert Path(source).read_bytes() == b"new"
        assert Path(source).parent == target.parent
        done.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    write_atomic(tmp_path / "a", b"new")
    assert done == ["fsync", "replace", "fsync"]


def test_files_that_cannot_be_loaded_are_named(tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    with pytest.raises(ParcelError, match=r"b\.safetensors.*cannot be read"):
        load(path)
    path.write_bytes(b"not a parcel at all")
    with pytest.raises(ParcelError, match=r"b\.safetensors.*not a usable parcel"):
        load(path)
    with pytest.raises(ParcelError, match="limit of 5"):
        load(path, limit=5)


def test_digest_sees_names_dtypes_shapes_and_values_only() -> None:
    base = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
    others = [
        {"a": base["a"]},
        {"a": base["a"], "c": base["b"]},
        {"a": base["a"].half(), "b": base["b"]},
        {"a": base["a"].reshape(2, 1), "b": base["b"]},
        {"a": torch.tensor([1.0, -2.0]), "b": base["b"]},
        {"a": base["a"].view(torch.int32), "b": base["b"]},
        {},
    ]
    assert len({digest(t) for t in [base, *others]}) == 1 + len(others)
    columns = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    assert digest({"b": base["b"], "a": columns[:, 0]}) == digest(base)


def test_reading_a_small_parcel_takes_little_memory(tmp_path: Path) -> None:
    """The limit is far above what a small device has."""
    save(tmp_path / "one.parcel", Parcel(tensors={"w": torch.ones(1000)}))
    tracemalloc.start()
    try:
        load(tmp_path / "one.parcel")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
