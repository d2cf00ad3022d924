"""Applies what the present pass wears, by the module's own path.

Two instance-level replacements, made once per backbone: linears inside blocks and leaves of the
head look into the present pass for what they wear. Without a pass they are what they were. The
order of operations is PEFT's, so a worn adapter and PEFT's wrapper agree to the last bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flexp.model import colora
from flexp.model.worn import Factors, Groups, Worn


def stacked_factors(worn: Sequence[tuple[Factors, ...]]) -> tuple[Tensor, Tensor, Tensor | None]:
    """A [groups, rank, in] and B [groups, out, rank] of all groups, short ranks filled with zeros.

    Scalings [groups, 1, rank] come beside them, or None if there is one for all.
    """
    if all(len(pairs) == 1 for pairs in worn):
        alike = {(p.a.shape, p.scaling) for (p,) in worn}
        if len(alike) == 1:
            return torch.stack([p.a for (p,) in worn]), torch.stack([p.b for (p,) in worn]), None
    some = next(pair for pairs in worn for pair in pairs)
    most = max(sum(len(p.a) for p in pairs) for pairs in worn)
    a, b, scales = list[Tensor](), list[Tensor](), list[Tensor]()
    for pairs in worn:
        rank = sum(len(p.a) for p in pairs)
        a.append(
            torch.cat([*(p.a for p in pairs), some.a.new_zeros(most - rank, *some.a.shape[1:])])
        )
        b.append(torch.cat([*(p.b for p in pairs), some.b.new_zeros(len(some.b), most - rank)], 1))
        scales.append(
            torch.cat(
                [
                    *(p.a.new_full((len(p.a),), p.scaling) for p in pairs),
                    some.a.new_zeros(most - rank),
                ]
            )
        )
    return torch.stack(a), torch.stack(b), torch.stack(scales)[:, None]


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
        if worn.groups is None:
            return self.apply(x, worn)
        if all(self._only_factors(group.worn) for group in worn.groups.held):
            return self._together(x, worn.groups)
        parts = [self.apply(x[group.rows], group.worn) for group in worn.groups.held]
        order = torch.cat([group.rows for group in worn.groups.held])
        return torch.cat(parts)[torch.argsort(order)]

    def apply(self, x: Tensor, worn: Worn) -> Tensor:
        """The module's output for rows that all wear the same."""
        scale = worn.scales.get(self.path)
        if scale is not None and scale.shape[0] == 1:
            x = x * scale.flatten()
        out = self._base(x, worn.direct.get(self.path))
        if scale is not None and scale.shape[0] != 1:
            out = out * scale.flatten()
        pairs = worn.factors.get(self.path, ())
        open_to = self._gate(x, worn) if pairs and pairs[0].gate is not None else None
        for pair in pairs:
            low = self._dropped(x.to(pair.a.dtype), worn)
            more = self._lora(low, out, pair)
            if open_to is not None:
                more = more * (1 - open_to if pair.rest else open_to)
            out = (out + more).to(out.dtype)
        return out

    def _gate(self, x: Tensor, worn: Worn) -> Tensor:
        dice = None if worn.dice is None else worn.dice("gate", path=self.path)
        return colora.gate(x, worn.gates[self.path], worn.mask, worn.noise, dice)

    def _only_factors(self, worn: Worn) -> bool:
        """Whether nothing is worn here but LoRA pairs, or nothing at all."""
        pairs = worn.factors.get(self.path, ())
        plain = self.path not in worn.scales and self.path not in worn.direct
        return plain and all(pair.plain for pair in pairs)

    def _together(self, x: Tensor, groups: Groups) -> Tensor:
        """One frozen product for all rows, and one batched product with their groups' factors."""
        out = self.plain(x)
        worn = [group.worn.factors.get(self.path, ()) for group in groups.held]
        if not any(worn):
            return out
        a, b, scales = stacked_factors(worn)
        rows = x.reshape(len(groups.of), -1, x.shape[-1]).to(a.dtype)
        rows = self._dropped_by(rows, groups)
        if groups.even is None:
            a, b = a.index_select(0, groups.of), b.index_select(0, groups.of)
            scales = None if scales is None else scales.index_select(0, groups.of)
        else:
            rows = rows.reshape(len(groups.held), -1, rows.shape[-1])
        low = torch.bmm(rows, a.transpose(1, 2))
        low = torch.bmm(low if scales is None else low * scales, b.transpose(1, 2))
        low = low.reshape(out.shape)
        first = next(pair for pairs in worn for pair in pairs)
        return (out + (low * first.scaling if scales is None else low)).to(out.dtype)

    def _dropped_by(self, rows: Tensor, groups: Groups) -> Tensor:
        """Dropout of [rows, length, width]: every group draws what it would draw alone."""
        if all(group.worn.dropout == 0.0 or group.worn.dice is None for group in groups.held):
            return rows
        parts: list[Tensor] = []
        for group in groups.held:
            mine = rows[group.rows]
            real = self._dropped(mine[:, : group.length], group.worn)
            parts.append(torch.cat([real, mine[:, real.shape[1] :]], dim=1))
        order = torch.cat([group.rows for group in groups.held])
        return torch.cat(parts)[torch.argsort(order)]

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
        if pair.between is not None:
            return colora.delta(x, pair.a, pair.b, *pair.between) * pair.scaling
        low = F.linear(F.linear(x, pair.a), pair.b)
        if pair.magnitude is None:
            return low * pair.scaling
        weight: Tensor = cast(Any, self.module).weight
        weight = weight.T if self.transposed else weight
        eye = torch.eye(pair.a.shape[1], dtype=pair.a.dtype, device=pair.a.device)
        product = F.linear(F.linear(eye, pair.a), pair.b).T
        length = lengths(weight + pair.scaling * product.detach())
        ratio = (pair.magnitude / length).view(1, -1)
        bias: Tensor | None = getattr(self.module, "bias", None)
        plain = base if bias is None else base - bias
        return (ratio - 1) * plain + ratio * low * pair.scaling
