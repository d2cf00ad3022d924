"""Makes the frozen A and B of Co-LoRA agree between two models that read the same rows."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional


def polar(matrix: Tensor) -> Tensor:
    """The nearest matrix whose rows, or columns if these are fewer, are at right angles, length 1.

    It is U V' of the singular value decomposition.
    """
    svd = cast(Any, torch.linalg).svd
    u, _, vh = cast("tuple[Tensor, ...]", svd(matrix.double(), full_matrices=False))
    return (u @ vh).to(matrix.dtype)


def crowding(a: Tensor) -> Tensor:
    """The mean square of the cosines between different columns of a matrix."""
    columns = functional.normalize(a, dim=0)
    cosines = columns.T @ columns
    n = len(cosines)
    return (cosines.square().sum() - cosines.diagonal().square().sum()) / (n * (n - 1))


def canonical(x: Tensor, y: Tensor, gamma: float = 1e-4) -> Tensor:
    """The map [y's width, x's width] that takes x's canonical directions to y's.

    ``x`` [rows, width] and ``y`` are what two models say of the same rows, C_xx = x'x + gamma of
    centred x, and so on; with U S V' = C_yy^-1/2 C_yx C_xx^-1/2 it is C_yy^1/2 U V' C_xx^-1/2.
    """
    one, two = (v.double() - v.double().mean(0) for v in (x, y))
    _, small = _roots(one.T @ one, gamma)
    large, inverse = _roots(two.T @ two, gamma)
    return (large @ polar(inverse @ (two.T @ one) @ small) @ small).to(x.dtype)


def _roots(gram: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """The square root of a symmetric matrix plus gamma, and its inverse."""
    eigh = cast(Any, torch.linalg).eigh
    values, vectors = cast("tuple[Tensor, Tensor]", eigh(gram))
    root = (values.clamp_min(0) + gamma).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T
