"""What a forward wears: adapters resolved to tensors per module, applied by the module's own path.

Two instance-level replacements, made once per backbone: linears inside blocks and leaves of the
head look into the present pass for what they wear. Without a pass they are what they were. The
order of operations is PEFT's, so a worn adapter and PEFT's wrapper agree to the last bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flexp.dice import Dice
from flexp.tensors import Tensors

PREFIX = "base_model.model."

Coef = Callable[[str], float | Tensor]  # by module path


@dataclass(frozen=True)
class Factors:
    """One LoRA pair, A (r, in) and B (out, r); ``magnitude`` (out,) makes it DoRA."""

    a: Tensor
    b: Tensor
    scaling: float
    magnitude: Tensor | None = None


@dataclass(frozen=True)
class Worn:
    """Adapters of one forward, by module path; or, per group of rows, other adapters."""

    factors: Mapping[str, tuple[Factors, ...]] = field(
        default_factory=dict[str, tuple[Factors, ...]]
    )
    scales: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    direct: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict[str, Tensors])
    prompt: Tensor | None = None
    dropout: float = 0.0
    dice: Dice | None = None
    groups: tuple[tuple[Worn, Tensor], ...] = ()


def read(adapter: Mapping[str, Tensor], alpha: float) -> Worn:
    """Sorts the tensors of one adapter by module path and kind, by PEFT's names alone."""
    factors: dict[str, tuple[Factors, ...]] = {}
    scales: dict[str, Tensor] = {}
    direct: dict[str, Tensors] = {}
    prompt: Tensor | None = None
    for name, value in adapter.items():
        path = name.removeprefix(PREFIX)
        if name == "prompt_embeddings":
            prompt = value
        elif ".lora_A." in path:
            stem = path.split(".lora_A.")[0]
            b = adapter[name.replace(".lora_A.", ".lora_B.")]
            magnitude = adapter.get(f"{PREFIX}{stem}.lora_magnitude_vector")
            factors[stem] = (Factors(value, b, alpha / value.shape[0], magnitude),)
        elif path.endswith(".ia3_l"):
            scales[path.removesuffix(".ia3_l")] = value
        elif ".lora_" not in path:
            stem, _, leaf = path.rpartition(".")
            direct.setdefault(stem, {})[leaf] = value
    return Worn(factors, scales, direct, prompt)


def stacked(many: list[tuple[Worn, Coef]]) -> Worn:
    """LoRA products summed, each with its own coefficient; direct parameters summed likewise."""
    factors: dict[str, tuple[Factors, ...]] = {}
    direct: dict[str, Tensors] = {}
    for worn, coef in many:
        for path, pairs in worn.factors.items():
            mine = tuple(Factors(p.a, p.b * coef(path), p.scaling, p.magnitude) for p in pairs)
            factors[path] = factors.get(path, ()) + mine
        for path, leaves in worn.direct.items():
            held = direct.setdefault(path, {})
            for leaf, value in leaves.items():
                x = value * coef(path)
                held[leaf] = held[leaf] + x if leaf in held else x
    return Worn(factors, {}, direct)


def lengths(matrix: Tensor) -> Tensor:
    """The Euclidean length of each row."""
    return torch.linalg.norm(matrix, dim=1)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


class Wearing:
    """Replaces ``module.forward`` on the instance and applies what the present pass wears here."""

    def __init__(self, module: nn.Module, path: str, now: Callable[[], Worn | None]) -> None:
        self.plain: Callable[..., Tensor] = module.forward
        self.module, self.path, self.now = module, path, now
        self.transposed = not isinstance(module, nn.Linear)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        worn = self.now()
        if worn is None or args or kwargs:
            return self.plain(x, *args, **kwargs)
        if not worn.groups:
            return self.apply(x, worn)
        parts = [self.apply(x[rows], one) for one, rows in worn.groups]
        order = torch.cat([rows for _, rows in worn.groups])
        return torch.cat(parts)[torch.argsort(order)]

    def apply(self, x: Tensor, worn: Worn) -> Tensor:
        """The module's output for rows that all wear the same."""
        scale = worn.scales.get(self.path)
        if scale is not None and scale.shape[0] == 1:
            x = x * scale.flatten()
        out = self._base(x, worn.direct.get(self.path))
        if scale is not None and scale.shape[0] != 1:
            out = out * scale.flatten()
        for pair in worn.factors.get(self.path, ()):
            low = self._dropped(x.to(pair.a.dtype), worn)
            out = (out + self._lora(low, out, pair)).to(out.dtype)
        return out

    def _base(self, x: Tensor, direct: Mapping[str, Tensor] | None) -> Tensor:
        if direct is None:
            return self.plain(x)
        # A shallow copy of the leaf runs its class's own forward: other threads keep the original.
        shadow = copy.copy(self.module)
        shadow.__dict__["_parameters"] = {**self.module.__dict__["_parameters"], **direct}
        shadow.__dict__.pop("forward", None)
        wide = next(iter(direct.values())).dtype  # trained in fp32 on a bf16 backbone
        return type(self.module).forward(shadow, x.to(wide)).to(x.dtype)

    def _dropped(self, x: Tensor, worn: Worn) -> Tensor:
        if worn.dropout == 0.0 or worn.dice is None:
            return x
        keep = torch.rand(x.shape, generator=worn.dice("layer", path=self.path).generator())
        return x * (keep.to(x.device) >= worn.dropout) / (1.0 - worn.dropout)

    def _lora(self, x: Tensor, base: Tensor, pair: Factors) -> Tensor:
        low = F.linear(F.linear(x, pair.a), pair.b)
        if pair.magnitude is None:
            return low * pair.scaling
        weight: Tensor = self.module.get_parameter("weight")
        weight = weight.T if self.transposed else weight
        eye = torch.eye(pair.a.shape[1], dtype=pair.a.dtype, device=pair.a.device)
        product = F.linear(F.linear(eye, pair.a), pair.b).T
        length = lengths(weight + pair.scaling * product.detach())
        ratio = (pair.magnitude / length).view(1, -1)
        bias: Tensor | None = getattr(self.module, "bias", None)
        plain = base if bias is None else base - bias
        return (ratio - 1) * plain + ratio * low * pair.scaling
