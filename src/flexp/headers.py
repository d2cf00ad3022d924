"""Headers of safetensors files, checked before any parser sees the file.

A safetensors file cannot run code, but a legal header of many empty tensors keeps a parser busy for
seconds, and a crafted one can lie about sizes. Whoever opens such a file asks here first: its
header must be small, and its tensors must fill the rest without a gap or an overlap.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from flexp.errors import ParcelError

MAX_NAME = 512  # characters
MAX_DIMS = 8
_MAX_NUMEL = 1 << 48  # with zero dimensions counted as one, so that no product overflows
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_INDEX = 1 << 26  # bytes of JSON

BITS: Mapping[str, int] = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8"), 8),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


@dataclass(frozen=True)
class Caps:
    """What a file may have: bytes of its header, opening braces in it, tensors, and their types.

    Every tensor takes a brace, so braces bound the tensors before anything is parsed.
    """

    header: int
    braces: int
    tensors: int
    types: frozenset[str]


# Metadata of a parcel are facts, with braces of their own; its header is short enough to be parsed.
PARCEL = Caps(1 << 20, 1 << 20, 4096, frozenset({"F32", "F16", "BF16", "I64", "I32", "U8", "BOOL"}))
# Qwen3-30B-A3B has 18 867 tensors in all, Kimi-K2 about 2 400 in each file: a file of 32 768, with
# a header of 8 MiB, is larger than any that a model is known to be spread over.
MODEL = Caps(1 << 23, (1 << 15) + 2, 1 << 15, frozenset(BITS))


@dataclass(frozen=True)
class Span:
    """One tensor: its type, its shape, and where it lies behind the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Table:
    """A checked header: where it ends in the file, the tensors by name, and the metadata."""

    start: int
    spans: Mapping[str, Span]
    notes: Mapping[str, str]


def length(first: bytes, total: int, caps: Caps) -> int:
    """The length of the header that the first 8 bytes announce; ParcelError if it cannot be."""
    size = int.from_bytes(first, "little")
    if total < 10 or size > min(caps.header, total - 8):
        raise ParcelError(
            f"{total} bytes announce a header of {size}, where at most {caps.header} are allowed: "
            "cut short, too big, or something else. Ask for them again."
        )
    return size


def read(file: IO[bytes], total: int, caps: Caps) -> Table:
    """The header at the beginning of a file of ``total`` bytes; ParcelError if anything is odd.

    Nothing is read of a header that is too long, and nothing behind one.
    """
    size = length(file.read(8), total, caps)
    text = file.read(size)
    if len(text) != size or text.count(b"{") > caps.braces:
        raise ParcelError(
            f"The header has more than {caps.tensors} tensors, or it was cut short while it was "
            "read. Ask for the bytes again."
        )
    try:
        header = strict_json(text.decode())
    except UnicodeDecodeError as error:
        raise ParcelError("The header is not text. Ask for the bytes again.") from error
    if not isinstance(header, dict) or text[:1] != b"{":
        raise ParcelError("The header is not an object. Ask for the bytes again.")
    return _checked(cast("dict[str, Any]", header), 8 + size, total, caps)


def of_file(path: Path, caps: Caps = MODEL) -> Table:
    """The header of a file; ParcelError names the file."""
    try:
        if not path.is_file():
            raise ParcelError("There is no such file. Check the path.")
        with path.open("rb") as file:
            return read(file, os.fstat(file.fileno()).st_size, caps)
    except OSError as error:
        raise ParcelError(f'"{path}" cannot be read: {error.strerror}. Check the path.') from error
    except ParcelError as error:
        raise ParcelError(f'"{path}" is not a usable safetensors file: {error}') from error


