"""Arithmetic on adapters: sums, means, dot products and mixes.

An adapter is a flat ``dict[str, Tensor]``. The same functions evaluate a slot at the client and at
the server, so an expression means the same on both sides of a cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flexp.errors import AdapterError
from flexp.selection import Place

Tensors = dict[str, Tensor]
BlockScalars = tuple[float, ...]


@dataclass(frozen=True)
class Term:
    """One summand of a mix: ``coef * slot`` or ``coef * slot * times`` (elementwise).

    Slots of a mix that hold other tensors, as a LoRA adapter and a prompt, are worn side by side.
    """

    slot: str
    coef: float | Tensor = 1.0
    times: str | None = None
    detach: bool = False


Mix = tuple[Term, ...]


@dataclass(frozen=True)
class Stacked:
    """LoRA slots worn together: the sum of their products, as if their ranks were concatenated.

    With a ``gated`` one there are two slots of Co-LoRA: what the first's products add counts g(x),
    what the second's do 1 - g(x), with the second's gate; all else is the second's. In training the
    gate has that ``noise``.
    """

    mix: Mix
    gated: bool = False
    noise: float = 0.0


@dataclass(frozen=True)
class PerRow:
    """Row ``n`` of the batch wears ``slots[row[n]]``."""

    slots: tuple[str, ...]
    row: tuple[int, ...]


Wear = str | Mix | Stacked | PerRow


def terms(wear: Wear) -> Mix:
    """The terms that a wear reads, in order."""
    if isinstance(wear, str):
        return (Term(wear),)
    if isinstance(wear, Stacked):
        return wear.mix
    if isinstance(wear, PerRow):
        return tuple(Term(s) for s in wear.slots)
    return wear


def plain(mix: Mix) -> Mix:
    """The mix with learned coefficients as the numbers that they are now."""
    return tuple(
        replace(t, coef=float(t.coef.detach())) if isinstance(t.coef, Tensor) else t for t in mix
    )


def slots_of(wear: Wear) -> tuple[str, ...]:
    """Every slot that a wear reads, once, in order."""
    names = [s for t in terms(wear) for s in (t.slot, t.times) if s is not None]
    return tuple(dict.fromkeys(names))


# ---- plain arithmetic


def _same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    if a.keys() != b.keys():
        odd = sorted(a.keys() ^ b.keys())
        raise AdapterError(
            f"Two adapters do not hold the same tensors: {odd[0]!r} and {len(odd) - 1} more are in "
            "only one of them. Adapters of other ranks or targets need a Where or a product mean."
        )


def scale(a: Mapping[str, Tensor], by: float) -> Tensors:
    """``by * a``."""
    return {k: v * by for k, v in a.items()}


def add(a: Mapping[str, Tensor], b: Mapping[str, Tensor], by: float = 1.0) -> Tensors:
    """``a + by * b``."""
    _same(a, b)
    return {k: v + by * b[k] for k, v in a.items()}


def lerp(a: Mapping[str, Tensor], b: Mapping[str, Tensor], weight: float) -> Tensors:
    """``(1 - weight) * a + weight * b``; the ends are exact."""
    _same(a, b)
    if weight in (0.0, 1.0):
        return {k: (b if weight else a)[k].clone() for k in a}
    return {k: torch.lerp(v, b[k], weight) for k, v in a.items()}


def mean(items: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> Tensors:
    """The weighted factor mean, summed in the order given; one item comes back unchanged.

    Averaging LoRA factors is not averaging their products: see ``products.stack``.

    >>> a, b = {"x": torch.tensor([1.0])}, {"x": torch.tensor([4.0])}
    >>> mean([a, b], [2.0, 1.0])["x"].item()
    2.0
    """
    if not items or len(items) != len(weights):
        raise AdapterError(f"A mean needs one weight per adapter: {len(items)} and {len(weights)}.")
    if not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
        raise AdapterError(
            f"Weights of a mean must be finite, at least 0 and not all 0, not {weights!r}."
        )
    total = float(sum(weights))
    if math.isinf(total):
        return mean(items, [w / max(weights) for w in weights])
    if len(items) == 1:
        return {k: v.clone() for k, v in items[0].items()}
    out = {k: v * (weights[0] / total) for k, v in items[0].items()}
    for item, weight in zip(items[1:], weights[1:], strict=True):
        _same(out, item)
        for k, v in out.items():
            v.add_(item[k], alpha=weight / total)
    return out


def mean_by_name(items: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> Tensors:
    """The weighted mean of each tensor over the items that hold it (a host set per tensor).

    A tensor of items without weight only is left out: nobody has anything to say of it.
    """
    hosts: dict[str, list[int]] = {}
    for n, (item, _) in enumerate(zip(items, weights, strict=True)):
        for name in item:
            hosts.setdefault(name, []).append(n)
    alike: dict[tuple[int, ...], list[str]] = {}
    for name, held in hosts.items():
        alike.setdefault(tuple(held), []).append(name)
    out: Tensors = {}
    for held, names in alike.items():
        shares = [weights[n] for n in held]
        if any(shares):
            out |= mean([{k: items[n][k] for k in names} for n in held], shares)
    return {k: out[k] for k in hosts if k in out}


def agreed_mean(
    items: Sequence[Mapping[str, Tensor]], weights: Sequence[float], base: Mapping[str, Tensor]
) -> Tensors:
    """``mean_by_name`` of what each item adds to ``base``, without what conflicts with another.

    Of two changes of a tensor that point apart (negative inner product), each loses its part along
    the other before the mean (PCGrad, Yu et al. 2020, arXiv 2001.06782, in the order given). What
    has no base yet is averaged as it is.
    """
    changes = [{k: v - base[k] for k, v in item.items() if k in base} for item in items]
    kept = [dict(change) for change in changes]
    for mine in kept:
        for other in changes:
            for k in mine.keys() & other.keys():
                mine[k] = _without(mine[k], other[k])
    agreed = {k: base[k] + v for k, v in mean_by_name(kept, weights).items()}
    return {**mean_by_name(items, weights), **agreed}


def _without(mine: Tensor, other: Tensor) -> Tensor:
    """A change without its part against another one."""
    along, size = float((mine * other).sum()), float(other.square().sum())
    sound = 1e-30 < size < math.inf and abs(along) < 1e30 * size  # false for NaN
    if not sound and mine.dtype != torch.float64:  # squares leave the range long before numbers do
        return _without(mine.double(), other.double()).to(mine.dtype)
    return mine - along / size * other if along < 0 < size else mine


def dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The inner product over all tensors, summed in sorted order of names."""
    _same(a, b)
    return sum(float((a[k] * b[k]).sum()) for k in sorted(a))


