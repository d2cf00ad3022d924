"""Bytes of safetensors, checked before a parser sees them.

A safetensors file cannot run code, but a legal header can keep the parser busy for seconds and a
crafted one can lie about sizes. ``tensors_in`` accepts only what is small, dense and consistent.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse
from torch import Tensor

from flexp.errors import ParcelError
from flexp.tensors import Tensors

MAX_BYTES = 1 << 30
MAX_HEADER = 1 << 20  # bytes of JSON
MAX_TENSORS = 4096
MAX_NAME = 512  # characters
MAX_DIMS = 8
_MAX_NUMEL = 1 << 48  # with zero dimensions counted as one, so that no product overflows
_TYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in _TYPES.items()}


def tensors_in(data: bytes, *, limit: int = MAX_BYTES) -> tuple[Tensors, dict[str, str]]:
    """Tensors and metadata of a safetensors file; ParcelError if anything about it is odd.

    >>> from safetensors.torch import save
    >>> tensors_in(save({"w": torch.ones(2)}, {"made": "here"}))
    ({'w': tensor([1., 1.])}, {'made': 'here'})
    """
    header = _header(data, limit)
    metadata = header.pop("__metadata__", {})
    notes = cast("dict[str, object]", metadata) if isinstance(metadata, dict) else {"": None}
    if not all(isinstance(note, str) for note in notes.values()):
        raise ParcelError("The metadata is not a table of texts.")
    size = len(data) - 8 - int.from_bytes(data[:8], "little")
    _fill([_span(name, info, size) for name, info in header.items()], size)
    try:
        tensors = parse(bytes(data))
    except SafetensorError as error:
        raise ParcelError(f"These bytes are not safetensors: {error}.") from error
    for name, tensor in tensors.items():
        if tensor.dtype is torch.bool and tensor.numel() and flat_bytes(tensor).max() > 1:
            raise ParcelError(f'Tensor "{name}" holds bytes that are neither true nor false.')
    # The parser gives them in any order, and sums of tensors would depend on it.
    return dict(sorted(tensors.items())), cast("dict[str, str]", notes)


def flat_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor as a flat uint8 tensor."""
    return tensor.reshape(-1).view(torch.uint8)


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


def _header(data: bytes, limit: int) -> dict[str, Any]:
    if len(data) > limit:
        raise ParcelError(f"{len(data)} bytes are more than the limit of {limit}.")
    size = int.from_bytes(data[:8], "little")
    if len(data) < 10 or size > min(MAX_HEADER, len(data) - 8):
        raise ParcelError(
            f"{len(data)} bytes announce a header of {size}: cut short, too big, or something "
            "else. Ask for them again."
        )
    try:
        header = strict_json(bytes(data[8 : 8 + size]).decode())
    except UnicodeDecodeError as error:
        raise ParcelError("The header is not text. Ask for the bytes again.") from error
    if not isinstance(header, dict) or len(cast("dict[str, Any]", header)) > MAX_TENSORS + 1:
        raise ParcelError(f"The header is not an object of at most {MAX_TENSORS} tensors.")
    return cast("dict[str, Any]", header)


def _span(name: str, info: object, size: int) -> tuple[int, int]:
    """Begin and end of one tensor, after its name, dtype, shape and extent have been checked."""
    check_name(name)
    fields: Mapping[str, Any] = cast("dict[str, Any]", info) if isinstance(info, dict) else {}
    if fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise ParcelError(f'Tensor "{name:.80}" has no dtype, shape and offsets.')
    shape, offsets = fields["shape"], fields["data_offsets"]
    dtype = _TYPES.get(fields["dtype"]) if isinstance(fields["dtype"], str) else None
    if dtype is None or not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise ParcelError(
            f'Tensor "{name:.80}" has a dtype, shape or offsets that are not allowed. '
            f"Allowed dtypes: {', '.join(_TYPES)}."
        )
    small = len(shape) <= MAX_DIMS and math.prod(max(n, 1) for n in shape) <= _MAX_NUMEL
    begin, end = offsets
    if not small or end > size or end - begin != math.prod(shape) * dtype.itemsize:
        raise ParcelError(f'Tensor "{name:.80}" has a shape that does not fit its bytes.')
    return begin, end


def _naturals(value: object) -> bool:
    """Whether this is a list of whole numbers from 0 (and no booleans)."""
    items = cast("list[object]", value) if isinstance(value, list) else [None]
    return all(type(n) is int and n >= 0 for n in items)


def _fill(spans: list[tuple[int, int]], size: int) -> None:
    """The tensors must fill the buffer without a gap or an overlap."""
    at = 0
    for begin, end in sorted(spans):
        if begin != at:
            raise ParcelError(f"The tensors leave a gap or overlap at byte {min(begin, at)}.")
        at = end
    if at != size:
        raise ParcelError(f"The tensors end at byte {at} of {size}. Ask for the bytes again.")
