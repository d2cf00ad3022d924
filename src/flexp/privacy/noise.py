"""Clipped vectors with Gaussian noise, as in differentially private sums.

The variance is that of the Gaussian mechanism, 2 ln(1.25/delta) clip^2/epsilon^2 (Dwork and Roth
2014, for epsilon < 1 and a sensitivity of ``clip``). No guarantee is claimed: the noise is of the
run's dice, so who knows the seed can take it away, and what many vectors tell together is not
counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flexp.dice import Dice


@dataclass(frozen=True)
class Noise:
    """The largest norm that a vector may have (None: any), and epsilon (None: no noise)."""

    clip: float | None = None
    epsilon: float | None = None
    delta: float = 1e-5

    @property
    def spread(self) -> float:
        """The standard deviation of what is added to every number."""
        if self.clip is None or self.epsilon is None:
            return 0.0
        return math.sqrt(2 * math.log(1.25 / self.delta)) * self.clip / self.epsilon


def noised(vector: Tensor, dice: Dice, how: Noise) -> Tensor:
    """The vector, clipped, with noise added."""
    if how.clip is not None and (size := math.sqrt(vector.square().sum())) > how.clip:
        vector = vector * (how.clip / size)
    if not how.spread:
        return vector
    drawn = torch.randn(vector.shape, generator=dice.generator(), dtype=vector.dtype)
    return vector + how.spread * drawn
