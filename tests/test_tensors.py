"""Selections, mixes and numbers per block."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flexp.errors import AdapterError
from flexp.model.cut import Cut, Seat
from flexp.model.dress import spread
from flexp.selection import ALL, FAR, HEAD, NEAR, NONE, Place, Where, select
from flexp.tensors import (
    PerRow,
    Stacked,
    Tensors,
    Term,
    add,
    add_blocks,
    agreed_mean,
    block_dots,
    dot,
    finite,
    mean,
    mean_by_name,
    mixed,
    norm,
    scale,
    slots_of,
    terms,
    total,
)

DEPTH = 4
SEAT = Seat(Cut(1, 1))
NAMES = {
    "prompt": -1,
    **{f"block{n}.{x}": n for n in range(DEPTH) for x in ("A", "B")},
    "head": DEPTH,
}


def place(name: str, seat: Seat = SEAT) -> Place:
    return seat.place(NAMES[name], DEPTH)


def adapter(seed: int = 0) -> Tensors:
    stream = torch.Generator().manual_seed(seed)
    return {k: torch.randn(3, generator=stream) for k in NAMES}


def taken(where: Where, seat: Seat = SEAT) -> set[str]:
    return {k for k in NAMES if where.holds(k, place(k, seat))}


# ---- selections


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (ALL, set(NAMES)),
        (NONE, set[str]()),
        (NEAR, {"prompt", "block0.A", "block0.B", "block3.A", "block3.B", "head"}),
        (FAR, {"block1.A", "block1.B", "block2.A", "block2.B"}),
        (Where(part="front"), {"prompt", "block0.A", "block0.B"}),
        (Where(part="trunk"), {"block1.A", "block1.B", "block2.A", "block2.B"}),
        (Where(part="tail"), {"block3.A", "block3.B"}),
        (HEAD, {"head"}),
        (Where(last=0), {"head"}),
        (Where(last=2), {"block2.A", "block2.B", "block3.A", "block3.B", "head"}),
        (Where(names="*.A"), {f"block{n}.A" for n in range(DEPTH)}),
        (Where(names="*.a"), set[str]()),  # names have cases
        (Where(side="near", last=1, names="*.B"), {"block3.B"}),
    ],
)
def test_a_selection_by_side_part_depth_and_name(where: Where, expected: set[str]) -> None:
    assert taken(where) == expected
    values = adapter()
    assert select(values, where, place).keys() == expected


def test_a_shared_head_is_far() -> None:
    v_shape = Seat(Cut(2), "logits")
    assert "head" in taken(FAR, v_shape)
    assert taken(HEAD & FAR, v_shape) == {"head"}
    assert taken(HEAD & FAR) == set()
    assert taken(Where(part="tail"), v_shape) == set()


plain = st.builds(
    Where,
    side=st.sampled_from([None, "near", "far"]),
    part=st.sampled_from([None, "front", "trunk", "tail", "head"]),
    last=st.sampled_from([None, 0, 1, 3]),
    names=st.sampled_from(["*", "*.A", "block[12]*", "head"]),
)
wheres = st.recursive(
    plain,
    lambda inner: st.one_of(
        st.builds(lambda w: ~w, inner),
        st.builds(lambda x, y: x & y, inner, inner),
        st.builds(lambda x, y: x | y, inner, inner),
    ),
    max_leaves=6,
)


@given(wheres, wheres)
def test_selections_are_sets(one: Where, two: Where) -> None:
    assert taken(one & two) == taken(one) & taken(two)
    assert taken(one | two) == taken(one) | taken(two)
    assert taken(~one) == set(NAMES) - taken(one)
    assert taken(~(one & two)) == taken(~one | ~two)


def test_selections_in_words() -> None:
    told = {
        "everything": ALL,
        "nothing": ~ALL,
        "all but the head": ~HEAD,
        "the near part": NEAR,
        "the far part and the head": FAR | HEAD,
        "the near part, but not the head": NEAR & ~HEAD,
        "the last 2 blocks and the head": Where(last=2),
        "the trunk, only what is called *.lora_A.*": Where(part="trunk", names="*.lora_A.*"),
    }
    for words, where in told.items():
        assert where.words() == words


@given(wheres)
def test_selections_are_plain_data(where: Where) -> None:
    back = Where.from_json(json.loads(json.dumps(where.to_json())))
    assert back == where
    assert hash(back) == hash(where)


# ---- mixes


def test_a_wear_names_its_slots_once_in_order() -> None:
    mix = (Term("b"), Term("a", 2.0, times="m"), Term("b", -1.0))
    assert slots_of(mix) == ("b", "a", "m")
    assert slots_of("a") == ("a",)
    assert slots_of(Stacked(mix)) == ("b", "a", "m")
    assert slots_of(PerRow(("x", "y"), (0, 1, 0))) == ("x", "y")
    assert terms("a") == (Term("a"),)


def test_a_mix_by_hand() -> None:
    # 2 (1, 2) - (3, 4) (0, 5) + (1, 1) = (3, -15)
    slots = {"a": {"head": v(1, 2)}, "b": {"head": v(3, 4)}, "m": {"head": v(0, 5)}}
    slots["c"] = {"head": v(1, 1)}
    mix = (Term("a", 2.0), Term("b", -1.0, times="m"), Term("c"))
    assert torch.equal(mixed(mix, slots, place)["head"], v(3, -15))
    assert mixed((Term("a"),), slots, place)["head"] is slots["a"]["head"]


def v(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32)


@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=4))
def test_a_mix_is_linear(coefs: list[float]) -> None:
    slots = {str(n): adapter(n) for n in range(len(coefs))}
    found = mixed(tuple(Term(str(n), c) for n, c in enumerate(coefs)), slots, place)
    for k in NAMES:
        dense = sum(c * slots[str(n)][k].double() for n, c in enumerate(coefs))
        assert torch.allclose(found[k].double(), torch.as_tensor(dense), atol=1e-5)


def test_a_mix_of_different_adapters_is_refused() -> None:
    slots = {"a": {"head": v(1), "prompt": v(1)}, "b": {"prompt": v(1)}}
    for mix in ((Term("a"), Term("b")), (Term("b"), Term("a"))):
        with pytest.raises(AdapterError, match="do not hold the same tensors"):
            mixed(mix, slots, place)


def test_adapters_with_no_tensor_in_common_are_side_by_side() -> None:
    slots = {"a": {"head": v(1)}, "b": {"prompt": v(2)}, "c": {"head": v(3)}}
    found = mixed((Term("a"), Term("b", 2.0), Term("c")), slots, place)
    assert {k: float(x) for k, x in found.items()} == {"head": 4, "prompt": 4}


def test_values_per_block_replace_the_number_of_a_term() -> None:
    slots = {"a": {k: v(1.0) for k in NAMES}}
    given_ = torch.arange(6.0)  # before, blocks 0 to 3, after
    found = mixed((Term("a", float("nan")),), slots, place, [given_])
    assert {k: float(x) for k, x in found.items()} == {k: n + 1.0 for k, n in NAMES.items()}


def test_gradients_of_a_mix() -> None:
    slots = {s: {k: x.requires_grad_() for k, x in adapter(n).items()} for n, s in enumerate("abm")}
    coef = torch.tensor(0.5, requires_grad=True)
    mix = (Term("a", coef), Term("b", 3.0, times="m", detach=True))
    value = mixed(mix, slots, place, [spread(coef, DEPTH), None])
    torch.stack([x.sum() for x in value.values()]).sum().backward()
    assert coef.grad is not None
    sums = sum(float(x.detach().sum()) for x in slots["a"].values())
    assert float(coef.grad) == pytest.approx(sums, rel=1e-5)
    for k in NAMES:
        grads: Any = [slots[s][k].grad for s in "abm"]
        assert torch.equal(grads[0], torch.full((3,), 0.5))
        assert grads[1] is None  # detached
        assert torch.allclose(grads[2], 3 * slots["b"][k].detach())


def test_a_spread_coefficient_sums_its_gradient_in_block_order() -> None:
    coef = torch.tensor(1.0, requires_grad=True)
    numbers = v(1e8, 1.0, -1e8, 3.0, 1.0, 1e-3)
    (spread(coef, DEPTH) * numbers).sum().backward()
    expected = numbers[0]
    for x in numbers[1:]:
        expected = expected + x
    assert coef.grad is not None
    assert torch.equal(coef.grad, expected)
    assert spread(coef, DEPTH).shape == (DEPTH + 2,)


# ---- numbers


def test_block_scalars_by_hand() -> None:
    a = {k: v(1.0, 2.0) for k in NAMES}
    b = {k: v(n + 1.0, 1.0) for k, n in NAMES.items()}
    # (1, 2) (n + 1, 1) = n + 3, once before and after the blocks and twice in each.
    assert block_dots(a, b, place, DEPTH) == (2.0, 6.0, 8.0, 10.0, 12.0, 7.0)
    assert total(block_dots(a, b, place, DEPTH)) == 45.0 == dot(a, b)


@given(st.integers(0, 50), st.integers(0, 4), st.integers(0, 4))
def test_near_and_far_block_scalars_add_up_to_the_whole(seed: int, front: int, back: int) -> None:
    seat = Seat(Cut(front, min(back, DEPTH - front)))
    a, b = adapter(seed), adapter(seed + 1)

    def on(side: Where) -> tuple[float, ...]:
        mine, other = (select(x, side, lambda k: place(k, seat)) for x in (a, b))
        return block_dots(mine, other, place, DEPTH)

    whole = block_dots(a, b, place, DEPTH)
    assert add_blocks(on(NEAR), on(FAR)) == whole  # to the last bit
    assert total(add_blocks(on(NEAR), on(FAR))) == total(whole)
    assert total(whole) == pytest.approx(dot(a, b), abs=1e-5)


def test_arithmetic_by_hand() -> None:
    a, b = {"x": v(1, 2), "y": v(2)}, {"x": v(4, 0), "y": v(3)}
    assert add(a, b, 0.5)["x"].tolist() == [3, 2]
    assert scale(a, -2)["y"].tolist() == [-4]
    assert dot(a, b) == 10
    assert norm(a) == 3
    for act in (add, dot):
        with pytest.raises(AdapterError, match=r"'y'"):
            act(a, {"x": v(1, 1)})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_not_finite_is_seen(bad: float) -> None:
    values = adapter()
    assert finite(values)
    values["block2.B"][1] = bad
    assert not finite(values)


# ---- odd numbers


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -1.0])
def test_odd_weights_are_refused(odd: float) -> None:
    items = [{"w": torch.ones(2)}, {"w": torch.zeros(2)}]
    with pytest.raises(AdapterError, match="finite, at least 0 and not all 0"):
        mean(items, [1.0, odd])


def test_huge_and_tiny_weights_are_weights() -> None:
    items = [{"w": torch.ones(2)}, {"w": torch.zeros(2)}]
    for size in (5e-324, 1e-310, 1.0, 1.7e308):
        assert mean(items, [size, size])["w"].tolist() == [0.5, 0.5]


def test_a_tensor_that_only_clients_without_rows_have_is_left_out() -> None:
    """Else one client that trained nothing would end the run of all."""
    items = [{"a": torch.ones(1)}, {"a": torch.zeros(1), "b": torch.ones(1)}]
    assert mean_by_name(items, [4.0, 0.0]) == {"a": torch.ones(1)}
    merged = agreed_mean(items, [4.0, 0.0], {"b": torch.zeros(1)})
    assert list(merged) == ["a"]


@pytest.mark.parametrize("size", [1e-25, 1e-30, 1e25, 1e37])
def test_conflicts_are_projected_out_however_small_or_large_the_numbers(size: float) -> None:
    """The squares of such numbers are zero or infinite in float32."""
    one, other = torch.tensor([size, size]), torch.tensor([-size, 0.0])
    base = {"w": torch.zeros(2)}
    found = agreed_mean([{"w": one}, {"w": other}], [1.0, 1.0], base)["w"]
    plain = agreed_mean([{"w": one / size}, {"w": other / size}], [1.0, 1.0], base)["w"]
    assert torch.allclose(found / size, plain, rtol=1e-4)


def test_a_huge_change_against_a_tiny_one_does_not_divide_by_nothing() -> None:
    for tiny in (1e-30, 2e-15):  # the square of one is nothing, the other's share a huge number
        items = [{"w": torch.tensor([1e37, 1.0])}, {"w": torch.tensor([-tiny, 0.0])}]
        found = agreed_mean(items, [1.0, 1.0], {"w": torch.zeros(2)})
        assert finite(found)


def test_finite_is_about_every_number() -> None:
    large = torch.full((4096,), 3e38)  # their sum is not finite
    assert finite({"w": large, "i": torch.arange(3), "e": torch.zeros(0)})
    for odd in (float("nan"), float("inf"), -float("inf")):
        assert not finite({"w": torch.tensor([1.0, odd])})
    assert not finite({"w": torch.tensor([float("inf"), -float("inf")])})
