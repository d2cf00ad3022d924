"""Products of LoRA factors: distance, gradient, sum and truncation, none by a d x d matrix.

A pair is A (r, in) and B (out, r); what a model wears is their product B A.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def lora_pairs(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Path of each adapted matrix -> names of its A (r, in) and B (out, r)."""
    known = set(names)
    out: dict[str, tuple[str, str]] = {}
    for a in sorted(known):
        stem, mark, _ = a.partition(".lora_A.")
        b = a.replace(".lora_A.", ".lora_B.")
        if mark and b in known:
            out[stem] = (a, b)
    return out


def gram_distance(a: Tensor, b: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
    """``|B A - B' A'|_F^2`` in O(d r^2), without forming a d x d matrix.

    A: (r, in), B: (out, r); the second pair may have another rank.
    """
    same = gram_dot(a, b, a, b) + gram_dot(a2, b2, a2, b2)
    return same - 2 * gram_dot(a, b, a2, b2)


def gram_dot(a: Tensor, b: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
    """The inner product of B A and B' A', without forming a d x d matrix."""
    return ((b.T @ b2) * (a @ a2.T)).sum()


def gram_gradient(a: Tensor, b: Tensor, a2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of ``gram_distance / 2`` with respect to A and to B."""
    grad_a = (b.T @ b) @ a - (b.T @ b2) @ a2
    grad_b = b @ (a @ a.T) - b2 @ (a2 @ a.T)
    return grad_a, grad_b


def product_norm(a: Tensor, b: Tensor) -> float:
    """``|B A|_F``, without the d x d matrix."""
    return float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt())


def stack(
    pairs: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """One pair whose product is the weighted sum of the products; ranks add up.

    Only B is scaled: scaling both factors would square the weight.
    """
    a = torch.cat([a for a, _ in pairs])
    b = torch.cat([b * w for (_, b), w in zip(pairs, weights, strict=True)], dim=1)
    return a, b


def worn_sum(pairs: Sequence[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor]:
    """The pair that wears the sum of what several do, each with its coefficient.

    What is worn is alpha / rank times B A, so B is scaled by how much the rank grows.
    """
    rank = sum(len(a) for a, _, _ in pairs)
    return stack([(a, b) for a, b, _ in pairs], [c * (rank / len(a)) for a, _, c in pairs])


def truncate(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best pair of that rank for the product B A, each factor with half of the spectrum.

    Computed by QR of the factors and an SVD of the small core; signs are fixed (largest entry of
    each row of A positive), so equal products give equal factors.
    """
    qb, rb = _qr(b)
    qa, ra = _qr(a.T)
    u, s, vh = _svd(rb @ ra.T)
    keep = min(rank, s.numel())
    half = s[:keep].sqrt()
    new_a = half[:, None] * (vh[:keep] @ qa.T)
    new_b = (qb @ u[:, :keep]) * half
    sign = torch.sign(new_a.gather(1, new_a.abs().argmax(1, keepdim=True)))
    sign = torch.where(sign == 0, torch.ones_like(sign), sign)
    new_a, new_b = new_a * sign, new_b * sign.T
    if keep < rank:
        new_a = torch.cat([new_a, new_a.new_zeros(rank - keep, a.shape[1])])
        new_b = torch.cat([new_b, new_b.new_zeros(b.shape[0], rank - keep)], dim=1)
    return new_a, new_b


def _qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    return torch.linalg.qr(matrix)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(matrix)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
