"""Stein variational gradient descent, by hand and against its formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flexp.strategies.svgd import direction


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def test_one_particle_climbs_alone() -> None:
    slope = drawn(1, 5)
    assert torch.equal(direction(drawn(1, 5, seed=1), slope), slope)


def test_two_particles_by_hand() -> None:
    # At 0 and 2, |.|^2 is 4, so h^2 = 4 / (2 ln 3) and k = exp(-4 / (2 h^2)) = 1/3. The gradient of
    # k along the one at 2 is -2 / h^2 k = -ln 3 / 3, which pushes the one at 0 down.
    found = direction(torch.tensor([[0.0], [2.0]]), torch.tensor([[6.0], [3.0]]))
    push = math.log(3) / 3
    assert found.flatten().tolist() == pytest.approx([(6 + 1 - push) / 2, (2 + 3 + push) / 2])


def test_the_direction_is_that_of_the_formula() -> None:
    at, slopes = drawn(4, 3), drawn(4, 3, seed=1)
    pairs = [(at[i] - at[j]).square().sum() for i in range(4) for j in range(i)]
    square = torch.stack(pairs).quantile(0.5) / (2 * math.log(5))
    for k in range(4):
        wanted = torch.zeros(3).double()
        for j in range(4):
            mine = at[j].clone().requires_grad_()
            near = (-(mine - at[k]).square().sum() / (2 * square)).exp()
            (away,) = torch.autograd.grad(near, mine)
            wanted += (near.detach() * slopes[j] + away) / 4
        assert torch.allclose(direction(at, slopes)[k], wanted, rtol=0, atol=1e-12)


def test_equal_particles_stay_equal_and_others_do_not_notice_their_order() -> None:
    at, slopes = drawn(1, 3).expand(2, 3), drawn(1, 3, seed=1).expand(2, 3)
    assert torch.equal(direction(at, slopes), slopes)
    three = torch.cat([at, drawn(1, 3, seed=2)])
    found = direction(three, three)
    assert torch.allclose(found[0], found[1], rtol=0, atol=1e-15)
    assert torch.allclose(direction(three.flip(0), three.flip(0)).flip(0), found, atol=1e-15)


def climbed(at: Tensor, *, together: bool) -> Tensor:
    """Where particles get to on log N(x; 3, 1), together or each alone."""
    for _ in range(150):
        slopes = 3 - at
        alone = torch.cat([direction(a[None], s[None]) for a, s in zip(at, slopes, strict=True)])
        at = at + 0.4 * (direction(at, slopes) if together else alone)
    return at


def test_distinct_particles_do_not_collapse_but_those_alone_do() -> None:
    begun = drawn(6, 1)
    ends = climbed(begun, together=True)
    assert float(torch.pdist(ends).min()) > 0.2
    assert float(ends.mean()) == pytest.approx(3, abs=0.02)
    assert 0.5 < float(ends.std()) < 1.1
    assert float(torch.pdist(climbed(begun, together=False)).max()) < 1e-12
