"""Frames: what goes in comes out, and bytes that are none are refused in one way only."""

from __future__ import annotations

import math
import struct
import tracemalloc
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from itertools import pairwise, repeat
from types import NoneType, UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

import msgspec
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexp.errors import LinkError
from flexp.link import frame
from flexp.link.control import Bye, Control, Echo, Hello
from flexp.link.frame import (
    ALIGN,
    CHUNK,
    MAGIC,
    MAX_HEADER,
    MORE_PIECES,
    VALUES,
    Body,
    Joiner,
    chunks,
    decode,
    encode,
    key_digest,
)
from flexp.link.messages import Answer, Backward, Do, Fetch, Message, StepKey, Submit
from flexp.link.schema import values_in
from flexp.link.wire import PACKED, Wire, arrived
from flexp.model.ops import Assign
from flexp.parcel import JSON
from flexp.selection import Where
from flexp.tensors import Term

WIRES: tuple[Wire, ...] = get_args(Wire)
DTYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool,
)  # fmt: skip
KINDS: tuple[type[Any], ...] = (*get_args(Message), Answer, *get_args(Control))
NUMBERS = st.integers(-(1 << 31), 1 << 31)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
plain = st.none() | st.booleans() | NUMBERS | st.floats(allow_nan=False, allow_infinity=False)
facts = st.dictionaries(texts, st.recursive(plain | texts, lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(texts, inner, max_size=3), max_leaves=5), max_size=3)  # fmt: skip


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any type and shape that may cross, empty ones and single numbers as well."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    stream = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=stream).bool()
    if not dtype.is_floating_point:
        return torch.randint(0, 200, shape, generator=stream).to(dtype)
    found = torch.randn(shape, generator=stream).to(dtype)
    return found.transpose(0, 1) if found.dim() > 1 and draw(st.booleans()) else found


