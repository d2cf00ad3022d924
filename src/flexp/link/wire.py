"""How hidden states, logits and their gradients travel: rounded to fewer bytes, or as they are.

What is packed is told by a tensor's name; masks, labels, losses, coefficients and adapters never
are. Nothing is packed that would not become smaller: a bf16 tensor under "fp16" stays bf16, and a
single number (a loss's gradient), an empty tensor and whole numbers stay what they are.

"int8" has a scale for each vector of the last dimension, "int8-group" one for every 64 values of
it. Scales are bf16: gradients are too small for fp16's range, and the product of a scale and an
int8 has at most 15 bits, so it is exact in fp32 and packing once more changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from flexp.errors import LinkError
from flexp.tensors import Tensors

Wire = Literal["fp32", "bf16", "fp16", "int8", "int8-group"]
Parts = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

PACKED = frozenset({"hidden", "logits", "grad"})  # names of messages' and answers' tensors
GROUP = 64  # values of the last dimension that share a scale
MOST = 127  # the largest int8 in use: the range is symmetric
_SMALL: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Scales of all-zero rows must not be zero, and 127 times the largest must be finite.
_LEAST = torch.finfo(torch.bfloat16).smallest_normal
_LARGEST = 1.0078125 * 2.0**121


def parts_of(shape: tuple[int, ...], dtype: torch.dtype, wire: Wire) -> Parts:
    """What a tensor becomes under a wire, by name: each part's dtype and shape.

    >>> parts_of((2, 9, 100), torch.float32, "int8-group")["scale"]
    (torch.bfloat16, (2, 9, 2))
    """
    whole: Parts = {"value": (dtype, shape)}
    if wire == "fp32" or not dtype.is_floating_point or not shape:
        return whole
    if wire in _SMALL:
        packed: Parts = {"value": (_SMALL[wire], shape)}
    else:
        groups = 1 if wire == "int8" else -(-shape[-1] // GROUP)
        packed = {"int8": (torch.int8, shape), "scale": (torch.bfloat16, (*shape[:-1], groups))}
    return packed if _size(packed) < _size(whole) else whole


def packed_bytes(shape: tuple[int, ...], dtype: torch.dtype, wire: Wire) -> int:
    """Bytes that cross for a tensor that is packed.

    >>> packed_bytes((2, 9, 100), torch.float32, "int8-group") / 7200
    0.26
    """
    return _size(parts_of(shape, dtype, wire))


def crossing_bytes(name: str, tensor: Tensor, wire: Wire) -> int:
    """Bytes that cross for a named tensor of a message or an answer."""
    return packed_bytes(tuple(tensor.shape), tensor.dtype, wire if name in PACKED else "fp32")


def pack(tensor: Tensor, wire: Wire, *, name: str = "tensor") -> dict[str, Tensor]:
    """The parts that cross, as ``parts_of`` says; the tensor itself where nothing is to be done.

    Under bf16 and fp16, finite values beyond the range become its ends; NaN and infinity stay.
    Under int8 one of those would spoil its whole row: LinkError names the tensor.
    """
    parts = parts_of(tuple(tensor.shape), tensor.dtype, wire)
    if "value" in parts:
        return {"value": _narrow(tensor, parts["value"][0])}
    rows = _grouped(tensor.detach().float(), wire)
    most = rows.abs().amax(-1, keepdim=True)
    if not bool(torch.isfinite(most).all()):
        raise LinkError(
            f'"{name}" has NaN or infinity, which link.wire "{wire}" cannot carry. Lower the '
            "learning rate or set train.clip_norm, or link.wire to bf16."
        )
    scale = (most / MOST).clamp_(_LEAST, _LARGEST).bfloat16()
    levels = (rows / scale.float()).round_().to(torch.int8).flatten(-2)
    return {"int8": levels[..., : tensor.shape[-1]].contiguous(), "scale": scale.squeeze(-1)}


def unpack(parts: Mapping[str, Tensor], wire: Wire, dtype: torch.dtype) -> Tensor:
    """The tensor that arrives, in ``dtype``: the same bits on both sides of a link.

    LinkError if the parts are none that ``pack`` makes.
    """
    if set(parts) == {"value"}:
        value = parts["value"]
        return value.to(dtype) if value.dtype.is_floating_point else value
    small = parts.get("int8", torch.empty(0))
    wanted = parts_of(tuple(small.shape), torch.float64, wire)  # never packed in vain
    found = {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()}
    if found != wanted:
        raise LinkError(
            f'These are not the parts of a tensor under link.wire "{wire}": {found}. Both sides '
            "must run the same recipe."
        )
    rows = _grouped(small.float(), wire).mul_(parts["scale"].float().unsqueeze(-1))
    return _narrow(rows.flatten(-2)[..., : small.shape[-1]], dtype)


def crossed(tensors: Mapping[str, Tensor], wire: Wire) -> Tensors:
    """Named tensors as they arrive at the other end."""
    return {name: arrived(name, t, wire) if name in PACKED else t for name, t in tensors.items()}


def arrived(name: str, tensor: Tensor, wire: Wire) -> Tensor:
    """A tensor that is packed, as it arrives at the other end."""
    return unpack(pack(tensor, wire, name=name), wire, tensor.dtype)


def _narrow(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype, what overflows at the end of its range; itself if it has it."""
    if tensor.dtype == dtype:
        return tensor
    small, most = tensor.to(dtype), torch.finfo(dtype).max
    if not bool(tensor.abs().amax() <= most):  # or something is NaN
        ends = torch.full_like(small, most).copysign(small)
        small = torch.where(small.isinf() & tensor.isfinite(), ends, small)
    return small


def _grouped(tensor: Tensor, wire: Wire) -> Tensor:
    """The last dimension as groups that share a scale, the last one filled up with zeros."""
    width = tensor.shape[-1]
    size = width if wire == "int8" else GROUP
    short = -width % size
    filled = functional.pad(tensor, (0, short)) if short else tensor
    return filled.reshape(*filled.shape[:-1], -1, size)


def _size(parts: Parts) -> int:
    return sum(prod(shape) * dtype.itemsize for dtype, shape in parts.values())
