"""How tensors are rounded to travel: bounds of the error, sizes, and what is refused."""

from __future__ import annotations

from math import inf, nan
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flexp.errors import LinkError
from flexp.link.wire import (
    GROUP,
    MOST,
    Wire,
    arrived,
    crossed,
    crossing_bytes,
    pack,
    packed_bytes,
    parts_of,
    unpack,
)
from flexp.recipe import LinkRecipe
from flexp.recipe import Wire as Asked

WIRES: tuple[Wire, ...] = get_args(Wire)
ROUNDED = WIRES[1:]
INTS: tuple[Wire, ...] = ("int8", "int8-group")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

shapes = st.one_of(
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 150)),
    st.tuples(st.integers(1, 3), st.integers(1, 5)),
    st.tuples(st.integers(1, 130)),
)


@st.composite
def tensors(draw: st.DrawFn, least: int = -40, most: int = 38) -> Tensor:
    """Values of very unlike sizes, with rows of zeros."""
    shape = draw(shapes)
    stream = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    low, high = sorted(draw(st.tuples(st.integers(least, most), st.integers(least, most))))
    exponents = torch.rand(shape, generator=stream, dtype=torch.float64) * (high - low) + low
    signs = torch.randint(-1, 2, shape, generator=stream)
    x = (signs * 10**exponents).float()
    if draw(st.booleans()) and x.dim() > 1:
        x[0] = 0
    return x


def sizes(parts: dict[str, Tensor]) -> int:
    return sum(p.numel() * p.element_size() for p in parts.values())


def told(parts: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (p.dtype, tuple(p.shape)) for name, p in parts.items()}


def test_a_recipe_knows_these_wires_and_no_other() -> None:
    assert get_args(Asked) == WIRES
    asked = LinkRecipe(wire="bf16", wires={"anna": "int8"})
    assert [asked.of(c) for c in ("anna", "ben")] == ["int8", "bf16"]


# ---- laws of all wires


@given(tensors(), st.sampled_from(WIRES), st.sampled_from(FLOATS))
def test_parts_are_what_was_told_and_the_shape_comes_back(
    x: Tensor, wire: Wire, dtype: torch.dtype
) -> None:
    x = x.clamp(-1e4, 1e4).to(dtype)
    before, parts = x.clone(), pack(x, wire)
    assert told(parts) == parts_of(tuple(x.shape), dtype, wire)
    assert sizes(parts) == packed_bytes(tuple(x.shape), dtype, wire) <= x.numel() * x.element_size()
    out = unpack(parts, wire, dtype)
    assert (out.shape, out.dtype) == (x.shape, dtype)
    assert torch.equal(x, before)
    assert out.isfinite().all()


@given(tensors(), st.sampled_from(WIRES))
def test_packing_once_more_changes_nothing(x: Tensor, wire: Wire) -> None:
    once = arrived("hidden", x, wire)
    assert torch.equal(arrived("hidden", once, wire), once)
    again, parts = pack(x.clone(), wire), pack(x, wire)
    assert all(torch.equal(parts[k], again[k]) for k in parts)


@given(tensors(), st.sampled_from(ROUNDED))
def test_parts_that_went_as_bytes_give_the_same_bits(x: Tensor, wire: Wire) -> None:
    parts = pack(x, wire)
    came = {
        name: torch.frombuffer(
            bytearray(p.contiguous().view(torch.uint8).numpy().tobytes()), dtype=p.dtype
        ).reshape(p.shape)
        for name, p in parts.items()
    }
    assert torch.equal(unpack(came, wire, x.dtype), arrived("hidden", x, wire))


# ---- how far off


@given(tensors(least=-37))
def test_bf16_is_off_by_less_than_one_part_in_256(x: Tensor) -> None:
    out = arrived("hidden", x, "bf16").double()
    assert ((out - x).abs() <= x.double().abs() * 2**-8).all()


@given(tensors(least=-4, most=4))
def test_fp16_is_off_by_less_than_one_part_in_2048_in_its_range(x: Tensor) -> None:
    out = arrived("hidden", x, "fp16").double()
    assert ((out - x).abs() <= x.double().abs() * 2**-11).all()


@given(tensors(), st.sampled_from(INTS))
def test_int8_is_off_by_at_most_half_a_scale(x: Tensor, wire: Wire) -> None:
    parts = pack(x, wire)
    assert "scale" in parts or packed_bytes(tuple(x.shape), x.dtype, wire) == 4 * x.numel()
    if "scale" not in parts:
        return
    scale = parts["scale"].double()
    if wire == "int8-group":
        scale = scale.repeat_interleave(GROUP, -1)[..., : x.shape[-1]]
    off = (unpack(parts, wire, x.dtype).double() - x.double()).abs()
    assert (off <= scale / 2 * (1 + 1e-6)).all()
    assert int(parts["int8"].abs().max()) <= MOST


