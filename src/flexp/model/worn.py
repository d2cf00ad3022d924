"""What a forward wears: adapters resolved to tensors per module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flexp.dice import Dice
from flexp.errors import AdapterError
from flexp.model import colora
from flexp.model.prompts import AT_CUT, BEHIND, FRONT, NAMES
from flexp.model.surgery import EVERY
from flexp.tensors import Tensors

PREFIX = "base_model.model."

Coef = Callable[[str], float | Tensor]  # by module path


@dataclass(frozen=True)
class Factors:
    """One LoRA pair, A (r, in) and B (out, r); ``magnitude`` (out,) makes it DoRA.

    With P (r, r) and Q (r,) ``between`` it is Co-LoRA. What it adds counts what the ``gate`` (in,)
    says of a row, or the ``rest`` to 1.
    """

    a: Tensor
    b: Tensor
    scaling: float
    magnitude: Tensor | None = None
    between: tuple[Tensor, Tensor] | None = None
    gate: Tensor | None = None
    rest: bool = False

    @property
    def plain(self) -> bool:
        """Whether it adds the product of A and B, and nothing else."""
        return self.magnitude is None and self.between is None and self.gate is None


@dataclass(frozen=True)
class Worn:
    """Adapters of one forward, by module path; or, per group of rows, other adapters."""

    factors: Mapping[str, tuple[Factors, ...]] = field(
        default_factory=dict[str, tuple[Factors, ...]]
    )
    scales: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    direct: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict[str, Tensors])
    inputs: Tensors = field(default_factory=dict[str, Tensor])  # prompts and frames
    gates: Tensors = field(default_factory=dict[str, Tensor])  # by module path
    noise: float = 0.0  # of gates
    mask: Tensor | None = None  # which positions gates look at
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
    gates: Tensors = {}
    for name, value in adapter.items():
        path = name.removeprefix(PREFIX)
        if name in NAMES:
            inputs[name] = value
        elif name.endswith(colora.EVERY):
            stem, _, _ = path.rpartition(".")
            if name.endswith(colora.GATE):
                gates[stem] = value
            elif name.endswith(colora.A):
                b, p, q = (adapter[f"{PREFIX}{stem}{part}"] for part in colora.EVERY[1:4])
                pair = Factors(value, b, alpha / value.shape[0], between=(p, q))
                factors[stem] = (pair,)
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
    return Worn(factors, scales, direct, inputs, gates)


def gated(first: Worn, second: Worn, noise: float) -> Worn:
    """Two adapters at once: the second, and of the first what the second's gate lets through."""
    factors: dict[str, tuple[Factors, ...]] = {}
    for path, pairs in second.factors.items():
        gate = second.gates.get(path)
        if gate is None:
            raise AdapterError("Only Co-LoRA has gates. Set adapter.kind to colora.")
        theirs = tuple(replace(p, gate=gate) for p in first.factors.get(path, ()))
        factors[path] = (*theirs, *(replace(p, gate=gate, rest=True) for p in pairs))
    return replace(second, factors=factors, noise=noise)


def stacked(many: list[tuple[Worn, Coef]]) -> Worn:
    """LoRA products summed, each with its own coefficient; direct parameters summed likewise."""
    factors: dict[str, tuple[Factors, ...]] = {}
    direct: dict[str, Tensors] = {}
    for worn, coef in many:
        for path, pairs in worn.factors.items():
            mine = tuple(replace(p, b=p.b * coef(path)) for p in pairs)
            factors[path] = factors.get(path, ()) + mine
        for path, leaves in worn.direct.items():
            held = direct.setdefault(path, {})
            for leaf, value in leaves.items():
                x = value * coef(path)
                held[leaf] = held[leaf] + x if leaf in held else x
    return Worn(factors, {}, direct)
