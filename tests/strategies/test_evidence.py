"""Evidence and posteriors against closed forms, dense algebra and integrals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal
from torch.nn import functional

from flexp.dice import Dice
from flexp.strategies.evidence import Posterior, least_squares, mode_of, newton, softmax
from flexp.strategies.priors import Family, mixture

LABELS = torch.tensor([0, 1, 2, 1, 0, 0])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def kernel_of(x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
    return scale * (-torch.cdist(x, y).square() / 4).exp()


def with_one(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones(len(x), 1).double()], dim=1) / math.sqrt(5)


def test_one_row_of_two_classes_by_hand() -> None:
    # Codes 1 and -1 under N(0, 1 + 1): log Z = 2 (-1/4 - ln(4 pi) / 2) = -1/2 - ln(4 pi). In the
    # same place mu = 1/2 and -1/2, v = 1 - 1/2; so 2 mu / (v + 1) = 2/3 and -2/3 are the log odds,
    # and the shares of both add up to 1 already.
    one = torch.ones(1, 1).double()
    found = least_squares(torch.zeros(1, 2).double(), one, torch.tensor([0]), torch.tensor(1.0))
    assert float(found.log_z) == pytest.approx(-0.5 - math.log(4 * math.pi))
    told = found.predict(torch.zeros(1, 2).double(), one, one[0])
    assert float(told[0, 0].exp()) == pytest.approx(1 / (1 + math.exp(-2 / 3)))


def test_a_bayesian_linear_head_has_its_closed_form() -> None:
    # In weights: A = Phi' Phi / s + I / S, w = A^-1 (Phi' y / s + m / S), log Z = log N(y; Phi m,
    # S Phi Phi' + s I); a new row has mean phi w and variance phi A^-1 phi' + s.
    family = Family("linear", "codes", 4, 3)
    xi, x, new = family.drawn(1, Dice(0))[0].double(), drawn(6, 4), drawn(2, 4, seed=1)
    held, phi = family.parts(xi), with_one(x)
    scale = functional.softplus(held["scale"])
    noise = functional.softplus(held["noise"]) + 1e-3
    codes = 2 * functional.one_hot(LABELS, 3).double() - 1
    spread = scale * phi @ phi.T + noise * torch.eye(6).double()
    wanted = sum(
        MultivariateNormal(phi @ m, spread).log_prob(code)
        for m, code in zip(held["mean"], codes.T, strict=True)
    )
    found = family.posterior(xi, x, LABELS)
    assert float(found.log_z) == pytest.approx(float(wanted), rel=1e-10)
    precision = phi.T @ phi / noise + torch.eye(5).double() / scale
    weights = torch.linalg.solve(precision, phi.T @ codes / noise + held["mean"].T / scale)
    ahead = with_one(new)
    sure = (ahead @ torch.linalg.inv(precision) * ahead).sum(1) + noise
    told = family.predicted(xi, found, x, new)
    odds = (2 * ahead @ weights / sure[:, None]).sigmoid()
    assert torch.allclose(told.exp(), odds / odds.sum(1, keepdim=True), rtol=0, atol=1e-9)


def test_what_is_said_of_a_class_is_what_its_codes_say() -> None:
    # N(1; mu_c, v + s) against N(-1; mu_c, v + s), and then shares of all classes.
    x, new, mean = drawn(6, 2), drawn(1, 2, seed=1), drawn(6, 3, seed=2)
    noise = torch.tensor(0.3, dtype=torch.float64)
    found = least_squares(mean, kernel_of(x, x), LABELS, noise)
    told = found.predict(torch.zeros(1, 3).double(), kernel_of(new, x), torch.ones(1).double())
    inverse = torch.linalg.inv(kernel_of(x, x) + 0.3 * torch.eye(6).double())
    middle = kernel_of(new, x) @ inverse @ (2 * functional.one_hot(LABELS, 3) - 1 - mean)
    spread = 1.3 - kernel_of(new, x) @ inverse @ kernel_of(x, new)
    normal = torch.distributions.Normal(middle[0], spread[0].sqrt())
    yes, no = (normal.log_prob(torch.tensor(code).double()).exp() for code in (1.0, -1.0))
    each = yes / (yes + no)
    assert torch.allclose(told[0].exp(), each / each.sum(), rtol=0, atol=1e-9)


# ---- softmax


def dense(mean: Tensor, kernel: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Laplace with matrices [nC, nC] and plain small steps: log Z, the mode and its covariance."""
    count, classes = mean.shape
    target, whole = functional.one_hot(labels, classes), torch.block_diag(*[kernel] * classes)
    flat = mean.T.reshape(-1)
    inverse, mode, bend = torch.linalg.inv(whole), flat, whole
    for _ in range(200):
        shares = mode.view(classes, count).softmax(0)
        bend = torch.diag(shares.reshape(-1)) - shares_squared(shares)
        slope = (target.T - shares).reshape(-1) - inverse @ (mode - flat)
        mode = mode + 0.5 * torch.linalg.solve(inverse + bend, slope)
    fit = functional.cross_entropy(mode.view(classes, count).T, labels, reduction="sum")
    rest = (mode - flat) @ inverse @ (mode - flat)
    size = torch.linalg.slogdet(torch.eye(count * classes) + whole @ bend).logabsdet
    return -fit - rest / 2 - size / 2, mode.view(classes, count).T, torch.linalg.inv(inverse + bend)


