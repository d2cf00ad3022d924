"""The server's part of a forward, as the client's model sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flexp.dice import Dice
from flexp.errors import GradientError
from flexp.model.dress import Train
from flexp.tensors import Wear, finite

Until = Literal["hidden", "logits", "loss"]


class Far(Protocol):
    """The server's part of one forward, as the client sees it."""

    def forward(
        self, ask: Ask, hidden: Tensor, coefs: Sequence[Tensor], *, keep: bool
    ) -> tuple[int, Tensor]: ...
    def backward(
        self, call: int, grad: Tensor, *, hidden: bool
    ) -> tuple[Tensor | None, list[Tensor]]: ...


@dataclass(frozen=True)
class Ask:
    """What a far forward is to do: wear, trainable slots, and where it ends.

    ``rows`` are numbers of hidden states that come again in later batches; 0 of those that do not.
    ``wants``: the hidden state has a gradient.
    """

    wear: Wear
    train: Train
    until: Until
    shapes: Mapping[str, tuple[int, ...]]
    mask: Tensor | None
    labels: Tensor | None = None
    dropout: Dice | None = None
    rows: tuple[int, ...] = ()
    wants: bool = True


class Crossing(torch.autograd.Function):
    """The far part of a forward in the client's graph: what comes back has a gradient."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, far: Far, ask: Ask, hidden: Tensor, *coefs: Tensor
    ) -> Tensor:
        ctx.far, ctx.wants = far, ask.wants
        ctx.call, out = far.forward(ask, hidden.detach(), [c.detach() for c in coefs], keep=True)
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        if not finite({"grad": grads[0]}):
            raise GradientError(
                "A gradient has NaN or infinity. Lower the learning rate, or set train.clip_norm."
            )
        hidden, coefs = ctx.far.backward(ctx.call, grads[0], hidden=ctx.wants)
        return None, None, hidden, *coefs
