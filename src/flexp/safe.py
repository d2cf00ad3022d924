"""Tensors of safetensors bytes, whose header has been checked before a parser sees them."""

from __future__ import annotations

import io

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse
from torch import Tensor

from flexp import headers
from flexp.errors import ParcelError
from flexp.tensors import Tensors

MAX_BYTES = 1 << 30
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
    """Tensors and metadata of a parcel's bytes; ParcelError if anything about them is odd.

    >>> from safetensors.torch import save
    >>> tensors_in(save({"w": torch.ones(2)}, {"made": "here"}))
    ({'w': tensor([1., 1.])}, {'made': 'here'})
    """
    if len(data) > limit:
        raise ParcelError(f"{len(data)} bytes are more than the limit of {limit}.")
    table = headers.read(io.BytesIO(data), len(data), headers.PARCEL)
    try:
        tensors = parse(bytes(data))
    except SafetensorError as error:
        raise ParcelError(f"These bytes are not safetensors: {error}.") from error
    for name, tensor in tensors.items():
        if tensor.dtype is torch.bool and tensor.numel() and flat_bytes(tensor).max() > 1:
            raise ParcelError(f'Tensor "{name}" holds bytes that are neither true nor false.')
    # The parser gives them in any order, and sums of tensors would depend on it.
    return dict(sorted(tensors.items())), dict(table.notes)


def flat_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor as a flat uint8 tensor."""
    return tensor.reshape(-1).view(torch.uint8)