def shares_squared(shares: Tensor) -> Tensor:
    """Pi Pi'."""
    classes, count = shares.shape
    stacked = torch.cat([torch.diag(s) for s in shares])
    assert stacked.shape == (classes * count, count)
    return stacked @ stacked.T


def test_laplace_is_what_dense_matrices_say() -> None:
    x, mean = drawn(6, 2), drawn(6, 3, seed=1)
    kernel = kernel_of(x, x, 4.0)
    log_z, mode, spread = dense(mean, kernel, LABELS)
    found = softmax(mean, kernel, LABELS)
    assert float(found.log_z) == pytest.approx(float(log_z), rel=1e-9)
    # Of the rows themselves mu is the mode, and v the covariance's diagonal.
    told = found.predict(mean, kernel, kernel.diagonal())
    scale = (1 + math.pi / 8 * spread.diagonal().view(3, 6).T).sqrt()
    assert torch.allclose(told, (mode / scale).log_softmax(-1), rtol=0, atol=1e-7)


def test_laplace_is_near_the_integral() -> None:
    # One row of two classes: log of the mean of sigmoid(f_0 - f_1), where f_0 - f_1 ~ N(1, 2).
    found = softmax(torch.tensor([[1.0, 0.0]]).double(), torch.ones(1, 1).double(), LABELS[:1])
    grid = torch.linspace(-15, 17, 4001).double()
    density = torch.distributions.Normal(1.0, 2**0.5).log_prob(grid).exp()
    exact = (density * grid.sigmoid()).sum() * 32 / 4000
    assert float(found.log_z.exp()) == pytest.approx(float(exact), rel=0.03)


@pytest.mark.parametrize("form", ["gp", "linear"])
@pytest.mark.parametrize("likelihood", ["codes", "softmax"])
def test_the_slope_of_the_evidence_is_its_own(form: str, likelihood: str) -> None:
    family = Family(form, likelihood, 3, 3, hidden=2)  # pyright: ignore[reportArgumentType]
    x, labels, xi = drawn(6, 3), LABELS, family.drawn(1, Dice(1))[0].double().requires_grad_()
    (slope,) = torch.autograd.grad(family.posterior(xi, x, labels).log_z, xi)
    for n in range(len(xi)):
        step = torch.zeros_like(xi)
        step[n] = 1e-5
        with torch.no_grad():
            up, down = (family.posterior(xi + s, x, labels).log_z for s in (step, -step))
        assert float(slope[n]) == pytest.approx(float(up - down) / 2e-5, abs=1e-6), n


def test_the_mode_is_found_where_plain_steps_of_newton_leap() -> None:
    # Where the prior's mean is sure of what is wrong the likelihood is straight: a step goes by K.
    x = drawn(6, 2)
    target = functional.one_hot(LABELS, 3).double()
    kernel, mean = kernel_of(x, x, 1e4), 20 * target.roll(1, dims=1)
    weights = mode_of(mean, kernel, LABELS, target)
    assert torch.allclose(
        weights, target - (mean + kernel @ weights).softmax(-1), rtol=0, atol=1e-6
    )
    leaping = torch.zeros_like(mean)
    for _ in range(50):
        leaping = newton(mean, kernel, target, kernel @ leaping)
    assert not torch.allclose(leaping, weights, rtol=0, atol=1e-3)


# ---- no rows, and what priors share


@pytest.mark.parametrize("form", ["gp", "linear"])
@pytest.mark.parametrize("likelihood", ["codes", "softmax"])
def test_a_client_without_rows_has_uniform_weights(form: str, likelihood: str) -> None:
    family = Family(form, likelihood, 3, 3, hidden=2)  # pyright: ignore[reportArgumentType]
    cloud, none = family.drawn(4, Dice(0)).double(), drawn(0, 3)
    mixed = mixture(family, cloud, none, LABELS[:0])
    assert mixed.weights.exp().tolist() == pytest.approx([1 / 4] * 4)
    told = mixed.predict(drawn(2, 3, seed=1))
    assert told.exp().sum(1).tolist() == pytest.approx([1, 1])


def test_weights_are_shares_of_the_evidence() -> None:
    family = Family("gp", "codes", 3, 3, hidden=2)
    cloud, x, new = family.drawn(3, Dice(0)).double(), drawn(6, 3), drawn(2, 3, seed=1)
    found: list[Posterior] = [family.posterior(xi, x, LABELS) for xi in cloud]
    shares = torch.stack([one.log_z for one in found]).exp()
    pairs = zip(shares / shares.sum(), cloud, found, strict=True)
    wanted = sum(w * family.predicted(xi, one, x, new).exp() for w, xi, one in pairs)
    mixed = mixture(family, cloud, x, LABELS)
    assert torch.allclose(mixed.predict(new).exp(), torch.as_tensor(wanted), rtol=0, atol=1e-12)
    alone = mixture(family, cloud[:1], x, LABELS).predict(new)
    assert not torch.allclose(alone.exp(), torch.as_tensor(wanted), atol=1e-3)
