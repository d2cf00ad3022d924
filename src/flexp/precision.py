"""Products with frozen narrow weights, made wide a tile at a time.

Many processors know bfloat16 and multiply it at half the speed of float32. There such a weight is
made wide, and quantized ones are everywhere, a tile at a time, so no more memory is taken than a
tile's. Both ways sum in float32 and round once, at the end.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from flexp.quantized import Quantized, tiles

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


def product(x: Tensor, weight: Tensor | Quantized, bias: Tensor | None = None) -> Tensor:
    """``x`` [..., in] times a frozen ``weight`` [out, in], as ``functional.linear`` has it."""
    if isinstance(weight, Tensor) and (x.numel() < FEW * x.shape[-1] or not suits(weight)):
        return functional.linear(x, weight, bias)
    return cast(Tensor, _Wide.apply(x, weight, bias))  # pyright: ignore[reportUnknownMemberType]


def in_full(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same product of a float32 result that was never rounded, outside of the graph."""
    if suits(weight):
        return _product(x.float(), weight, bias)
    return functional.linear(x, weight, bias).float()


def back_in_full(slope: Tensor, weight: Tensor) -> Tensor:
    """The gradient of ``x`` from the float32 one of that result."""
    return _back(slope, weight) if suits(weight) else slope.to(weight.dtype) @ weight


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
        ctx: Any, x: Tensor, weight: Tensor | Quantized, bias: Tensor | None
    ) -> Tensor:
        ctx.weight = weight  # frozen, so nothing can change it before the backward
        return _product(x, weight, bias)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, None, None]:
        return _back(grads[0], ctx.weight), None, None


def _product(x: Tensor, weight: Tensor | Quantized, bias: Tensor | None) -> Tensor:
    wide = x.to(_wide_type(x)).reshape(-1, x.shape[-1])
    out = wide.new_empty(len(wide), weight.shape[0])
    for rows in tiles(weight.shape):
        torch.mm(wide, _tile(weight, rows, wide).T, out=out[:, rows])
    if bias is not None:
        out.add_(bias.to(wide.dtype))
    return out.to(x.dtype).reshape(*x.shape[:-1], -1)


def _back(grad: Tensor, weight: Tensor | Quantized) -> Tensor:
    out: Tensor | None = None
    wide = grad.to(_wide_type(grad))
    total = torch.promote_types(wide.dtype, torch.float32)
    for rows in tiles(weight.shape):
        part = (wide[..., rows] @ _tile(weight, rows, wide)).to(total)
        out = part if out is None else out.add_(part)
    assert out is not None
    return out.to(grad.dtype)


def _tile(weight: Tensor | Quantized, rows: slice, like: Tensor) -> Tensor:
    tile = weight[rows] if isinstance(weight, Tensor) else weight.tile(rows)
    return tile.to(like.dtype)


def _wide_type(x: Tensor) -> torch.dtype:
    """In which type something is multiplied by a tile."""
    slow = x.dtype == torch.bfloat16 and x.device.type == "cpu" and wide_is_faster()
    return torch.float32 if slow else x.dtype