def test_a_group_is_spared_the_outlier_of_another() -> None:
    x = torch.randn(4, 5, 130, generator=torch.Generator().manual_seed(0))
    x[..., 3] = 300.0
    off = {w: (arrived("hidden", x, w) - x)[..., GROUP:].abs().max() for w in INTS}
    assert off["int8"] > 50 * off["int8-group"]


def test_halves_go_to_the_even_side() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert pack(x, "int8")["int8"].tolist() == [[127, 0, 2, 2, 0, -2]]


# ---- what is left as it is


@pytest.mark.parametrize("wire", WIRES)
def test_what_would_not_become_smaller_is_the_tensor_itself(wire: Wire) -> None:
    number, empty = torch.tensor(0.3), torch.zeros(0, 4, 8)
    mask, labels = torch.ones(2, 3, dtype=torch.bool), torch.tensor([1, 2])
    for x in (number, empty, mask, labels):
        assert pack(x, wire)["value"] is x
        assert unpack(pack(x, wire), wire, x.dtype) is x


def test_fp32_costs_nothing_and_bf16_is_exact_where_it_is() -> None:
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    assert unpack(pack(x, "fp32"), "fp32", x.dtype) is x
    held = {"hidden": x.bfloat16()}
    for wire in ("fp32", "bf16", "fp16"):
        assert crossed(held, wire)["hidden"] is held["hidden"]
    assert packed_bytes((2, 3, 8), torch.bfloat16, "int8") == 2 * 3 * (8 + 2)


def test_only_hidden_states_logits_and_gradients_are_packed() -> None:
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    names = ["hidden", "logits", "grad", "mask", "labels", "loss", "coef/0", "slot/a/b", "tensor/c"]
    came = crossed(dict.fromkeys(names, x), "int8")
    assert [n for n in names if came[n] is not x] == names[:3]
    small = {n for n in names if crossing_bytes(n, x, "int8") < crossing_bytes(n, x, "fp32")}
    assert small == set(names[:3])


# ---- the ends of the range


def test_what_fp16_cannot_hold_becomes_its_largest() -> None:
    x = torch.tensor([[1e6, -7e4, 2.0, inf, -inf, nan]])
    out = arrived("hidden", x, "fp16")
    assert out[0, :5].tolist() == [65504.0, -65504.0, 2.0, inf, -inf]
    assert out[0, 5].isnan()
    most = torch.finfo(torch.float32).max
    assert arrived("hidden", torch.tensor([[most, 1.0]]), "bf16").isfinite().all()


@pytest.mark.parametrize("wire", INTS)
@pytest.mark.parametrize("odd", [nan, inf, -inf])
def test_int8_refuses_what_is_not_finite_and_names_it(wire: Wire, odd: float) -> None:
    x = torch.ones(2, 3, 100)
    x[1, 2, 99] = odd
    with pytest.raises(LinkError, match=r'"grad" has NaN or infinity.*link\.wire to bf16'):
        pack(x, wire, name="grad")


@pytest.mark.parametrize("wire", INTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_int8_holds_the_largest_and_the_smallest(wire: Wire, dtype: torch.dtype) -> None:
    ends = torch.finfo(dtype)
    x = torch.tensor([[ends.max, ends.min, 0.0], [ends.tiny, -ends.tiny, 0.0], [0.0] * 3])
    out = arrived("grad", x.to(dtype), wire)
    assert out.isfinite().all()
    assert out[0, 0] > 0.99 * ends.max
    assert out[2].tolist() == [0.0] * 3
    assert ((out.double() - x.double()).abs() <= x.double().abs().amax(-1, keepdim=True) / 200)[
        0
    ].all()


def test_a_small_gradient_survives() -> None:
    """fp16 scales would have made it nothing."""
    x = 1e-9 * torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    out = arrived("grad", x, "int8")
    assert torch.nn.functional.cosine_similarity(out.flatten(), x.flatten(), 0) > 0.9999


# ---- parts that do not fit


def test_parts_that_pack_does_not_make_are_refused() -> None:
    parts = pack(torch.randn(2, 3, 100, generator=torch.Generator().manual_seed(0)), "int8-group")
    bad: list[tuple[dict[str, Tensor], Wire]] = [
        ({}, "int8"),
        (parts, "int8"),
        (parts, "bf16"),
        ({"int8": parts["int8"]}, "int8-group"),
        ({**parts, "scale": parts["scale"].float()}, "int8-group"),
        ({**parts, "scale": parts["scale"][:1]}, "int8-group"),
        ({**parts, "value": parts["scale"]}, "int8-group"),
    ]
    for wrong, wire in bad:
        with pytest.raises(LinkError, match="same recipe"):
            unpack(wrong, wire, torch.float32)
