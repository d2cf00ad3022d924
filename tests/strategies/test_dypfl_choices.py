"""How clients of DyPFL choose, what the server makes of it, and what a round costs.

On the bench of ``test_by_hand.py`` a client's validation rows are its training rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from strategies.bowls import FRONT, Bench, flat, numbers
from strategies.pairs import SGD
from strategies.prices import MASK, SEATS, STEPS, S, body, sizer
from strategies.test_dypfl import LINE, NEAR, ONE, rates, told
from toys import play, shard, whole

from flexp.client.desk import Desk
from flexp.data.examples import Shard
from flexp.dice import Dice
from flexp.model.adapter import Lora
from flexp.parcel import Parcel
from flexp.selection import ALL
from flexp.strategies import build
from flexp.strategies.dypfl import Crowd, DyPfl, bump

# ---- how it is chosen


def desk_of(method: DyPfl, round: int = 0) -> Desk:
    bench = Bench(method, **ONE)
    bench.done = round
    return bench.sit("a", Parcel())


def test_a_gap_within_delta_changes_nothing() -> None:
    method = DyPfl(delta=5.0)
    desk, gaps = desk_of(method), [0, 5, 6, 3, -5, -6, -5, 5, 7, math.nan, math.inf, -math.inf]
    found = [method.decided(desk, gap, 0.0)[0] for gap in gaps]
    assert "".join("ny"[x] for x in found) == "nnyyynnnyyyn"


def test_a_try_is_no_change_of_mind() -> None:
    bench = Bench(build("dypfl", {**NEAR, "delta": 10.0}), **ONE)
    assert rates(bench, 2) == [1.0, 0.0]
    assert rates(Bench(build("dypfl", {**NEAR, "delta": 5.0}), **ONE), 2) == [1.0, 0.5]


def test_lambda_falls_with_success_and_grows_with_failure_within_bounds() -> None:
    method = DyPfl(lam=4.0, eta=0.0625, adapt=2.0, delta=1.0)
    desk = desk_of(method)

    def moved(gap: float, times: int = 1) -> float:
        return [method.decided(desk, gap, 1.0)[1] for _ in range(times)][-1]

    assert moved(2.0) == 4.0  # it had not personalised before
    assert [moved(2.0), moved(2.0), moved(0.5), moved(-2.0)] == [2.0, 1.0, 1.0, 2.0]
    assert moved(2.0, 9) == 0.4
    assert moved(-2.0, 9) == 16.0  # eta lambda is 1
    assert method.decided(desk, 0.5, 0.0) == (False, 16.0)
    assert method.decided(desk, -2.0, 0.0) == (False, 16.0)  # kept while it adopts
    still = replace(method, adapt=1.0)
    assert {still.decided(desk_of(still), gap, 1.0)[1] for gap in (2.0, -2.0)} == {4.0}


def test_exploration_is_by_chance_and_less_each_round() -> None:
    method = DyPfl(explore=0.5, decay=0.5)
    bench, chances = Bench(method, **ONE), list[Any]()
    for _ in range(3):
        chances.append(method.offer(bench.state, "a", bench.turn()).facts["explore"])
        bench.round()
    assert chances == [0.5, 0.25, 0.125]
    tried = [method.decided(desk_of(method, r), 0.0, 0.3)[0] for r in range(200)]
    assert 40 < sum(tried) < 80


def test_an_imposed_rate_chooses_so_many_once_for_the_run() -> None:
    rows = {c: [(8, 0)] for c in "abcdefgh"}
    bench, seen = Bench(DyPfl(rate=0.4), rows=rows, **LINE), list[set[str]]()
    for _ in range(3):
        bench.round()
        seen.append({c for c in rows if bench.replies[c].facts["personalised"]})
    assert len(seen[0]) == 3  # 3.2
    assert seen[0] == seen[1] == seen[2] == {*bench.state.imposed}
    assert bench.state.rate == 3 / 8
    facts = bench.strategy.offer(bench.state, "a", bench.turn()).facts
    assert facts["rate"] == 3 / 8
    others = {Bench(DyPfl(rate=0.4), rows=rows, seed=n, **LINE).state.imposed for n in range(5)}
    assert len(others) > 1


def test_who_is_imposed_on_serves_by_its_part() -> None:
    bench = Bench(build("dypfl", {**NEAR, "rate": 0.5}), **ONE)
    bench.round()
    (chosen,) = bench.state.imposed
    (other,) = {"a", "b"} - {chosen}
    assert bench.worn(other) == flat(bench.state.shared)
    assert bench.worn(chosen) == {"a": (5, 0), "b": (10, 0)}[chosen]
    assert told(bench, chosen) == (True, None, 0.5)


# ---- the incentive


def test_who_is_about_as_well_off_with_either_counts_most() -> None:
    far = 0.5 * math.log(3)  # there s is 3/4
    assert bump(0.0, 0.5) == 1.0
    assert bump(far, 0.5) == bump(-far, 0.5) == pytest.approx(0.75)
    assert bump(1e9, 0.5) == bump(None, 0.5) == bump("much", 0.5) == 0.0


def merged(weights: Any, *gaps: float | None) -> float:
    """The front after a merge of 0 and 16, of one row and three; the first is a's."""
    method = DyPfl(weights=weights)
    fronts = zip("ab", (0.0, 16.0), gaps, strict=True)
    replies = {c: Parcel({"shared": numbers(FRONT=x)}, facts={"gap": g}) for c, x, g in fronts}
    turn = replace(Bench(method, **ONE).turn(), rows={"a": 1, "b": 3})
    return float(method.merge(Crowd(numbers(FRONT=1.0)), replies, turn).shared[FRONT])


