"""Stein variational gradient descent (Liu and Wang, 2016, arXiv 1608.04471) of a few particles.

They climb log q together, and a kernel keeps them apart:
    phi(x_k) = 1/K sum_j [ k(x_j, x_k) grad log q(x_j) + grad_{x_j} k(x_j, x_k) ]
    k(x, y) = exp(-|x - y|^2 / (2 h^2)),   h^2 = median_{i<j} |x_i - x_j|^2 / (2 log(K + 1))
One particle climbs alone, which finds the mode. Where the median is 0, h is 1: equal particles do
not part, as there is no way for them to go.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def direction(particles: Tensor, slopes: Tensor) -> Tensor:
    """phi of particles [K, D], from the gradients of log q at them."""
    count = len(particles)
    apart = particles[:, None] - particles[None]  # [j, k, D]
    squares = apart.square().sum(-1)
    upper = squares[*torch.triu_indices(count, count, offset=1)]
    width = float(upper.quantile(0.5)) / (2 * math.log(count + 1)) if count > 1 else 1.0
    width = width or 1.0
    kernel = (-squares / (2 * width)).exp()
    repulsion = -(kernel[..., None] * apart).sum(0) / width
    return (kernel.T @ slopes + repulsion) / count
