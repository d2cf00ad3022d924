"""Counts of a batch, the next-token loss without all logits, and distances between two models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from flexp import precision
from flexp.data.examples import IGNORED

Sums = Mapping[str, tuple[float, float]]  # metric -> sum, count; added over batches and clients
CHUNK = 128  # tokens: 25 MB of logits for a vocabulary of 49,152


class _Chunked(torch.autograd.Function):
    """The gradient is made in the forward, while a chunk's logits are there."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> Tensor:
        count = max(1, len(targets))
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grads: list[Tensor] = []
        for at in range(0, len(targets), CHUNK):
            h, wanted = hidden[at : at + CHUNK], targets[at : at + CHUNK]
            logs = torch.log_softmax(precision.in_full(h, weight, bias), dim=-1)
            here = torch.arange(len(wanted), device=logs.device), wanted
            total -= logs[here].sum()
            if ctx.needs_input_grad[0]:
                slope = logs.exp_()
                slope[here] -= 1
                grads.append((precision.back_in_full(slope, weight) / count).to(hidden.dtype))
        if grads:
            ctx.save_for_backward(torch.cat(grads))
        return total / count

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        return slope * grads[0].to(slope.dtype), None, None, None


def chunked_loss(hidden: Tensor, output: nn.Linear, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of hidden states [N, d] through a frozen output embedding."""
    return cast(Tensor, _Chunked.apply(hidden, output.weight, output.bias, targets))  # pyright: ignore[reportUnknownMemberType]


def distillation(
    logits: Tensor, teacher: Tensor, labels: Tensor, *, temperature: float = 2.0
) -> Tensor:
    """KL(teacher || student) T^2 in nats, by rows [B, V], or by tokens [B, T, V] that are learned.

    Hinton et al. 2015, arXiv 1503.02531.
    """
    if logits.dim() == 3:
        wanted = labels[:, 1:] != IGNORED
        logits, teacher = logits[:, :-1][wanted], teacher[:, :-1][wanted]
    soft = torch.log_softmax(wide(teacher) / temperature, dim=-1)
    mine = torch.log_softmax(wide(logits) / temperature, dim=-1)
    return temperature**2 * (soft.exp() * (soft - mine)).sum(-1).mean()


def places(hidden: Tensor) -> Tensor:
    """A hidden state as [B, T, d]: of images [B, d, height, width], or [B, d], as well."""
    if hidden.dim() == 2:
        return hidden[:, None]
    return hidden if hidden.dim() == 3 else hidden.flatten(2).transpose(1, 2)


def apart(mine: Tensor, theirs: Tensor, mask: Tensor | None) -> Tensor:
    """Mean squared distance of hidden states in direction, over positions [B, T] of the mask."""
    mine, theirs = places(mine), places(theirs)
    gap = functional.normalize(mine.float(), dim=-1) - functional.normalize(theirs.float(), dim=-1)
    squared = gap.square().sum(-1)
    return squared.mean() if mask is None else (squared * mask).sum() / mask.sum()


def wide(logits: Tensor) -> Tensor:
    """At least single precision: a softmax over a vocabulary is wrong in half."""
    return logits if logits.dtype == torch.float64 else logits.float()


def counted(logits: Tensor, targets: Tensor) -> dict[str, tuple[float, float]]:
    loss = functional.cross_entropy(logits, targets, reduction="none").double().sum()
    right = (logits.argmax(-1) == targets).sum()
    count = float(targets.numel())
    return {"loss": (loss.item(), count), "accuracy": (float(right.item()), count)}


def means(sums: Sums) -> dict[str, float]:
    return {metric: total / count for metric, (total, count) in sums.items() if count > 0}


def hits(logits: Tensor, targets: Tensor) -> dict[str, tuple[float, float]]:
    """By class that occurs, twice the rows that are right, and rows predicted and true together.

    Added over batches, their quotient is the class's F1. Beside it, how many rows are true.
    """
    count = logits.shape[-1]
    told = logits.argmax(-1)
    right = torch.bincount(targets[told == targets], minlength=count)
    true = torch.bincount(targets, minlength=count)
    both = torch.bincount(told, minlength=count) + true
    f1 = {f"f1 of {n}": (2.0 * int(right[n]), float(both[n])) for n in range(count) if both[n]}
    return f1 | {f"rows of {n}": (float(true[n]), 1.0) for n in range(count)}


def macro(sums: Sums) -> dict[str, float]:
    """Means, with one ``macro_f1`` for the F1 of all classes that occur in truth or prediction.

    ``dominant_f1`` is of those that are half as frequent as the most frequent one, or more.
    """
    found = means(sums)
    each = {k.split()[-1]: found.pop(k) for k in [*found] if k.startswith("f1 of ")}
    rows = {k.split()[-1]: found.pop(k) for k in [*found] if k.startswith("rows of ")}
    main = [each[n] for n in each if 2 * rows[n] >= max(rows.values())]
    if each:
        found |= {"macro_f1": sum(each.values()) / len(each), "dominant_f1": sum(main) / len(main)}
    return found
