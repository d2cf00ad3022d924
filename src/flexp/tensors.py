"""Arithmetic on adapters: sums, means, dot products, selections and mixes.

An adapter is a flat ``dict[str, Tensor]``. The same functions evaluate a slot at the client and at
the server, so an expression means the same on both sides of a cut.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from flexp.errors import AdapterError

Tensors = dict[str, Tensor]
Side = Literal["near", "far"]
Part = Literal["front", "trunk", "tail", "head"]
BlockScalars = tuple[float, ...]


@dataclass(frozen=True)
class Place:
    """Where one adapter tensor sits: ``block`` is -1 before the blocks, ``depth`` after them.

    ``hops`` counts the near blocks between it and its cut; of what is far it is 0.
    """

    side: Side
    part: Part
    block: int
    depth: int
    hops: int = 0


@dataclass(frozen=True)
class Where:
    """A selection of adapter tensors that names no block numbers; supports ``&``, ``|`` and ``~``.

    ``last`` takes the last n blocks of the model and what comes after them, ``nearest`` the n
    blocks next to each cut, ``names`` is a glob.
    """

    side: Side | None = None
    part: Part | None = None
    last: int | None = None
    nearest: int | None = None
    names: str = "*"
    join: Literal["", "and", "or", "not"] = ""
    of: tuple[Where, ...] = ()

    def __and__(self, other: Where) -> Where:
        return Where(join="and", of=(self, other))

    def __or__(self, other: Where) -> Where:
        return Where(join="or", of=(self, other))

    def __invert__(self) -> Where:
        return Where(join="not", of=(self,))

    def holds(self, name: str, place: Place) -> bool:
        """Whether the tensor of that name and place is selected."""
        if self.join == "and":
            return all(w.holds(name, place) for w in self.of)
        if self.join == "or":
            return any(w.holds(name, place) for w in self.of)
        if self.join == "not":
            return not self.of[0].holds(name, place)
        return (
            self.side in (None, place.side)
            and self.part in (None, place.part)
            and (self.last is None or place.block >= place.depth - self.last)
            and (self.nearest is None or place.hops < self.nearest)
            and (self.names == "*" or fnmatch.fnmatchcase(name, self.names))
        )

    def words(self) -> str:
        """This selection for people, as "all but the head"."""
        if self.join == "not":
            inner = self.of[0].words()
            return "nothing" if inner == "everything" else f"all but {inner}"
        if self.join:
            return (" and " if self.join == "or" else ", only ").join(w.words() for w in self.of)
        told = [f"the {self.side} part"] if self.side else []
        told += [f"the {self.part}"] if self.part else []
        told += [f"the last {self.last} blocks and the head"] if self.last is not None else []
        told += [f"{self.nearest} blocks from the cut"] if self.nearest is not None else []
        told += [f"what is called {self.names}"] if self.names != "*" else []
        return ", only ".join(told) or "everything"

    def to_json(self) -> dict[str, Any]:
        """This selection as plain data, without what is left at its default."""
        plain: dict[str, Any] = {
            k: v
            for k, v in (
                ("side", self.side),
                ("part", self.part),
                ("last", self.last),
                ("nearest", self.nearest),
            )
            if v is not None
        }
        if self.names != "*":
            plain["names"] = self.names
        if self.join:
            plain |= {"join": self.join, "of": [w.to_json() for w in self.of]}
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Where:
        """The selection that ``to_json`` wrote."""
        rest = {k: v for k, v in plain.items() if k != "of"}
        return cls(**rest, of=tuple(cls.from_json(w) for w in plain.get("of", ())))


ALL = Where()
NEAR = Where(side="near")
FAR = Where(side="far")
HEAD = Where(part="head")
FRONT = Where(part="front")
NONE = ~ALL


@dataclass(frozen=True)
class Term:
    """One summand of a mix: ``coef * slot`` or ``coef * slot * times`` (elementwise)."""

    slot: str
    coef: float | Tensor = 1.0
    times: str | None = None
    detach: bool = False


Mix = tuple[Term, ...]


@dataclass(frozen=True)
class Stacked:
    """LoRA slots worn together: the sum of their products, as if their ranks were concatenated."""

    mix: Mix


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
    total = float(sum(weights))
    if total <= 0 or any(w < 0 for w in weights):
        raise AdapterError(f"Weights of a mean must be at least 0 and not all 0, not {weights!r}.")
    if len(items) == 1:
        return {k: v.clone() for k, v in items[0].items()}
    out = {k: v * (weights[0] / total) for k, v in items[0].items()}
    for item, weight in zip(items[1:], weights[1:], strict=True):
        out = add(out, item, weight / total)
    return out


def mean_by_name(items: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> Tensors:
    """The weighted mean of each tensor over the items that hold it (a host set per tensor)."""
    names = dict.fromkeys(k for item in items for k in item)
    out: Tensors = {}
    for name in names:
        held = [(item, w) for item, w in zip(items, weights, strict=True) if name in item]
        out |= mean([{name: item[name]} for item, _ in held], [w for _, w in held])
    return out


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
                along = float((mine[k] * other[k]).sum())
                if along < 0:
                    mine[k] = mine[k] - along / float(other[k].square().sum()) * other[k]
    agreed = {k: base[k] + v for k, v in mean_by_name(kept, weights).items()}
    return {**mean_by_name(items, weights), **agreed}


def dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The inner product over all tensors, summed in sorted order of names."""
    _same(a, b)
    return sum(float((a[k] * b[k]).sum()) for k in sorted(a))


def norm(a: Mapping[str, Tensor]) -> float:
    """The Euclidean norm over all tensors."""
    return dot(a, a) ** 0.5


def finite(a: Mapping[str, Tensor]) -> bool:
    """Whether every number in every tensor is finite."""
    return all(bool(torch.isfinite(v).all()) for v in a.values())


def select(a: Mapping[str, Tensor], where: Where, place: Callable[[str], Place]) -> Tensors:
    """The tensors that a selection takes."""
    return {k: v for k, v in a.items() if where.holds(k, place(k))}


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

    A single term with the number 1 gives the slot's own tensors, so gradients reach them directly.
    """
    out: Tensors = {}
    for n, term in enumerate(mix):
        value = slots[term.slot]
        if out and value.keys() != out.keys():
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
            out[k] = out[k] + x if n else x
    return out
