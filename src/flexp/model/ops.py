"""What is said of slots, as data: their specs and optimizers, and the five operations on them.

All update rules of all methods are made of five operations: move a gradient into a slot, assign a
mix, pull towards a slot, step, and take a dot product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from flexp.model.adapter import Kind, Lora
from flexp.model.colora import CoLora
from flexp.selection import ALL, Where
from flexp.tensors import Mix, Tensors

HeadForm = Literal["drawn", "orthogonal", "etf"]


@dataclass(frozen=True)
class Optim:
    """An optimizer of torch; ``head_lr`` is for tensors after the blocks (None: the same)."""

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    head_lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0


@dataclass(frozen=True)
class SlotSpec:
    """What a strategy says of a slot: its kind (None: the recipe's), home, life and optimizer.

    A kind that it names has its own LoRA rank and alpha, at any seat.
    ``home`` "server" is one far copy that all tenants wear. ``lasts`` "run" keeps the near part in
    the client's memory and the far part in its tenancy. ``moments``: "fresh" starts the optimizer
    anew each turn, "keep" goes on with each side's own; the one copy at the server always keeps its
    own. ``staleness`` is for a slot of the server: a step whose gradient was taken n steps of
    others ago counts 1 / (1 + n)^staleness, and ``eager`` steps do not wait for the next forward.
    ``head_rows`` is the length that each row of a head's matrices begins with (None: as the
    backbone has it); ``head_form``: as drawn, at right angles, or, "etf", as far from each other as
    they can be. ``any_rank``: what is offered may have another LoRA rank than the seat, and
    the one copy at the server has the recipe's.
    """

    kind: Kind | None = None
    home: Literal["tenant", "server"] = "tenant"
    lasts: Literal["round", "run"] = "round"
    optim: Optim | None = None
    moments: Literal["fresh", "keep"] = "fresh"
    staleness: float = 0.0
    eager: bool = False
    head_rows: float | None = None
    head_form: HeadForm = "drawn"
    any_rank: bool = False


def alphas_of(specs: Mapping[str, SlotSpec]) -> dict[str, float]:
    """LoRA's alpha of the slots that have a kind of their own."""
    return {s: spec.kind.alpha for s, spec in specs.items() if isinstance(spec.kind, Lora | CoLora)}


# The adapter that a slot begins with, of that rank; the same on both sides.
Initial = Callable[[SlotSpec, int | None], Tensors]


@dataclass(frozen=True)
class Grad:
    """Moves the gradient gathered for slot ``of`` into slot ``into``; all other gradients go."""

    of: tuple[str, ...]
    into: tuple[str, ...]


@dataclass(frozen=True)
class Assign:
    """``slot := mix`` where selected, clamped to ``clip``; a new slot is zero elsewhere."""

    slot: str
    mix: Mix
    where: Where = ALL
    clip: tuple[float, float] | None = None


@dataclass(frozen=True)
class Pull:
    """Adds the gradient of ``weight / 2 * |slot - to|^2`` to slot ``grad``.

    ``form``: "factors" compares tensors; "product" compares LoRA products (scaled as worn by
    ``alpha / rank``), which does not depend on how a product is factored, and tensors elsewhere.
    """

    slot: str
    to: str
    weight: float
    grad: str
    where: Where = ALL
    form: Literal["factors", "product"] = "factors"


@dataclass(frozen=True)
class Step:
    """One optimizer step of ``slot`` along slot ``grad`` times ``scale``.

    ``share`` is how much of the step counts; an optimizer may not notice the length of a gradient.
    """

    slot: str
    grad: str
    scale: float = 1.0
    where: Where = ALL
    share: float = 1.0


@dataclass(frozen=True)
class Dot:
    """The inner product of two slots, one number per block; ``form`` as in ``Pull``."""

    a: str
    b: str
    where: Where = ALL
    form: Literal["factors", "product"] = "factors"


Op = Grad | Assign | Pull | Step | Dot
