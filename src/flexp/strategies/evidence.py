"""What labels say of latent functions with a Gaussian prior: evidence and posterior.

Each of C classes has a function f_c ~ N(m_c, K) on n rows; the kernel is the same for all.
Least squares: a row's code, 1 for its class and -1 for all others, is f with noise of variance s:
    log Z = sum_c log N(code_c; m_c, K + s I),   p(c | new row) ~ 1 / (1 + exp(-2 mu_c / (v + s)))
with mu_c and v the posterior's mean and variance: what N(mu_c, v + s) says of 1 against -1, each
class against all others. To ask for all codes at once would count the same rows C times.
Softmax: Laplace's approximation at the mode of log p(y | f) + log N(f; m, K),
    log Z = log p(y | f) - 1/2 sum_c a_c K a_c - 1/2 log det(I + K W),   f_c = m_c + K a_c
with W the curvature of the likelihood, and p(new row) = softmax(mu_c / sqrt(1 + pi/8 v_c)), which
stands in for the integral (MacKay 1992). Algorithms 2.1, 3.3 and 3.4 of Rasmussen and Williams
2006; the determinant is det(sum_c E_c) prod_c det(B_c), with E and B as they name them. All
Cholesky factors are of matrices whose eigenvalues noise, or 1, or 1/K keep from 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

STEPS, LEAST = 50, 1e-6  # of Newton's method at most, and what part of one of its steps counts
TINY = 1e-12


def lower(matrix: Tensor) -> Tensor:
    """The Cholesky factor of a positive matrix, or of several."""
    return torch.linalg.cholesky(matrix)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def solved(factor: Tensor, right: Tensor) -> Tensor:
    """factor^-1 right, of a lower triangular matrix or of several."""
    linear: Any = torch.linalg
    return linear.solve_triangular(factor, right, upper=False)


@dataclass(frozen=True)
class Posterior:
    """``log_z``, and ``predict``: log p [m, C] of new rows, from what the prior says of them.

    That is their mean [m, C], their covariance with the rows seen [m, n], and their variance [m].
    """

    log_z: Tensor
    predict: Callable[[Tensor, Tensor, Tensor], Tensor]


def least_squares(mean: Tensor, kernel: Tensor, labels: Tensor, noise: Tensor) -> Posterior:
    """The posterior of codes; mean [n, C], kernel [n, n], labels [n]."""
    count, classes = mean.shape
    rest = 2 * functional.one_hot(labels, classes).to(mean) - 1 - mean
    factor = lower(kernel + noise * torch.eye(count).to(mean))
    weights = torch.cholesky_solve(rest, factor)
    size = factor.diagonal().log().sum() + count / 2 * math.log(2 * math.pi)
    log_z = -(rest * weights).sum() / 2 - classes * size

    def predict(new: Tensor, cross: Tensor, own: Tensor) -> Tensor:
        seen = solved(factor, cross.T)
        spread = (own - seen.square().sum(0)).clamp_min(0) + noise
        each = functional.logsigmoid(2 * (new + cross @ weights) / spread[:, None])
        return each.log_softmax(-1)

    return Posterior(log_z, predict)


def softmax(mean: Tensor, kernel: Tensor, labels: Tensor) -> Posterior:
    """The posterior of classes by Laplace; mean [n, C], kernel [n, n], labels [n].

    One of Newton's steps from the mode is in the graph: its derivative there is the mode's own.
    """
    target = functional.one_hot(labels, mean.shape[1]).to(mean)
    with torch.no_grad():
        mode = kernel @ mode_of(mean, kernel, labels, target)
    weights = newton(mean, kernel, target, mode)
    moved = kernel @ weights
    bend = _bend(kernel, (mean + moved).softmax(-1))
    log_z = _height(mean, kernel, labels, weights) - bend.log_det / 2

    def predict(new: Tensor, cross: Tensor, own: Tensor) -> Tensor:
        seen = bend.each @ cross.T  # [C, n, m]
        both = solved(bend.factor, seen)
        spread = own - (seen * cross.T).sum(1) + both.square().sum(1)
        middle = new + cross @ weights
        return (middle / (1 + math.pi / 8 * spread.clamp_min(0).T).sqrt()).log_softmax(-1)

    return Posterior(log_z, predict)


# ---- the mode


@dataclass(frozen=True)
class Bend:
    """E_c [C, n, n], the factor of their sum, and log det(I + K W)."""

    each: Tensor
    factor: Tensor
    log_det: Tensor


def _bend(kernel: Tensor, shares: Tensor) -> Bend:
    """The curvature of the likelihood, where these are the probabilities [n, C]."""
    root = shares.T.clamp_min(TINY).sqrt()
    inner = torch.eye(len(kernel)).to(kernel) + root[:, :, None] * kernel * root[:, None]
    below = lower(inner)
    each = root[:, :, None] * torch.cholesky_inverse(below) * root[:, None]
    factor = lower(each.sum(0))
    logs = below.diagonal(dim1=1, dim2=2).log().sum() + factor.diagonal().log().sum()
    return Bend(each, factor, 2 * logs)


def newton(mean: Tensor, kernel: Tensor, target: Tensor, moved: Tensor) -> Tensor:
    """The weights after a step of Newton's method, where f is so far from its mean."""
    shares = (mean + moved).softmax(-1)
    bend, weighed = _bend(kernel, shares), shares * moved
    slope = weighed - shares * weighed.sum(-1, keepdim=True) + target - shares
    seen = bend.each @ (kernel @ slope).T[..., None]  # [C, n, 1]
    common = torch.cholesky_solve(seen.sum(0), bend.factor)
    return slope - (seen - bend.each @ common)[..., 0].T


def mode_of(mean: Tensor, kernel: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """The weights at the mode; a step that would lead down is halved until it does not."""
    at = torch.zeros_like(mean)
    height = _height(mean, kernel, labels, at)
    for _ in range(STEPS):
        way, share = newton(mean, kernel, target, kernel @ at) - at, 1.0
        found = _height(mean, kernel, labels, at + way)
        while not found >= height and share > LEAST:
            share /= 2
            found = _height(mean, kernel, labels, at + share * way)
        gained = found - height
        if not gained >= 0:
            break
        at, height = at + share * way, found
        if gained <= TINY * (1 + abs(height)):
            break
    return at


def _height(mean: Tensor, kernel: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """log p(y | f) - 1/2 sum_c a_c K a_c."""
    moved = kernel @ weights
    fit = functional.cross_entropy(mean + moved, labels, reduction="sum")
    return -fit - (weights * moved).sum() / 2
