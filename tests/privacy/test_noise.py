"""Clipping and Gaussian noise: the numbers that they are named with."""

from __future__ import annotations

import math

import pytest
import torch

from flexp.dice import Dice
from flexp.privacy.noise import Noise, noised

LONG = torch.tensor([3.0, 4.0]).double()


def test_a_vector_is_cut_to_its_largest_norm_and_else_left() -> None:
    assert torch.equal(noised(LONG, Dice(0), Noise()), LONG)
    assert torch.equal(noised(LONG, Dice(0), Noise(clip=5.0)), LONG)
    assert noised(LONG, Dice(0), Noise(clip=2.5)).tolist() == [1.5, 2.0]


def test_noise_has_the_variance_that_is_told() -> None:
    # 2 ln(1.25 / delta) = 4 where delta is 1.25 / e^2; then 2 * clip / epsilon = 2 * 2 / 0.5.
    how = Noise(clip=2.0, epsilon=0.5, delta=1.25 * math.exp(-2))
    assert how.spread == pytest.approx(8)
    assert Noise(epsilon=0.5).spread == 0
    found = noised(torch.zeros(4000).double(), Dice(0), how)
    assert float(found.std()) == pytest.approx(8, rel=0.05)
    assert abs(float(found.mean())) < 0.5


def test_noise_is_added_and_does_not_depend_on_the_vector() -> None:
    how = Noise(clip=100.0, epsilon=1.0)
    one, other = (noised(v, Dice(0)("x"), how) - v for v in (LONG, 10 * LONG))
    assert torch.allclose(one, other)
    assert not torch.allclose(one, noised(LONG, Dice(0)("y"), how) - LONG)