def test_the_incentive_weighs_rows_by_the_bump() -> None:
    far = 0.5 * math.log(3)
    assert merged("rows", 0.0, far) == 12.0
    assert merged("incentive", 0.0, far) == pytest.approx(16 * 2.25 / 3.25)
    assert merged("incentive", far, 0.0) == pytest.approx(16 * 3 / 3.75)
    assert merged("incentive", 0.0, None) == 0.0
    assert merged("incentive", None, 1e9) == 12.0  # nobody is near: as without


def test_without_replies_the_shared_model_stays() -> None:
    bench = Bench(build("dypfl", NEAR), **ONE)
    bench.round("a", "b")
    assert (flat(bench.state.shared), bench.state.rate) == ((0, 0), None)


def test_the_incentive_needs_gaps_at_an_imposed_rate_too() -> None:
    bench = Bench(build("dypfl", {**NEAR, "rate": 1.0, "weights": "incentive"}), **ONE)
    bench.round()
    bench.round()
    assert told(bench, "a") == (True, 0.28125 - 4.5, 0.5)  # and lambda stays


# ---- what it needs and costs


def test_without_validation_rows_it_says_so_unless_the_rate_is_imposed() -> None:
    shards = {c: Shard(shard(n).train) for n, c in enumerate("ab")}
    for arrival in play_one(DyPfl(), shards):
        assert arrival.failure is not None
        assert "no val rows to compare models on. Set data.split" in arrival.failure.error
    assert all(a.failure is None for a in play_one(DyPfl(rate=0.5), shards))


def play_one(method: DyPfl, shards: Mapping[str, Shard]) -> Any:
    return play(method, whole(4), shards=shards, rounds=1).arrivals


COSTS: dict[str, tuple[DyPfl, int, int]] = {  # passes of a step, and models looked at
    "all adopt": (DyPfl(explore=0.0, delta=99.0), 1, 2),
    "all personalise": (DyPfl(inner=3, explore=1.0, decay=1.0), 3, 2),
    "imposed 0": (DyPfl(rate=0.0), 1, 0),
    "imposed 1": (DyPfl(inner=3, rate=1.0), 3, 0),
    "imposed 1, incentive": (DyPfl(inner=3, rate=1.0, weights="incentive"), 3, 2),
}


@pytest.mark.parametrize("name", COSTS)
def test_a_round_of_dypfl_costs_what_the_formula_says(name: str) -> None:
    # FedAvg's near adapter each way. At a cut a personaliser passes the trunk K times a step, and
    # both models pass it once per validation batch, forward alone.
    method, passes, models = COSTS[name]
    begun = body().initial(Lora(3, 6.0), Dice(0)("initial"))
    for arrival in play(method, SEATS, rounds=2, training=SGD, body=body()).arrivals:
        assert arrival.failure is None
        seat = SEATS[int(arrival.client[1])]
        near, cut = sizer(begun, seat)(ALL), seat != whole(4)
        looks = int(models * 1.5)  # six validation rows in fours
        assert (arrival.ledger.sent, arrival.ledger.received) == (
            cut * (passes * STEPS * (2 * S + MASK) + looks * (S + MASK)) + near,
            cut * (passes * STEPS * 2 * S + looks * S) + near,
        ), arrival.client