def shards(folder: Path) -> list[Path]:
    """The files with a model's tensors: the one file, else those that its index names, else all.

    ParcelError unless the index names files of the folder itself.
    """
    index, single = folder / INDEX, folder / SINGLE
    if single.is_file():  # the library looks no further
        return [single]
    if not index.is_file():
        every = folder.glob("*.safetensors")
        return sorted(p for p in every if not p.name.startswith("consolidated"))
    try:
        if index.stat().st_size > MAX_INDEX:
            raise ValueError(f"it has more than {MAX_INDEX} bytes")
        listed = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        if odd := [name for name in listed if not is_file_name(name)]:
            raise ValueError(f"{odd[0]!r:.80} is no name of a file in its folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ParcelError(f"{index.name} is not a list of shards: {error!s:.200}.") from error
    return [folder / name for name in sorted(listed)]


def is_file_name(name: object) -> bool:
    """Whether this names a file of a folder itself, and none that is hidden, on any system.

    >>> [is_file_name(n) for n in ("a.safetensors", "", "..", "a/b", "c:\\\\d", 3)]
    [True, False, False, False, False, False]
    """
    if not isinstance(name, str) or not name.isprintable():
        return False
    return bool(name) and not name.startswith(".") and not set(name) & set("/\\:")


def of_model(folder: Path) -> dict[Path, Table]:
    """The headers of a model's files; ParcelError names one that is odd, also of those beside."""
    listed = shards(folder)
    found = {path: of_file(path) for path in sorted({*listed, *folder.glob("*.safetensors")})}
    return {path: found[path] for path in listed}


def strict_json(text: str) -> Any:
    """The value of a JSON text without repeated names, NaN and Infinity; else a ParcelError.

    >>> strict_json('{"rows": 12}')
    {'rows': 12}
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("a name occurs twice")
        return found

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ParcelError(f"The header cannot be read: {error}.") from error


def check_name(name: str) -> None:
    """ParcelError unless the name of a tensor is short enough and valid text."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ParcelError(f"Tensor name {name!r:.80} is not valid text. Rename it.") from error
    if not 0 < len(name) <= MAX_NAME:
        raise ParcelError(
            f'Tensor name "{name:.80}" has {len(name)} characters, prefix included. '
            f"Use 1 to {MAX_NAME}."
        )


def _checked(header: dict[str, Any], start: int, total: int, caps: Caps) -> Table:
    metadata = header.pop("__metadata__", {})
    notes = cast("dict[str, object]", metadata) if isinstance(metadata, dict) else {"": None}
    if not all(isinstance(note, str) for note in notes.values()):
        raise ParcelError("The metadata is not a table of texts.")
    if len(header) > caps.tensors:
        raise ParcelError(f"The header has {len(header)} tensors; at most {caps.tensors} may be.")
    spans = {name: _span(name, info, total - start, caps) for name, info in header.items()}
    _fill(list(spans.values()), total - start)
    return Table(start, spans, cast("dict[str, str]", notes))


def _span(name: str, info: object, size: int, caps: Caps) -> Span:
    """One tensor, after its name, dtype, shape and extent have been checked."""
    check_name(name)
    fields: Mapping[str, Any] = cast("dict[str, Any]", info) if isinstance(info, dict) else {}
    if fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise ParcelError(f'Tensor "{name:.80}" has no dtype, shape and offsets.')
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    known = isinstance(dtype, str) and dtype in caps.types
    if not known or not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise ParcelError(
            f'Tensor "{name:.80}" has a dtype, shape or offsets that are not allowed. '
            f"Allowed dtypes: {', '.join(sorted(caps.types))}."
        )
    small = len(shape) <= MAX_DIMS and math.prod(max(n, 1) for n in shape) <= _MAX_NUMEL
    begin, end = offsets
    if not small or end > size or 8 * (end - begin) != math.prod(shape) * BITS[dtype]:
        raise ParcelError(f'Tensor "{name:.80}" has a shape that does not fit its bytes.')
    return Span(dtype, tuple(shape), begin, end)


def _naturals(value: object) -> bool:
    """Whether this is a list of whole numbers from 0 (and no booleans)."""
    items = cast("list[object]", value) if isinstance(value, list) else [None]
    return all(type(n) is int and n >= 0 for n in items)


def _fill(spans: list[Span], size: int) -> None:
    """The tensors must fill the buffer without a gap or an overlap."""
    at = 0
    for begin, end in sorted((span.begin, span.end) for span in spans):
        if begin != at:
            raise ParcelError(f"The tensors leave a gap or overlap at byte {min(begin, at)}.")
        at = end
    if at != size:
        raise ParcelError(f"The tensors end at byte {at} of {size}. Ask for the bytes again.")