def norm(a: Mapping[str, Tensor]) -> float:
    """The Euclidean norm over all tensors."""
    return dot(a, a) ** 0.5


def finite(a: Mapping[str, Tensor]) -> bool:
    """Whether every number in every tensor is finite.

    A finite sum has finite summands, and takes one look at each; only a sum that is not (finite
    numbers may add up beyond the range) needs a second.
    """
    return all(
        math.isfinite(float(v.sum())) or bool(torch.isfinite(v).all())
        for v in a.values()
        if v.is_floating_point()
    )


def block_dots(
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    place: Callable[[str], Place],
    depth: int,
) -> BlockScalars:
    """The inner product per block: ``depth + 2`` numbers, before, blocks in order, after."""
    _same(a, b)
    out = [0.0] * (depth + 2)
    for k in sorted(a):
        out[place(k).block + 1] += float((a[k] * b[k]).sum())
    return tuple(out)


def add_blocks(a: BlockScalars, b: BlockScalars) -> BlockScalars:
    """Block scalars of the near and the far side together (each block lives on one side)."""
    return tuple(x + y for x, y in zip(a, b, strict=True))


def total(a: BlockScalars) -> float:
    """The sum in block order, so that whole and cut models agree to the last bit."""
    out = 0.0
    for x in a:
        out += x
    return out


# ---- mixes


def mixed(
    mix: Mix,
    slots: Mapping[str, Mapping[str, Tensor]],
    place: Callable[[str], Place],
    coefs: Sequence[Tensor | None] = (),
) -> Tensors:
    """The value of a mix. ``coefs[n]``, if given, replaces term n's number by a value per block.

    Slots hold the same tensors, or none in common; then all are there, one beside the other.
    A single term with the number 1 gives the slot's own tensors, so gradients reach them directly.
    """
    out: Tensors = {}
    for n, term in enumerate(mix):
        value = slots[term.slot]
        known = any(value.keys() == slots[before.slot].keys() for before in mix[:n])
        if not known and not value.keys().isdisjoint(out):
            _same(out, value)
        spread = coefs[n] if n < len(coefs) else None
        for k, v in value.items():
            x = v.detach() if term.detach else v
            if term.times is not None:
                x = x * slots[term.times][k]
            if spread is not None:
                x = x * spread[place(k).block + 1].to(x.dtype)
            elif float(term.coef) != 1.0:
                x = x * float(term.coef)
            out[k] = out[k] + x if k in out else x
    return out


def size_of(slots: Iterable[Tensors]) -> int:
    """Bytes of all tensors of some slots."""
    return sum(v.numel() * v.element_size() for held in slots for v in held.values())
