"""What a forward wears: adapters resolved to tensors per module, applied by the module's own path.

Two instance-level replacements, made once per backbone: linears inside blocks and leaves of the
head look into the present pass for what they wear. Without a pass they are what they were. The
order of operations is PEFT's, so a worn adapter and PEFT's wrapper agree to the last bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flexp.dice import Dice
from flexp.model.prompts import AT_CUT, BEHIND, FRONT, NAMES
from flexp.model.surgery import EVERY
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
    inputs: Tensors = field(default_factory=dict[str, Tensor])  # prompts and frames
    dropout: float = 0.0
    dice: Dice | None = None
    groups: Groups | None = None

    @property
    def front(self) -> int:
        """Positions in front of the input."""
        return len(self.inputs[FRONT]) if FRONT in self.inputs else 0

    @property
    def at_cut(self) -> int:
        """Positions that the server puts in at the cut."""
        return len(self.inputs[AT_CUT]) if AT_CUT in self.inputs else 0

    @property
    def operated(self) -> bool:
        """Whether there is surgery on hidden states."""
        return not EVERY.isdisjoint(self.inputs)

    @property
    def behind(self) -> int:
        """Positions behind the input's first one."""
        return len(self.inputs[BEHIND]) if BEHIND in self.inputs else 0


@dataclass(frozen=True)
class Group:
    """Rows that all wear the same; what they hold beyond ``length`` tokens is padding."""

    worn: Worn
    rows: Tensor
    length: int | None = None


@dataclass(frozen=True)
class Groups:
    """All rows of a forward, by what they wear. ``of`` is the group of each row.

    ``even`` is how many rows each group has, if all have as many and stand one after another.
    """

    held: tuple[Group, ...]
    of: Tensor
    even: int | None

    @classmethod
    def made(cls, groups: Iterable[Group]) -> Groups:
        """From groups that have every row between them."""
        held = tuple(groups)
        order = torch.cat([g.rows for g in held])
        of = torch.empty(len(order), dtype=torch.long)
        for n, group in enumerate(held):
            of[group.rows] = n
        alike = len({len(g.rows) for g in held}) == 1
        in_order = torch.equal(order, torch.arange(len(order)))
        return cls(held, of, len(held[0].rows) if alike and in_order else None)


def read(adapter: Mapping[str, Tensor], alpha: float) -> Worn:
    """Sorts the tensors of one adapter by module path and kind, by PEFT's names alone."""
    factors: dict[str, tuple[Factors, ...]] = {}
    scales: dict[str, Tensor] = {}
    direct: dict[str, Tensors] = {}
    inputs: Tensors = {}
    for name, value in adapter.items():
        path = name.removeprefix(PREFIX)
        if name in NAMES:
            inputs[name] = value
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
    return Worn(factors, scales, direct, inputs)


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
        for pair in worn.factors.get(self.path, ()):
            low = self._dropped(x.to(pair.a.dtype), worn)
            out = (out + self._lora(low, out, pair)).to(out.dtype)
        return out

    def _only_factors(self, worn: Worn) -> bool:
        """Whether nothing is worn here but LoRA pairs, or nothing at all."""
        pairs = worn.factors.get(self.path, ())
        plain = self.path not in worn.scales and self.path not in worn.direct
        return plain and all(pair.magnitude is None for pair in pairs)

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
