"""Every method once by hand: two clients, a few numbers, and what a round makes of them.

Unless said otherwise everything starts at 0 and takes one step of half the way per turn. Client a
has one row and wants (8, 16, 32), b has three and wants (16, 8, -16): front, trunk and head. The
rows together want the weighted mean, (14, 10, -4). All numbers are exact in float32.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from strategies import test_federated_lora, test_split_methods
from strategies.bowls import (
    CUT,
    FRONT,
    HEAD,
    PAIR,
    TRUNK,
    WHOLE,
    Bench,
    after_two_rounds,
    flat,
    numbers,
)

from flexp.model.ops import Optim
from flexp.strategies import BUILT_IN, build

MIXED = {"a": CUT, "b": WHOLE}  # block 1 is far for a, near for b
ALONE = [("a", (8, 4, -8)), ("b", (4, 8, 16))]  # who fails, and where the other one gets


# ---- references


def test_base_stays_where_it_began() -> None:
    bench = Bench(build("base", {}), start=numbers(FRONT=1.0, TRUNK=2.0, HEAD=3.0))
    bench.round()
    assert bench.order == []
    assert bench.both() == (1, 2, 3)


def test_local_goes_its_own_way() -> None:
    bench = Bench(build("local", {}))
    bench.round()  # half of what each wants
    assert bench.worn("a") == (4, 8, 16)
    assert bench.worn("b") == (8, 4, -8)
    bench.round()  # three quarters
    assert bench.worn("a") == (6, 12, 24)
    assert bench.worn("b") == (12, 6, -12)


def test_pooled_takes_the_steps_of_all_on_the_rows_of_all() -> None:
    # One step for each of two clients, both at a's place: 3/4 of (14, 10, -4), then 15/16.
    bench = Bench(build("pooled", {}), seats=WHOLE)
    bench.round()
    assert bench.both() == (10.5, 7.5, -3)
    bench.round()
    assert bench.both() == (13.125, 9.375, -3.75)
    assert bench.order == ["a", "a"]


# ---- federated


def test_fedavg_weighs_by_rows() -> None:
    # Two steps: a at (6, 12, 24), b at (12, 6, -12). (6 + 3 * 12) / 4 = 10.5, not (6 + 12) / 2.
    bench = Bench(build("fedavg", {}), steps=2)
    bench.round()
    assert bench.both() == (10.5, 7.5, -3)
    # From 10.5, a goes over 9.25 to 8.625, b over 13.25 to 14.625: (8.625 + 43.875) / 4 = 13.125.
    bench.round()
    assert bench.trained("a")[0] == 8.625
    assert bench.both() == (13.125, 9.375, -3.75)


@pytest.mark.parametrize(("failing", "left"), [*ALONE, ("ab", (0, 0, 0))])
def test_fedavg_is_the_mean_of_those_who_reply(failing: str, left: Any) -> None:
    bench = Bench(build("fedavg", {}))
    bench.round(*failing)
    assert bench.both() == left


def test_fedprox_pulls_from_the_second_step_on() -> None:
    # a's front: 4 as without a pull, for at the start there is nothing to pull; then the slope is
    # (4 - 8) + 0.5 * (4 - 0) = -2, so 5 instead of 6. In general two steps go 5/8 of the way.
    bench = Bench(build("fedprox", {"mu": 0.5}), steps=2)
    bench.round()
    assert bench.trained("a") == (5, 10, 20)
    assert bench.trained("b") == (10, 5, -10)
    assert bench.both() == (8.75, 6.25, -2.5)  # (5 + 3 * 10) / 4 and so on
    # Next the pull is towards (8.75, 6.25, -2.5): 8.75 + 5/8 * (14 - 8.75) = 12.03125.
    bench.round()
    assert bench.both() == (12.03125, 8.59375, -3.4375)


def test_ditto_has_one_shared_and_one_personal() -> None:
    # Shared: FedAvg's numbers. Personal, pulled to the shared one as received, here 0: 4, then
    # the slope is (4 - 8) + 0.5 * (4 - 0) = -2, so 5. It is 5/8 of what each wants.
    bench = Bench(build("ditto", {"lam": 0.5}), steps=2)
    bench.round()
    assert flat(bench.state) == (10.5, 7.5, -3)
    assert bench.worn("a") == (5, 10, 20)
    assert bench.worn("b") == (10, 5, -10)
    # A step from v, wanting t, pulled to w: v/4 + t/2 + w/4. Two: v/16 + 5t/8 + 5w/16.
    # a's front: 5/16 + 5 + 3.28125 = 8.59375. b's: 10/16 + 10 + 3.28125 = 13.90625.
    bench.round()
    assert bench.worn("a") == (8.59375, 12.96875, 20.3125)
    assert bench.worn("b") == (13.90625, 7.65625, -11.5625)
    assert flat(bench.state) == (13.125, 9.375, -3.75)


def test_fedper_keeps_the_head() -> None:
    # a: (4, 8, 16), b: (8, 4, -8). The body is averaged: (4 + 24) / 4 = 7, (8 + 12) / 4 = 5.
    bench = Bench(build("fedper", {}))
    bench.round()
    assert bench.worn("a") == (7, 5, 16)
    assert bench.worn("b") == (7, 5, -8)
    assert HEAD not in bench.state
    # a: (7.5, 10.5, 24), b: (11.5, 6.5, -12); (7.5 + 34.5) / 4 = 10.5, (10.5 + 19.5) / 4 = 7.5.
    bench.round()
    assert bench.worn("a") == (10.5, 7.5, 24)
    assert bench.worn("b") == (10.5, 7.5, -12)


def test_fedper_keeps_the_last_block_if_asked() -> None:
    bench = Bench(build("fedper", {"blocks": 1}))
    bench.round()
    assert bench.worn("a") == (7, 8, 16)
    assert bench.worn("b") == (7, 4, -8)


def test_ffa_lora_averages_products_exactly() -> None:
    # The slope of B is A (B A - t). a: 1 - 9 = -8, so B = 2; 2 - 9 = -7, so 2.875.
    # b: 1 + 7 = 8, so B = 0; 0 + 7 = 7, so -0.875. A is 1 throughout.
    bench = Bench(build("ffa_lora", {}), steps=2, **PAIR)
    bench.round()
    assert list(bench.replies["a"].adapters["personal"]) == [FRONT]  # A does not travel
    assert (bench.product("a"), bench.product("b")) == (2.875, -0.875)
    # The mean of products is (2.875 - 3 * 0.875) / 4 = 0.0625, and so is mean B times A.
    assert bench.both() == (1, 0.0625)


def test_fedavg_of_both_factors_averages_products_wrongly() -> None:
    # A moves as B does. a: A = B = 2, product 4. b: A = B = 0, product 0.
    bench = Bench(build("fedavg", {}), **PAIR)
    bench.round()
    assert (bench.product("a"), bench.product("b")) == (4, 0)
    # The mean of products is (4 + 3 * 0) / 4 = 1, but the product of means is 0.5 * 0.5 = 0.25.
    assert bench.both() == (0.5, 0.5)


# ---- split


def test_sl_goes_on_where_the_one_before_ended() -> None:
    # a: (4, 8, 16). b from there, half of the way to (16, 8, -16): (10, 8, 0). No weights.
    bench = Bench(build("sl", {}))
    bench.round()
    assert bench.trained("a") == (4, 8, 16)
    assert bench.both() == (10, 8, 0)
    bench.round()  # a: (9, 12, 16), then b
    assert bench.both() == (12.5, 10, 0)
    assert bench.order == ["a", "b", "a", "b"]


@pytest.mark.parametrize("seats", [CUT, MIXED], ids=["equal cuts", "mixed cuts"])
def test_splitfed_v1_averages_both_sides(seats: Any) -> None:
    # a: (4, 8, 16), b: (8, 4, -8), at any cut: (4 + 24) / 4 = 7 and so on.
    bench = Bench(build("splitfed_v1", {}), seats)
    bench.round()
    assert bench.both() == (7, 5, -2)
    bench.round()  # half of the way from there to (14, 10, -4)
    assert bench.both() == (10.5, 7.5, -3)


@pytest.mark.parametrize(("seed", "order", "trunk"), [(2, "ba", 10), (0, "ab", 8)])
def test_splitfed_v2_relays_the_trunk(seed: int, order: str, trunk: float) -> None:
    # In the order drawn. The trunk, if b is first: 4, then half of the way to 16, so 10; if a is
    # first: 8, where b wants it. Fronts and heads: (4 + 24) / 4 = 7, (16 - 24) / 4 = -2.
    bench = Bench(build("splitfed_v2", {}), seed=seed)
    bench.round()
    assert bench.order == list(order)
    assert bench.both() == (7, trunk, -2)


def test_splitfed_v2_averages_over_those_who_have_it_near() -> None:
    # b has block 1 near, so the trunk at the server is a's alone, 8, and b's 4 the only one near.
    bench = Bench(build("splitfed_v2", {}), MIXED, seed=2)
    bench.round()
    assert bench.worn("a") == (7, 8, -2)
    assert bench.worn("b") == (7, 4, -2)


@pytest.mark.parametrize(("failing", "left"), ALONE)
def test_splitfed_v2_averages_fronts_though_one_fails(failing: str, left: Any) -> None:
    # a is last: the round must end for b's front all the same. Who fails moves no trunk.
    bench = Bench(build("splitfed_v2", {}), seed=2)
    bench.round(failing)
    assert bench.order == ["b", "a"]
    assert bench.both() == left
    assert bench.state.arrived == {}


def test_splitfed_v3_averages_the_trunk_alone() -> None:
    # a: (4, 8, 16), b: (8, 4, -8). The trunk: (8 + 12) / 4 = 5.
    bench = Bench(build("splitfed_v3", {}))
    bench.round()
    assert bench.worn("a") == (4, 5, 16)
    assert bench.worn("b") == (8, 5, -8)
    # a: 5 to 10.5, b: 5 to 6.5, so (10.5 + 19.5) / 4 = 7.5.
    bench.round()
    assert bench.worn("a") == (6, 7.5, 24)
    assert bench.worn("b") == (12, 7.5, -12)


def test_splitfed_v3_leaves_a_near_block_alone() -> None:
    bench = Bench(build("splitfed_v3", {}), MIXED)
    bench.round()
    assert bench.worn("a") == (4, 8, 16)
    assert bench.worn("b") == (8, 4, -8)


def test_splitlora_averages_every_second_round() -> None:
    bench = Bench(build("splitlora", {"every": 2}), seed=2)
    bench.round()  # the trunk: 4 after b, 10 after a; fronts and heads stay where they are
    assert bench.worn("a") == (4, 10, 16)
    assert bench.worn("b") == (8, 10, -8)
    # a first: 13, then b: 10.5. Fronts: (6 + 36) / 4 = 10.5, heads: (24 - 36) / 4 = -3.
    bench.round()
    assert bench.both() == (10.5, 10.5, -3)
    # Both go on from the mean, a first again: 13.25, then 10.625. Nothing is averaged.
    bench.round()
    assert bench.worn("a") == (9.25, 10.625, 14.5)
    assert bench.worn("b") == (13.25, 10.625, -9.5)
    assert bench.order == ["b", "a", "a", "b", "a", "b"]


def test_flexp_sft_pulls_near_parts_to_the_reference() -> None:
    # Near parts of round 1 are pulled to 0, where they began: a's front goes to 4, then the slope
    # is (4 - 8) + 0.5 * 4 = -2, so 5. That is 5/8 of the way, for b's block 1 as well: 5.
    # a's block 1 is far and free: 8, 12. It has no other host, so it is what is merged.
    bench = Bench(build("flexp_sft", {"align": 0.5, "compare": "factors"}), MIXED, steps=2)
    bench.round()
    assert bench.worn("a") == (5, 12, 20)
    assert bench.worn("b") == (10, 5, -10)
    assert list(bench.state) == [TRUNK]
    # Now the reference of b's block 1 is 12. From v, wanting t: v/16 + 5t/8 + 5/16 of reference,
    # 0.3125 + 5 + 3.75 = 9.0625. Others are pulled to 0 still: a's front 0.3125 + 5 = 5.3125.
    bench.round()
    assert bench.worn("a") == (5.3125, 15, 21.25)
    assert bench.worn("b") == (10.625, 9.0625, -10.625)


def test_flexp_merges_far_blocks_over_their_hosts() -> None:
    # Both host block 1 far: 12 and 6 after two steps, (12 + 18) / 4 = 7.5. The head is free.
    bench = Bench(build("flexp_sft", {"align": 0.5, "head": "free", "compare": "factors"}), steps=2)
    bench.round()
    assert bench.worn("a") == (5, 7.5, 24)
    assert bench.worn("b") == (10, 7.5, -12)


def test_flexp_sft_pulls_products_whatever_their_factors() -> None:
    # A = 2, B = 1; a wants B A = 10. At the start there is nothing to pull. The slope of A is
    # B (B A - 10) = -8, so A = 3; that of B is A (B A - 10) = -16, so B = 3. Then the slope of A
    # is 3 * (9 - 10) = -3 plus the pull's align * (alpha/r)^2 * B (B A - 2) = 1 * 3 * 7, where
    # alpha/r is 16: 18 in all. B is alike, so both are 3 - 18/8 = 0.75.
    pair: dict[str, Any] = {"start": numbers(FACTOR=2.0, FRONT=1.0), "rows": {"a": [(10,)]}}
    bench = Bench(
        build("flexp_sft", {"align": 1 / 256}), steps=2, optim=Optim("sgd", lr=0.125), **pair
    )
    bench.round()
    assert bench.worn("a") == (0.75, 0.75)


def test_flexp_sfl_aligns_to_the_mean_of_near_parts() -> None:
    # a comes to 6, 12, 24 and b to 12, 6, -12, so the means are 10.5, 7.5, -3. Then near parts
    # begin in the middle, a at 8.25 and 10.5, b at 11.25 and -7.5, and the trunk at its mean. Two
    # steps go 3/4 of the way: the trunks come to 13.875 and 7.875, in the mean 9.375.
    bench = Bench(build("flexp_sfl", {"align": 0.5}), steps=2)
    bench.round()
    bench.round()
    assert bench.worn("a") == (8.0625, 9.375, 26.625)
    assert bench.worn("b") == (14.8125, 9.375, -13.875)


# ---- what optimizers remember


FLEXP = ("flexp", "flexp_sft", "flexp_sfl")
ENDS: dict[str, tuple[float, ...]] = {
    **dict.fromkeys(["local", "ditto", "splitfed_v3"], (8, 8, 8)),
    **dict.fromkeys(["fedavg", "fedprox", "fedper", "ffa_lora", "splitfed_v1", *FLEXP], (6, 6, 6)),
    **dict.fromkeys(["fedrep", "fedbn"], (6, 6, 6)),
    **dict.fromkeys(["fedbabu", "phsfl"], (6, 6, 0)),
    **dict.fromkeys(["fedppa", "fed_influence"], (6, 6, 6)),
    "pfsl": (0, 8, 8),
    **dict.fromkeys(["apfl", "fml"], (8, 8, 8)),
    **dict.fromkeys(["pfedme", "per_fedavg", "fedala", "fedfomo", "fedbasis", "dypfl"], (6, 6, 6)),
    "ddome": (6, 6, 6),
    **dict.fromkeys(["splitfed_v2", "splitlora"], (8, 10, 8)),
    "pooled": (10, 10, 10),
    "sl": (7.5, 7.5, 7.5),
}
UNALIGNED = {"align": 0.0, "head": "free"}
FREE: dict[str, dict[str, Any]] = {
    "fedprox": {"mu": 0.0},
    "ditto": {"lam": 0.0},
    "apfl": {"alpha": 1.0, "rate": 0.0},
    "fml": {"alpha": 1.0, "beta": 1.0},
    "pfedme": {"lam": 0.5, "rate": 2.0, "inner": 1},
    "dypfl": {"explore": 0.0},
    "per_fedavg": {"alpha": 0.0},
    "fedala": {"rate": 0.0},
    "fedbasis": {"bases": 1},
    "ddome": {"experts": 1},
    "fed_influence": {"mode": "none"},
    "fedppa": {"beta": 0.0},
    **dict.fromkeys(FLEXP, UNALIGNED),
}


@pytest.mark.parametrize("name", ENDS)
def test_momentum_is_kept_or_begins_anew(name: str) -> None:
    # Both want 8. Two rounds of one step each: m <- m/2 + slope, w <- w - m/2.
    # Kept: m -8, w 4; m -8, w 8. Anew in the second round: w 4; m -4, w 6.
    # One for the steps of both: from 8, m -4, w 10; m 0, w 10. Anew at each of four: 4, 6, 7, 7.5.
    assert after_two_rounds(build(name, FREE.get(name, {}))) == ENDS[name]


@pytest.mark.parametrize("name", FLEXP)
def test_flexp_keeps_momentum_if_asked(name: str) -> None:
    assert after_two_rounds(build(name, {**UNALIGNED, "moments": "keep"})) == (8, 8, 8)


def test_every_method_is_worked_by_hand() -> None:
    files = Path(__file__).parent.glob("test_*.py")
    tests = [name for file in files for name in re.findall(r"def (\w+)", file.read_text("utf-8"))]
    for method in BUILT_IN:
        assert any(name.startswith(f"test_{method.name}_") for name in tests), method.name
    ended = {*ENDS, *test_federated_lora.ENDS, *test_split_methods.ENDS}
    other = {"base", "scaffold", "pfedhn", "pfedpt", "pfedpg", "pac_pfl", "zoopfl", "fedmosaic"}
    assert ended == {method.name for method in BUILT_IN} - other
