"""bfloat16 weights, multiplied in float32: what comes out, and how much memory it takes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from flexp import precision, quantized
from flexp.model.meter import Meter


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(torch.bfloat16)


@pytest.fixture(params=[1 << 20, 100])
def wide(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
    """Wide products, in tiles of so many numbers."""
    monkeypatch.setattr(precision, "wide_is_faster", lambda: True)
    monkeypatch.setattr(quantized, "TILE", request.param)
    return request.param


@pytest.mark.parametrize("bias", [True, False])
def test_a_wide_product_rounds_once(wide: int, bias: bool) -> None:
    """Nearer to the true product than a unit of the last place, and so is its gradient."""
    x, weight = numbers(3, 17, 24).requires_grad_(), numbers(40, 24, seed=1)
    b = numbers(40, seed=2) if bias else None
    out = precision.product(x, weight, b)
    grad = numbers(*out.shape, seed=3)
    (found,) = torch.autograd.grad(out, x, grad)
    true = functional.linear(x.double(), weight.double(), None if b is None else b.double())
    assert out.dtype == found.dtype == torch.bfloat16
    assert torch.equal(out, true.to(torch.bfloat16)) or torch.allclose(
        out.double(), true, rtol=2**-8, atol=1e-5
    )
    assert torch.allclose(found.double(), grad.double() @ weight.double(), rtol=2**-8, atol=1e-5)


def test_only_frozen_bfloat16_on_the_processor_is_made_wide(wide: int) -> None:
    weight = numbers(4, 4)
    assert precision.suits(weight)
    assert not precision.suits(weight.float())
    assert not precision.suits(weight.to("meta"))
    assert not precision.suits(nn.Parameter(weight))


def test_where_bfloat16_is_fast_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "wide_is_faster", lambda: False)
    x, weight = numbers(3, 24), numbers(40, 24, seed=1)
    assert torch.equal(precision.product(x, weight), functional.linear(x, weight))


def test_a_weight_is_never_wide_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "wide_is_faster", lambda: True)
    monkeypatch.setattr(quantized, "TILE", 1 << 10)
    model = nn.Linear(1024, 1024, bias=False).to(torch.bfloat16).requires_grad_(requires_grad=False)
    precision.widen(model)
    x = numbers(precision.FEW, 1024)
    with Meter() as meter:
        model(x)
    wide = 4 * 1024 * 1024
    assert meter.peak < wide / 4
    assert torch.allclose(model(x), functional.linear(x, model.weight), rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize(
    ("facts", "wide"),
    [
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True}, True),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, False),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, False),
        ({"cpu_name": "AMD EPYC"}, True),
        ({"architecture": "arm64"}, False),
    ],
)
def test_what_is_known_of_processors(
    facts: dict[str, object], wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64"} | facts)
    assert precision.wide_is_faster.__wrapped__() == wide


def test_few_rows_are_multiplied_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "wide_is_faster", lambda: True)
    monkeypatch.setattr(quantized, "TILE", 1)
    x, weight = numbers(precision.FEW - 1, 24), numbers(40, 24, seed=1)
    assert torch.equal(precision.product(x, weight), functional.linear(x, weight))