def wheres() -> st.SearchStrategy[Where]:
    simple = st.builds(
        Where,
        side=st.sampled_from([None, "near", "far"]),
        part=st.sampled_from([None, "front", "trunk", "tail", "head"]),
        last=st.none() | st.integers(0, 9),
        nearest=st.none() | st.integers(0, 9),
        names=texts,
    )
    return st.recursive(
        simple,
        lambda inner: (
            st.tuples(inner, inner).map(lambda pair: pair[0] & pair[1])
            | st.tuples(inner, inner).map(lambda pair: pair[0] | pair[1])
            | inner.map(lambda one: ~one)
        ),
        max_leaves=4,
    )


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Anything that a field of that type may hold."""
    if hint is Tensor:
        return tensors()
    if hint is Where:
        return wheres()
    if hint is float:
        return st.floats(width=64)
    if hint in (int, str, bytes, bool, NoneType):
        found: dict[Any, st.SearchStrategy[Any]] = {
            int: NUMBERS, str: texts, bytes: st.binary(max_size=9), bool: st.booleans(),
            NoneType: st.none(),
        }  # fmt: skip
        return found[hint]
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return st.sampled_from(args)
    if origin in (Union, UnionType):
        # By the time that it crosses, a coefficient is a number.
        kept = [a for a in args if not (a is Tensor and float in args)]
        return st.one_of([values(a) for a in kept])
    if origin in (dict, Mapping) or (origin is not None and issubclass(origin, Mapping)):
        key, value = args
        if value in (Any, JSON):
            return facts
        return st.dictionaries(values(key), values(value), max_size=3)
    if origin is tuple:
        if args[-1] is ...:
            return st.lists(values(args[0]), max_size=3).map(tuple)
        return st.tuples(*(values(a) for a in args))
    return objects(hint)


def objects(kind: Any) -> st.SearchStrategy[Any]:
    """Instances of a class that crosses, every field filled."""
    hints = get_type_hints(kind, localns={"Facts": dict[str, Any]})
    names = [f.name for f in fields(kind)] if is_dataclass(kind) else kind.__struct_fields__
    loose = {"facts"} & set(names)
    filled = {n: facts if n in loose else st.deferred(lambda n=n: values(hints[n])) for n in names}
    return st.builds(cast("Callable[..., Any]", kind), **filled)


bodies: st.SearchStrategy[Body] = st.one_of([objects(kind) for kind in KINDS])
frames = st.builds(encode, st.integers(0, 1 << 40), bodies)


def alike(a: Any, b: Any, name: str = "", wire: Wire = "fp32") -> bool:
    """Whether b is what arrives of a: bits of tensors, NaN as NaN, lists as tuples."""
    if isinstance(a, Tensor):
        sent = arrived(name, a, wire) if name in PACKED else a
        same = (sent.dtype, sent.shape) == (b.dtype, b.shape)
        return same and torch.equal(torch.nan_to_num(sent), torch.nan_to_num(b))
    if isinstance(a, float) and isinstance(b, float):
        return struct.pack("d", a) == struct.pack("d", b) or (math.isnan(a) and math.isnan(b))
    if isinstance(a, Mapping):
        one, two = cast("Mapping[Any, Any]", a), cast("Mapping[Any, Any]", b)
        return list(one) == list(two) and all(alike(one[k], two[k], str(k), wire) for k in one)
    if isinstance(a, tuple | list):
        pairs = list(zip(cast("tuple[Any, ...]", a), b, strict=True))
        return all(alike(x, y, name, wire) for x, y in pairs)
    if type(a) is not type(b):
        return False
    if is_dataclass(a):
        names = [f.name for f in fields(a)]
    elif isinstance(a, msgspec.Struct):
        names = list(a.__struct_fields__)
    else:
        return a == b
    return all(alike(getattr(a, n), getattr(b, n), n, wire) for n in names)


# ---- there and back


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_of_message_comes_back(kind: type[Any]) -> None:
    @settings(max_examples=25)
    @given(st.integers(0, 1 << 40), objects(kind))
    def there_and_back(number: int, body: Body) -> None:
        data = bytearray(encode(number, body))
        found = decode(data)
        assert found.number == number
        assert alike(body, found.body)
        assert encode(found.number, found.body) == data  # one message has one spelling
        assert len(data) % ALIGN == 0

    there_and_back()


@given(bodies, st.sampled_from(WIRES[1:]))
def test_a_wire_rounds_what_it_packs_and_nothing_else(body: Body, wire: Wire) -> None:
    found = decode(bytearray(encode(7, body, wire)))
    assert alike(body, found.body, wire=wire)


@given(tensors())
def test_tensors_lie_in_the_frame_that_came(tensor: Tensor) -> None:
    """Nothing is copied, and what is decoded may be written to."""
    key = StepKey("r", 0, 0, 0, 1, "backward")
    data = bytearray(encode(1, Backward(key, tensor, hidden=False)))
    grad = cast("Backward", decode(data).body).grad
    assert grad.is_contiguous()
    if grad.numel():
        before = bytes(data)
        grad.copy_(grad == 0)
        assert bytes(data) != before or torch.equal(grad, (grad == 0).to(grad.dtype))


def test_nan_as_coefficient_marks_a_learned_one_on_both_sides() -> None:
    key, mix = StepKey("r", 0, 0, 0, 1, "do"), (Term("a", math.nan), Term("b", -0.0, "c", True))
    found = cast("Do", decode(bytearray(encode(1, Do(key, (Assign("x", mix),))))).body)
    (assign,) = found.ops
    assert alike(Assign("x", mix), assign)


# ---- memory


def header_of(data: bytes) -> bytes:
    return data[8 : 8 + int.from_bytes(data[4:8], "little")]


def values_of(plain: Any) -> int:
    """How many values there are, counted one by one."""
    if isinstance(plain, dict):
        held = cast("dict[Any, Any]", plain)
        return 1 + sum(values_of(k) + values_of(v) for k, v in held.items())
    if isinstance(plain, list):
        return 1 + sum(values_of(v) for v in cast("list[Any]", plain))
    return 1


@given(frames)
def test_values_are_counted_as_they_are(data: bytes) -> None:
    header = header_of(data)
    count = values_of(msgspec.msgpack.decode(header))
    assert values_in(memoryview(header), 1 << 30) == count
    assert values_in(memoryview(header), 5) > 5


@given(st.binary(max_size=60))
def test_a_count_ends_whatever_the_bytes(data: bytes) -> None:
    most = 40
    assert 1 <= values_in(memoryview(data), most) <= most + 2 * 0xFFFFFFFF + 1


def answer(facts: Any, count: int = 0) -> bytearray:
    tensors = {f"{n}": torch.zeros(1) for n in range(count)}
    return bytearray(encode(1, Answer(tensors, facts={"x": facts})))


LARGE = {
    "empty lists": lambda n: answer([[] for _ in range(n)]),
    "empty tables": lambda n: answer([{} for _ in range(n)]),
    "small tables": lambda n: answer([{"a": {}} for _ in range(n // 3)]),
    "named tables": lambda n: answer([{f"{k:02d}": None} for k in range(n // 3)]),
    "nested lists": lambda n: answer([[[[[]]]] for _ in range(n // 4)]),
    "numbers": lambda n: answer([300 + k for k in range(n)]),
    "floats": lambda n: answer([0.5 + k for k in range(n)]),
    "short texts": lambda n: answer([f"{k:03d}" for k in range(n)]),
    "names": lambda n: answer({f"{k}": None for k in range(n // 2)}),
    "tensors": lambda n: answer([], min(n // 10, 4000)),
    "rows": lambda n: bytearray(encode(1, Fetch(StepKey("r", 0, 0, 0, 0, "fetch"), "s" * n))),
    "bytes": lambda n: bytearray(encode(1, Echo(bytes(n)))),
    "operations": lambda n: bytearray(
        encode(1, Do(StepKey("r", 0, 0, 0, 0, "do"), (Assign("x", (Term("a"),)),) * (n // 12)))
    ),
}


@pytest.mark.parametrize("size", [5_000, 8_000, 60_000])
@pytest.mark.parametrize("name", LARGE)
def test_no_frame_takes_much_more_memory_than_it_has_bytes(name: str, size: int) -> None:
    try:
        data = LARGE[name](size)
    except LinkError:
        return  # no header may be that long
    tracemalloc.start()
    try:
        with suppress(LinkError):
            decode(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= 2 * len(data) + (1 << 20)


def test_a_header_of_countless_values_is_refused_before_one_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = answer([[] for _ in range(VALUES + 100)])

    class Reached:
        def decode(self, _: Any) -> Any:
            pytest.fail("the header was decoded")

    assert decode(answer([[] for _ in range(VALUES - 100)])).number == 1
    monkeypatch.setattr(frame, "_READ", Reached())
    with pytest.raises(LinkError, match="values in its header"):
        decode(data)


def test_an_adapter_of_many_tensors_is_still_a_frame() -> None:
    held = {f"base_model.layers.{n}.lora_A.weight": torch.zeros(8, 64) for n in range(1000)}
    key = StepKey("r", 0, 0, 0, 0, "submit")
    data = bytearray(encode(1, Submit(key, {"personal": held}, {}, {}, {})))
    assert len(cast("Submit", decode(data).body).near["personal"]) == 1000


# ---- bytes that are no frame


def refused_or_right(data: bytes) -> None:
    """LinkError and nothing else, or a frame that has just these bytes."""
    try:
        found = decode(bytearray(data))
    except LinkError:
        return
    if b"wire" not in data:
        assert encode(found.number, found.body) == data


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(LinkError):
        decode(bytearray(data))


@given(st.binary(max_size=300))
@example(b"\x91" * 100_000)
@example(b"\xdd\xff\xff\xff\xff")
@example(b"\x83\xa6number\x00")
def test_arbitrary_headers_are_refused(header: bytes) -> None:
    data = MAGIC + len(header).to_bytes(4, "little") + header
    with pytest.raises(LinkError):
        decode(bytearray(data + bytes(-len(data) % ALIGN)))


@settings(max_examples=400)
@given(frames, st.data())
def test_a_frame_that_was_changed_is_refused_or_another_frame(
    whole: bytes, data: st.DataObject
) -> None:
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, max(0, min(len(changed) - 1, 8 + 400))))
        how = data.draw(st.sampled_from(["bit", "byte", "cut", "grow", "out"]))
        if how == "bit":
            changed[at] ^= 1 << data.draw(st.integers(0, 7))
        elif how == "byte":
            changed[at] = data.draw(st.integers(0, 255))
        elif how == "cut":
            del changed[max(1, at) :]
        elif how == "grow":
            changed[at:at] = data.draw(st.binary(min_size=1, max_size=70))
        elif len(changed) > 1:
            del changed[at]
    refused_or_right(bytes(changed))


def put_header(change: Callable[[dict[str, Any]], None], of: Body | None = None) -> bytes:
    """A frame whose header was changed by somebody who knows the format."""
    key = StepKey("r", 0, 0, 0, 1, "backward")
    whole = encode(1, of or Backward(key, torch.ones(2, 3), hidden=True))
    size = int.from_bytes(whole[4:8], "little")
    header = msgspec.msgpack.decode(whole[8 : 8 + size])
    rest = whole[8 + size + -(8 + size) % ALIGN :]
    change(header)
    raw = msgspec.msgpack.encode(header)
    return MAGIC + len(raw).to_bytes(4, "little") + raw + bytes(-(8 + len(raw)) % ALIGN) + rest


BAD_HEADERS: Mapping[str, Callable[[dict[str, Any]], None]] = {
    "a field more": lambda h: h.update(more=1),
    "a field of the body more": lambda h: h["body"].update(more=1),
    "a field of the key more": lambda h: h["body"]["key"].update(more=1),
    "a field less": lambda h: h["body"].pop("hidden"),
    "another class": lambda h: h["body"].update(type="Popen"),
    "an unknown phase": lambda h: h["body"]["key"].update(phase="exec"),
    "text for a number": lambda h: h.update(number="1"),
    "an unknown wire": lambda h: h["body"]["grad"].update(wire="zip"),
    "a wire that it has not": lambda h: h["body"]["grad"].update(wire="int8", dtype="F32"),
    "a type that is none": lambda h: h["body"]["grad"].update(wire="bf16", dtype="I64"),
    "a default spelt out": lambda h: h["body"]["grad"].update(wire="fp32"),
    "a place that is none": lambda h: h["body"]["grad"].update(at={"value": 1}),
    "a place below": lambda h: h["body"]["grad"].update(at={"value": -1}),
    "a wire that changes nothing": lambda h: h["body"]["grad"].update(wire="bf16", dtype="F32"),
    "no tensor at all": lambda h: h["body"]["grad"].update(at={}),
    "a tensor twice": lambda h: h["body"]["grad"].update(at={"value": 0, "scale": 0}),
    "a tensor too many": lambda h: h["tensors"].append(["F32", [0]]),
    "another type": lambda h: h.update(tensors=[["F64", [3]]]),
    "a larger shape": lambda h: h.update(tensors=[["F32", [200, 3]]]),
    "a smaller shape": lambda h: h.update(tensors=[["F32", [0, 3]]]),
    "a negative shape": lambda h: h.update(tensors=[["F32", [-2, -3]]]),
    "a product that overflows": lambda h: h.update(tensors=[["F32", [1 << 40, 1 << 40]]]),
    "an empty one of endless shape": lambda h: h.update(tensors=[["F32", [1 << 62, 0]]]),
    "nine dimensions": lambda h: h.update(tensors=[["F32", [1] * 8 + [6]]]),
    "very many tensors": lambda h: h.update(tensors=[["F32", [0]]] * 5000),
}


@pytest.mark.parametrize("what", BAD_HEADERS)
def test_headers_that_lie_are_refused(what: str) -> None:
    assert decode(bytearray(put_header(lambda h: None)))
    with pytest.raises(LinkError):
        decode(bytearray(put_header(BAD_HEADERS[what])))


def test_a_client_of_another_version_says_a_field_more() -> None:
    """Then both have another protocol, or one of them is no client of this program."""
    said = Hello(1, "1.0", "2.0", "anna", "p")
    with pytest.raises(LinkError, match="no frame of this program"):
        decode(bytearray(put_header(lambda h: h["body"].update(colour="red"), said)))


@pytest.mark.parametrize("wire", WIRES)
def test_padding_is_empty(wire: Wire) -> None:
    key = StepKey("r", 0, 0, 0, 1, "backward")
    whole = encode(1, Backward(key, torch.ones(2, 3, 9), hidden=True), wire)
    size = 8 + int.from_bytes(whole[4:8], "little")
    for at in (size, len(whole) - 1):
        changed = bytearray(whole)
        changed[at] = 1
        with pytest.raises(LinkError, match="nothing belongs"):
            decode(changed)


def test_tensors_stand_in_the_order_of_the_header() -> None:
    def swap(header: dict[str, Any]) -> None:
        held = header["body"]["tensors"]
        held["a"]["at"]["value"], held["b"]["at"]["value"] = 1, 0

    answer = Answer({"a": torch.ones(2), "b": torch.zeros(2)})
    with pytest.raises(LinkError, match="does not speak of"):
        decode(bytearray(put_header(swap, answer)))


def test_truth_values_are_bytes_of_0_and_1() -> None:
    answer = Answer({"mask": torch.ones(3).bool()})
    whole = bytearray(encode(1, answer))
    whole[-ALIGN] = 2
    with pytest.raises(LinkError, match="neither"):
        decode(whole)


def test_facts_are_not_deep_and_have_no_nan() -> None:
    deep: Any = 1
    for _ in range(200):
        deep = [deep]
    for odd in (deep, float("nan"), float("inf")):
        with pytest.raises(LinkError):
            decode(bytearray(encode(1, Answer(facts={"x": odd}))))


def most_bytes(work: Callable[[], object]) -> int:
    """The most that Python objects took at one time while this was refused."""
    tracemalloc.start()
    try:
        with pytest.raises(LinkError):
            work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "tensors",
    [[["F32", [0]]] * 100_000, [["F32", [1] * 400_000]]],
    ids=["very many tensors", "very many dimensions"],
)
def test_a_header_of_many_parts_is_refused_before_they_are_read(tensors: list[Any]) -> None:
    bomb = bytearray(put_header(lambda h: h.update(tensors=tensors)))
    assert len(bomb) > 300_000
    assert most_bytes(lambda: decode(bomb)) < 100_000


def test_a_tensor_that_is_not_there_takes_no_memory() -> None:
    huge = bytearray(put_header(lambda h: h.update(tensors=[["F32", [1 << 30]]])))
    assert most_bytes(lambda: decode(huge)) < 100_000


def test_a_frame_that_is_announced_takes_no_memory_before_it_comes() -> None:
    joiner = Joiner()
    joiner.add((1 << 30).to_bytes(8, "little") + b"x")
    assert most_bytes(lambda: joiner.add(b"")) < 100_000
    assert len(joiner.held) == 1


def test_a_header_has_a_limit() -> None:
    many = Fetch(StepKey("r" * (MAX_HEADER + 1), 0, 0, 0, 1, "fetch"), "s")
    with pytest.raises(LinkError, match="bytes of names"):
        encode(1, many)


def test_a_digest_tells_two_messages_apart() -> None:
    one, two = encode(1, Echo(b"a")), encode(1, Echo(b"b"))
    assert key_digest(one) == key_digest(bytearray(one)) != key_digest(two)


# ---- in pieces


@given(st.lists(st.binary(min_size=1, max_size=200), min_size=1, max_size=4), st.data())
def test_frames_come_whole_however_they_were_cut(whole: list[bytes], data: st.DataObject) -> None:
    """A piece never reaches over the end of a frame, and the first one has the length."""
    joiner, found = Joiner(), list[bytes]()
    for one in whole:
        pieces = cut(len(one).to_bytes(8, "little") + one, data)
        for n, piece in enumerate(pieces):
            came = joiner.add(piece)
            assert (came is not None) == (n == len(pieces) - 1)
            if came is not None:
                found.append(bytes(came))
    assert found == whole


def cut(text: bytes, data: st.DataObject) -> list[bytes]:
    """Cut anywhere behind the length and at least one byte."""
    ends = data.draw(st.sets(st.integers(9, max(9, len(text) - 1)), max_size=12))
    at = [0, *sorted(end for end in ends if end < len(text)), len(text)]
    return [text[a:b] for a, b in pairwise(at)]


@pytest.mark.parametrize(
    "size", [1, CHUNK - 9, CHUNK - 8, CHUNK - 7, CHUNK, 2 * CHUNK - 8, 3 * CHUNK]
)
def test_chunks_and_joiner_are_inverse(size: int) -> None:
    whole, joiner = bytes(range(256)) * (size // 256 + 1), Joiner()
    pieces = list(chunks(whole[:size]))
    assert all(len(p) <= CHUNK for p in pieces)
    assert [joiner.add(p) for p in pieces][-1] == whole[:size]


@pytest.mark.parametrize(
    ("pieces", "why"),
    [
        ([b""], "begins with its length"),
        ([b"1234567"], "begins with its length"),
        ([(5).to_bytes(8, "little")], "do not add up"),
        ([(0).to_bytes(8, "little")], "do not add up"),
        ([(2).to_bytes(8, "little") + b"abc"], "do not add up"),
        ([(5).to_bytes(8, "little") + b"a", b""], "do not add up"),
        ([(5).to_bytes(8, "little") + b"a", b"bcdef"], "do not add up"),
        ([(1001).to_bytes(8, "little") + b"a"], "1001 bytes is longer than the 1000"),
        ([b"\xff" * 9], "is longer than the 1000"),
    ],
)
def test_pieces_that_are_no_frame_are_refused(pieces: list[bytes], why: str) -> None:
    joiner = Joiner(1000)
    with pytest.raises(LinkError, match=why):
        deque(map(joiner.add, pieces))
    assert len(joiner.held) <= 1000


def test_of_a_frame_over_the_limit_nothing_is_kept() -> None:
    joiner = Joiner(1000)
    with pytest.raises(LinkError, match="longer"):
        joiner.add((1 << 30).to_bytes(8, "little") + bytes(CHUNK))
    assert not joiner.held


def test_a_frame_has_not_many_more_pieces_than_mebibytes() -> None:
    joiner = Joiner()
    joiner.add((1 << 20).to_bytes(8, "little") + b"x")
    with pytest.raises(LinkError, match=f"more than {MORE_PIECES + 1} pieces"):
        deque(map(joiner.add, repeat(b"x", 1 << 20)))
    assert len(joiner.held) == MORE_PIECES + 2


def test_only_what_is_known_is_spoken() -> None:
    """The parts that a frame may hold are these, and a test has met all of them."""
    assert {k.__name__ for k in KINDS} >= {"Forward", "Answer", "Hello", "End"}
    assert len(KINDS) == len({k.__name__ for k in KINDS}) == 27
    assert Bye() == decode(bytearray(encode(1, Bye()))).body
