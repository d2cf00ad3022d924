"""Priors of latent functions of features, as vectors of numbers xi, and a hyper-prior of these.

"gp":      f_c ~ GP(m, s exp(-|g(x) - g(y)|^2 / (2 l^2))),  g(x) = W tanh(V x + b), or x / sqrt(d)
"linear":  f_c = w_c (x, 1) / sqrt(d + 1),  w_c ~ N(m_c, s I): a Bayesian linear head
xi holds m, V, W, b as they are, and l, s and the noise before a softplus. All its numbers are
normal and independent under the hyper-prior.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from flexp.dice import Dice
from flexp.strategies.evidence import Posterior, least_squares, softmax
from flexp.tensors import Tensors

LEAST = 1e-3  # of noise, and of a lengthscale


class Piece(NamedTuple):
    """A part of xi: its shape, and the hyper-prior's mean and standard deviation."""

    shape: tuple[int, ...]
    mean: float
    std: float


@dataclass(frozen=True)
class Family:
    """Priors of one form for so many features and classes, and how labels are seen.

    ``hidden`` numbers are in the middle of g, and as many come out of it; with 0 there is no g.
    The hyper-prior's deviation of b is ``bias`` over the root of the features.
    """

    form: Literal["gp", "linear"]
    likelihood: Literal["codes", "softmax"]
    features: int
    classes: int
    hidden: int = 16
    bias: float = 20.0

    def pieces(self) -> dict[str, Piece]:
        """What xi is made of, in order."""
        noise = {"noise": Piece((), 0.0, 1.0)} if self.likelihood == "codes" else {}
        scale = {"scale": Piece((), 1.0, 1.0), **noise}
        if self.form == "linear":
            return {**scale, "mean": Piece((self.classes, self.features + 1), 0.0, 1.0)}
        single = {**scale, "mean": Piece((), 0.0, 1.0), "length": Piece((), 1.0, 3.0)}
        if not self.hidden:
            return single
        wide = self.hidden, self.features
        return {
            **single,
            "inner": Piece(wide, 0.0, math.sqrt(2 / self.features)),
            "bias": Piece(wide[:1], 0.0, self.bias / math.sqrt(self.features)),
            "outer": Piece((self.hidden, self.hidden), 0.0, math.sqrt(2 / self.hidden)),
        }

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of every number of xi under the hyper-prior."""
        sizes = [(math.prod(p.shape), p) for p in self.pieces().values()]
        mean = torch.cat([torch.full((n,), p.mean) for n, p in sizes])
        return mean, torch.cat([torch.full((n,), p.std) for n, p in sizes])

    def drawn(self, count: int, dice: Dice) -> Tensor:
        """So many xi of the hyper-prior, [K, |xi|]."""
        mean, std = self.moments()
        return mean + std * torch.randn(count, len(mean), generator=dice.generator())

    def parts(self, xi: Tensor) -> Tensors:
        """The pieces of a vector."""
        found, at = Tensors(), 0
        for name, piece in self.pieces().items():
            size = math.prod(piece.shape)
            found[name], at = xi[at : at + size].reshape(piece.shape), at + size
        return found

    def posterior(self, xi: Tensor, features: Tensor, labels: Tensor) -> Posterior:
        """What rows say under one prior; its ``predict`` is of ``new``."""
        held, features = self.parts(xi), features.to(xi)
        mean, kernel = self.mean(held, features), self.kernel(held, features, features)
        if self.likelihood == "softmax":
            return softmax(mean, kernel, labels)
        return least_squares(mean, kernel, labels, functional.softplus(held["noise"]) + LEAST)

    def predicted(self, xi: Tensor, known: Posterior, features: Tensor, new: Tensor) -> Tensor:
        """log p [m, C] of new rows, from the posterior of the rows with these features."""
        held, features, new = self.parts(xi), features.to(xi), new.to(xi)
        cross, own = self.kernel(held, new, features), self.spread(held, new)
        return known.predict(self.mean(held, new), cross, own)

    def mean(self, held: Tensors, x: Tensor) -> Tensor:
        """The prior's mean of rows, [n, C]."""
        if self.form == "gp":
            return held["mean"].expand(len(x), self.classes)
        return lengthened(x) @ held["mean"].T

    def kernel(self, held: Tensors, x: Tensor, y: Tensor) -> Tensor:
        """The prior's covariance of rows with others, [n, m]."""
        scale = functional.softplus(held["scale"])
        if self.form == "linear":
            return scale * lengthened(x) @ lengthened(y).T
        length = functional.softplus(held["length"]) + LEAST
        a, b = self.seen(held, x), self.seen(held, y)
        squares = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
        return scale * (-squares.clamp_min(0) / (2 * length.square())).exp()

    def spread(self, held: Tensors, x: Tensor) -> Tensor:
        """The prior's variance of rows, [n]."""
        sizes = lengthened(x).square().sum(1)
        return functional.softplus(held["scale"]) * (
            sizes if self.form == "linear" else torch.ones_like(sizes)
        )

    def seen(self, held: Tensors, x: Tensor) -> Tensor:
        """g of rows."""
        if not self.hidden:
            return x / math.sqrt(self.features)
        return torch.tanh(x @ held["inner"].T + held["bias"]) @ held["outer"].T


@dataclass(frozen=True)
class Mixture:
    """A client's posteriors under several priors, each by its share of their evidence, in logs."""

    weights: Tensor
    each: Sequence[Callable[[Tensor], Tensor]]

    def predict(self, new: Tensor) -> Tensor:
        """log p [m, C] of new rows."""
        pairs = zip(self.weights, self.each, strict=True)
        return torch.stack([weight + one(new) for weight, one in pairs]).logsumexp(0)


def mixture(family: Family, cloud: Tensor, features: Tensor, labels: Tensor) -> Mixture:
    """What rows say under priors [K, |xi|]."""
    with torch.no_grad():
        found = [family.posterior(xi, features, labels) for xi in cloud]
        weights = torch.stack([one.log_z for one in found]).log_softmax(0)
    each = [
        partial(family.predicted, xi, one, features) for xi, one in zip(cloud, found, strict=True)
    ]
    return Mixture(weights, each)


def lengthened(x: Tensor) -> Tensor:
    """Rows with a 1 behind, over the root of how many numbers that are."""
    return functional.pad(x, (0, 1), value=1.0) / math.sqrt(x.shape[1] + 1)
