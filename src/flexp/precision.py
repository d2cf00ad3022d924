"""Products with frozen bfloat16 weights, in float32 where the processor is faster that way.

Many processors know bfloat16 and multiply it at half the speed of float32. There a weight is made
wide a tile at a time, so no more memory is taken than a tile's. Both ways sum in float32 and round
once, at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

TILE = 1 << 20  # numbers of a weight that are made wide at a time
FEW = 48  # rows; for fewer it is not worth while


@cache
def wide_is_faster() -> bool:
    """Whether this processor multiplies bfloat16 faster in float32.

    That is so without AMX where torch has to do without bfloat16's own operations, or where they
    run at half the speed of float32's, as on processors by Intel. Of others than x86 it is not
    known. It does not depend on a measurement, so a run repeats.
    """
    found = cast("dict[str, Any]", torch.cpu.get_capabilities())
    if found.get("architecture") != "x86_64" or found.get("amx_bf16"):
        return False
    return not found.get("avx512_bf16") or "Intel" in str(found.get("cpu_name"))


def suits(weight: Tensor) -> bool:
    """Whether products with this weight are to be made in float32."""
    narrow = weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
    return narrow and not weight.requires_grad and wide_is_faster()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x`` [..., in] times a frozen ``weight`` [out, in], as ``functional.linear`` has it."""
    if x.numel() < FEW * x.shape[-1] or not suits(weight):
        return functional.linear(x, weight, bias)
    return cast(Tensor, _Wide.apply(x, weight, bias))  # pyright: ignore[reportUnknownMemberType]


def widen(model: nn.Module) -> None:
    """Lets a frozen model's linear maps, on the instances, make their products as ``product``."""
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype == torch.bfloat16:
            cast(Any, module).forward = partial(_forward, module)


def _forward(module: nn.Linear, x: Tensor) -> Tensor:
    return product(x, module.weight, module.bias)


class _Wide(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, None, None]:
        (weight,) = cast("tuple[Tensor]", ctx.saved_tensors)
        return _back(grads[0], weight), None, None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = x.float()
    parts = [functional.linear(wide, weight[rows].float()) for rows in _tiles(weight)]
    out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return (out if bias is None else out.add_(bias)).to(x.dtype)


def _back(grad: Tensor, weight: Tensor) -> Tensor:
    out: Tensor | None = None
    for rows in _tiles(weight):
        part = grad[..., rows].float() @ weight[rows].float()
        out = part if out is None else out.add_(part)
    assert out is not None
    return out.to(weight.dtype)


def _tiles(weight: Tensor) -> Iterator[slice]:
    """Rows of a weight, a tile at a time."""
    rows = max(1, TILE // max(1, weight.shape[1]))
    return (slice(at, at + rows) for at in range(0, len(weight), rows))
