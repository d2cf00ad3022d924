"""Weights as codes: by hand, within their bounds, and multiplied as what they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from flexp import precision, quantized
from flexp.model.meter import Meter
from flexp.quantized import GROUP, NORMAL_FLOAT, Form, quantize, quantized_bytes

FORMS: tuple[Form, ...] = ("int8", "nf4")


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_int8_by_hand() -> None:
    """The largest of a row is 127 steps; a row of zeros has no step at all."""
    made = quantize(torch.tensor([[2.54, -1.0, 0.009, 0.011], [0.0, 0.0, 0.0, 0.0]]), "int8")
    assert made.codes.tolist() == [[127, -50, 0, 1], [0, 0, 0, 0]]
    assert made.scales[:, 0].tolist() == pytest.approx([0.02, 0.0])
    expected = torch.tensor([[2.54, -1.0, 0.0, 0.02], [0.0, 0.0, 0.0, 0.0]])
    assert torch.allclose(made.dense(), expected)


def test_nf4_by_hand() -> None:
    """Two groups, of 64 and of 2: each number over the group's largest, to the nearest of 16."""
    row = torch.zeros(1, GROUP + 2)
    row[0, :4] = torch.tensor([-2.0, 1.0, 0.16, 0.05])  # -1, 0.5, 0.08 and 0.025 of the largest
    row[0, GROUP:] = torch.tensor([0.25, -0.25])
    made = quantize(row, "nf4")
    # Codes 0, 12 (0.441), 8 (0.0796) and 7 (0): pairs of them in a byte, the first above.
    assert made.codes[0, :3].tolist() == [0 * 16 + 12, 8 * 16 + 7, 7 * 16 + 7]
    assert made.codes[0, GROUP // 2 :].tolist() == [15 * 16 + 0, *[7 * 16 + 7] * 31]
    assert made.scales.tolist() == [[2.0, 0.25]]
    wide = made.dense()
    assert wide.shape == row.shape
    expected = [-2.0, 2 * 0.44070982933044434, 2 * 0.07958029955625534, 0.0]
    assert wide[0, :4].tolist() == pytest.approx(expected)
    assert wide[0, GROUP:].tolist() == [0.25, -0.25]


def test_the_16_numbers_are_the_papers() -> None:
    """Quantiles of a normal distribution, 8 below and 9 from zero on, one zero, up to 1."""
    low = 0.5 * (1 / 32 + 1 / 30)
    above = torch.special.ndtri(torch.linspace(1 - low, 0.5, 9, dtype=torch.float64))
    below = -torch.special.ndtri(torch.linspace(1 - low, 0.5, 8, dtype=torch.float64))
    found = torch.cat([above, below[:-1]]).sort().values
    assert torch.allclose(NORMAL_FLOAT.double(), found / found.max(), atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 150), st.floats(1e-30, 1e30), st.integers(0, 9))
def test_no_number_is_further_off_than_half_a_step(
    form: Form, rows: int, width: int, size: float, seed: int
) -> None:
    weight = numbers(rows, width, seed=seed) * size
    made = quantize(weight, form)
    off = (made.dense() - weight).abs()
    if form == "int8":
        most = weight.abs().amax(1, keepdim=True) / 254
    else:  # half of the widest gap, between -1 and -0.696, of the group's largest
        groups = weight.split(GROUP, dim=1)
        most = torch.cat([g.abs().amax(1, keepdim=True).expand_as(g) for g in groups], 1) * 0.152
    assert (off <= most * (1 + 1e-5)).all()
    assert made.codes.nbytes + made.scales.nbytes == quantized_bytes((rows, width), form)
    again = quantized.blank((rows, width), form)
    assert (again.codes.shape, again.codes.dtype) == (made.codes.shape, made.codes.dtype)
    assert again.scales.shape == made.scales.shape


@pytest.mark.parametrize("form", FORMS)
def test_tiles_change_no_code(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = numbers(37, 100).to(torch.bfloat16)
    whole = quantize(weight, form)
    monkeypatch.setattr(quantized, "TILE", 300)
    parts = quantize(weight.float(), form)
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.scales, parts.scales)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(form: Form, odd: float) -> None:
    weight = numbers(2, 80)
    weight[1, 3] = odd
    wide = quantize(weight, form).dense()
    assert not wide[1, 3].isfinite()
    assert wide[0].isfinite().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 60])
def test_a_product_is_that_with_what_the_codes_stand_for(form: Form, bias: bool, rows: int) -> None:
    """In one tile bit for bit, forwards and backwards, however few rows there are."""
    x, made = numbers(2, rows, 96).requires_grad_(), quantize(numbers(40, 96, seed=1), form)
    b, dense = numbers(40, seed=2) if bias else None, made.dense()
    out = precision.product(x, made, b)
    assert torch.equal(out, functional.linear(x, dense, b))
    grad = numbers(*out.shape, seed=3)
    (found,) = torch.autograd.grad(out, x, grad)
    assert torch.equal(found, grad @ dense)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wide", [True, False])
def test_a_product_in_tiles_is_the_same_within_rounding(
    form: Form, dtype: torch.dtype, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized, "TILE", 300)
    monkeypatch.setattr(precision, "wide_is_faster", lambda: wide)
    x, made = numbers(2, 60, 96).to(dtype).requires_grad_(), quantize(numbers(40, 96), form)
    out = precision.product(x, made, numbers(40, seed=2).to(dtype))
    grad = numbers(*out.shape, seed=3).to(dtype)
    (found,) = torch.autograd.grad(out, x, grad)
    assert out.dtype == found.dtype == dtype
    dense = made.dense().double()
    close: dict[str, Any] = (
        {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 0.1}
    )
    expected = functional.linear(x.double(), dense, numbers(40, seed=2).to(dtype).double())
    assert torch.allclose(out.double(), expected, **close)
    assert torch.allclose(found.double(), grad.double() @ dense, **close)


@pytest.mark.parametrize("form", FORMS)
def test_neither_making_nor_multiplying_holds_a_weight_wide(
    form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, x = numbers(1024, 1024), numbers(2, 1024).requires_grad_()
    monkeypatch.setattr(quantized, "TILE", 1 << 14)
    with Meter() as meter:
        made = quantize(weight, form)
        quiet = meter.peak
        meter.peak = meter.live
        precision.product(x, made).sum().backward()  # pyright: ignore[reportUnknownMemberType]
        work = meter.peak - quantized_bytes((1024, 1024), form)
    assert quiet < weight.nbytes * 0.7
    assert work < weight.nbytes / 8
