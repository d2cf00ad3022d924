"""Dresses one side's modules: from slots and a wear to the tensors that each module wears."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from flexp.dice import Dice
from flexp.errors import AdapterError
from flexp.model.slots import Slots
from flexp.model.worn import Coef, Group, Groups, Worn, gated, read, stacked
from flexp.selection import ALL, Where
from flexp.tensors import PerRow, Stacked, Tensors, Wear, mixed, slots_of, terms

Train = Mapping[str, Where] | None  # per slot what of it gets gradients; None: everything


@dataclass
class Leaves:
    """Tensors of slots as leaves of the present graph, so that gradients can be collected."""

    held: list[tuple[str, str, Tensor, Tensor]] = field(
        default_factory=list[tuple[str, str, Tensor, Tensor]]
    )
    # The tensors are held, so no other one gets the same id.
    index: dict[tuple[str, str, int], int] = field(default_factory=dict[tuple[str, str, int], int])

    def leaf(self, slot: str, name: str, value: Tensor) -> Tensor:
        """The leaf that stands for a slot's tensor; the same one for the same tensor."""
        at = self.index.get((slot, name, id(value)))
        if at is not None:
            return self.held[at][3]
        leaf = value.detach().requires_grad_()
        self.index[slot, name, id(value)] = len(self.held)
        self.held.append((slot, name, value, leaf))
        return leaf

    def tensors(self) -> list[Tensor]:
        """All of them, in the order in which ``grads`` takes their gradients."""
        return [leaf for *_, leaf in self.held]

    def grads(self, grads: Sequence[Tensor | None] | None = None) -> dict[str, Tensors]:
        """Gradients by slot: those given, or the leaves' own."""
        out: dict[str, Tensors] = {}
        found = grads if grads is not None else [one[3].grad for one in self.held]
        for (slot, name, _, _), g in zip(self.held, found, strict=True):
            if g is not None:
                held = out.setdefault(slot, {})
                held[name] = held[name] + g if name in held else g
        return out


def dress(
    slots: Slots,
    wear: Wear,
    coefs: Sequence[Tensor | None],
    train: Train,
    leaves: Leaves,
    *,
    over: Tensors | None = None,
) -> Worn:
    """What this side's modules wear.

    ``coefs`` holds a value per block for learned terms; ``over`` replaces tensors by name.
    """
    views: dict[str, Tensors] = {}
    for slot in slots_of(wear):
        where = ALL if train is None else train.get(slot, ~ALL)
        views[slot] = {
            k: leaves.leaf(slot, k, v)
            if torch.is_grad_enabled() and where.holds(k, slots.place(k))
            else v
            for k, v in slots[slot].items()
        }
    if isinstance(wear, PerRow):
        rows = torch.tensor(wear.row)
        groups = [
            Group(read(views[s], slots.alpha_of(s)), torch.nonzero(rows == n)[:, 0])
            for n, s in enumerate(wear.slots)
        ]
        if any(group.worn.inputs for group in groups):
            raise AdapterError("A prompt cannot be worn per row: rows would differ in length.")
        return Worn(groups=Groups.made(g for g in groups if len(g.rows)))
    if isinstance(wear, Stacked):
        if wear.gated:
            first, second = (read(views[t.slot], slots.alpha_of(t.slot)) for t in wear.mix)
            return gated(first, second, wear.noise)
        return stacked(_summands(slots, wear, views, coefs))
    value = mixed(terms(wear), views, slots.place, coefs)
    return read({**value, **(over or {})}, slots.alpha_of(*slots_of(wear)))


def _summands(
    slots: Slots, wear: Stacked, views: Mapping[str, Tensors], coefs: Sequence[Tensor | None]
) -> list[tuple[Worn, Coef]]:
    out: list[tuple[Worn, Coef]] = []
    for n, term in enumerate(wear.mix):
        value = mixed((replace(term, coef=1.0),), views, slots.place)
        given = coefs[n] if n < len(coefs) else None
        coef = _everywhere(float(term.coef)) if given is None else _per_block(slots, given)
        worn = read(value, slots.alpha_of(term.slot))
        if worn.inputs or worn.scales:
            raise AdapterError("Only LoRA, dense and head tensors can be stacked.")
        out.append((worn, coef))
    return out


def _everywhere(coef: float) -> Coef:
    return lambda path: coef


def _per_block(slots: Slots, coef: Tensor) -> Coef:
    return lambda path: coef[slots.place(path).block + 1]


def dropping(worn: Worn, rate: float, dice: Dice | None) -> Worn:
    """The same, with dropout and noise of gates keyed by call and layer; without dice neither."""
    if dice is None or not (rate or worn.noise):
        return worn
    groups = worn.groups
    if groups is not None:
        held = (replace(g, worn=dropping(g.worn, rate, dice)) for g in groups.held)
        groups = replace(groups, held=tuple(held))
    return replace(worn, dropout=rate, dice=dice, groups=groups)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, coef: Tensor, size: int
    ) -> Tensor:
        return coef.detach().expand(size).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        out = grads[0][0].clone()
        for g in grads[0][1:]:
            out = out + g
        return out, None


def spread(coef: Tensor, depth: int) -> Tensor:
    """A learned coefficient, one copy per block: its gradient is summed in block order.

    Without this the order of the sum would depend on where the cut is.
    """
    return cast(Tensor, _Spread.apply(coef, depth + 2))  # pyright: ignore[reportUnknownMemberType]
