"""Faster ways to compute what a model's own code computes, set on the instances of its modules."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from flexp import libraries
from flexp.precision import widen

WIDE = "sdpa_in_float32"  # its name among the library's ways to attend
AGREES = 1e-6  # of two ways to compute an activation, absolute, for inputs up to ``REACH``
REACH = 6.0


def settle(model: nn.Module, *, fast: bool) -> None:
    """Products and attention of bfloat16 where they are fastest; in mode fast, what is fused."""
    widen(model)
    attend_wide(model)
    if fast:
        fuse(model)


def attend_wide(model: nn.Module) -> None:
    """Lets a model of bfloat16 attend in float32 where it runs on a processor.

    Torch's kernel takes three to seven times as long for the gradient in bfloat16. The result is
    rounded once, at the end. Models whose attention is not the library's stay as they are.
    """
    config = cast(Any, model).config
    narrow = next(model.parameters()).dtype == torch.bfloat16
    if not narrow or getattr(config, "_attn_implementation", "") != "sdpa":
        return
    hf = libraries.transformers()
    known = hf.AttentionInterface()
    if WIDE not in known:
        hf.AttentionInterface.register(WIDE, partial(_attend, known["sdpa"]))
        hf.AttentionMaskInterface.register(WIDE, hf.AttentionMaskInterface()["sdpa"])
    told = cast(Any, model)
    if told._can_set_attn_implementation():  # noqa: SLF001 else it warns, and nothing is set
        told.set_attn_implementation(WIDE)


def _attend(attend: Any, module: nn.Module, *given: Tensor | None, **more: Any) -> Any:
    """``given``: queries, keys, values [rows, heads, length, width], and a mask."""
    query = cast(Tensor, given[0])
    if query.device.type != "cpu" or query.dtype != torch.bfloat16:
        return attend(module, *given, **more)
    named = {name: _wide(x) for name, x in more.items()}
    return attend(module, *map(_wide, given), **named)[0].to(query.dtype), None


def _wide(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x


def fuse(model: nn.Module) -> None:
    """Makes activations that are written out in Python one operation of torch's.

    Which ones they are is found by trying: a leaf without parameters that computes what torch's
    does, though not to the last bit.
    """
    for module in model.modules():
        if found := _fused(module):
            cast(Any, module).forward = found


def _fused(module: nn.Module) -> Any:
    bare = not any(True for held in (module.children(), module.parameters()) for _ in held)
    if not bare or list(module.buffers()) or type(module).__module__.startswith("torch."):
        return None
    x = torch.linspace(-REACH, REACH, 241)
    try:
        with torch.no_grad():
            out = module(x)
    except Exception:  # noqa: BLE001 it is no function of one tensor, whatever it says to that
        return None
    for form in ("tanh", "none"):
        ours = partial(functional.gelu, approximate=form)
        if isinstance(out, Tensor) and out.shape == x.shape and _agree(out, ours(x)):
            return ours
    return None


def _agree(out: Tensor, ours: Tensor) -> bool:
    return bool(torch.allclose(out, ours, rtol=0.0, atol=AGREES))
