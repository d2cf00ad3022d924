"""FedFomo, once by hand and by the oracles of its specification.

On the bench of ``test_by_hand.py`` a client's validation rows are its training rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from strategies.bowls import Bench, numbers
from strategies.pairs import SGD, alike, ran
from strategies.prices import MASK, SEATS, STEPS, S, body, sizer
from toys import at_desk, gap, play, same, shard, whole

from flexp.client.desk import Desk
from flexp.data.examples import Shard
from flexp.dice import Dice
from flexp.model.adapter import Ia3, Lora
from flexp.model.cut import Cut, Seat
from flexp.model.ops import Optim
from flexp.products import lora_pairs
from flexp.selection import ALL
from flexp.strategies import build
from flexp.strategies.affinity import Affinity
from flexp.strategies.base import Setting
from flexp.strategies.distances import distance
from flexp.strategies.fedfomo import FedFomo
from flexp.strategies.local import Local
from flexp.tensors import Tensors, Term, norm

SURE: dict[str, Any] = {"explore": 0.0}
ONE: dict[str, Any] = {  # of two numbers the second is as all want it
    "start": numbers(FRONT=0.0, TRUNK=0.0),
    "rows": {"a": [(8, 0)], "b": [(24, 0)]},
}
KIND = Lora(rank=3, alpha=6.0)
desks = pytest.mark.parametrize("seat", [Seat(Cut(1, 1)), whole(4)], ids=["cut", "whole"])


def test_fedfomo_mixes_by_the_fall_of_the_loss_per_distance() -> None:
    # Each goes half of the way: a to 4, b to 12. Then, from 0, a's loss 32 falls to 8 at its own
    # model, (32 - 8) / 4 = 6, and to 8 at b's, (32 - 8) / 12 = 2. Shares 3/4 and 1/4: 3 + 3 = 6,
    # and half of the way from there is 7.
    bench = Bench(build("fedfomo", SURE), **ONE)
    bench.round()
    assert (bench.trained("a"), bench.trained("b")) == ((4, 0), (12, 0))
    bench.round()
    assert bench.replies["a"].facts["helped"] == [2.0, 6.0]
    assert bench.trained("a") == (7, 0)
    assert bench.state.affinity.row("a") == {"a": 0.1 + 6 / 8, "b": 2 / 8}
    # b's loss falls from 288 to 200 at a's model, 22 per unit, and to 72 at its own, 18. So it
    # begins at (22 * 4 + 18 * 12) / 40 = 7.6.
    assert bench.trained("b")[0] == pytest.approx(15.8)
    # a's last training was from 6. Its own model, 7, takes the loss from 2 to 0.5: 1.5 per unit.
    # b's takes it up to 30.42, by 2.9 per unit. So a goes on from 7, and not from the mean.
    bench.round()
    assert bench.replies["a"].facts["helped"] == [pytest.approx(-2.9), 1.5]
    assert bench.trained("a") == (7.5, 0)


# ---- oracles


def test_all_candidates_worse_takes_a_training_back() -> None:
    # A step of 5/2 of the way overshoots, from 0 to 2.5 times what is wanted: all are worse.
    bench = Bench(build("fedfomo", SURE), optim=Optim("sgd", lr=2.5))
    for _ in range(3):
        bench.round()
        assert bench.trained("a") == (20, 40, 80)  # each time from 0
    told: Any = bench.replies["a"].facts["helped"]
    assert len(told) == 2
    assert max(told) < 0


def mixed(seat: Seat, spoilt: Sequence[str], models: Sequence[str]) -> dict[str, Tensors]:
    """What lies on a desk after a mix of models that have learned, or, spoilt, the opposite."""
    method = FedFomo()
    with at_desk(body(), seat, slots=dict(method.specs())) as (desk, _):
        desk.shard = Shard(shard(1).train, shard(1).train)
        for peer in models:
            desk.fit(wear=peer, steps=4 + int(peer[-1]))
            if peer in spoilt:
                desk.assign(peer, (Term("before", 6.0), Term(peer, -5.0)))
        method.mix_in(desk, models)
        return {name: desk.whole(name) for name in ("before", "personal", *models)}


@desks
def test_all_candidates_worse_leaves_what_was_before_bit_for_bit(seat: Seat) -> None:
    found = mixed(seat, ["peer/0", "peer/1"], ["peer/0", "peer/1"])
    assert same(found["personal"], found["before"])
    assert not same(found["personal"], found["peer/0"])


@desks
def test_one_candidate_better_is_taken_exactly(seat: Seat) -> None:
    found = mixed(seat, ["peer/1"], ["peer/0", "peer/1"])
    assert same(found["personal"], found["peer/0"])
    assert not same(found["personal"], found["before"])


def test_two_latent_groups_keep_to_themselves() -> None:
    wanted: Mapping[str, Sequence[tuple[int, ...]]] = {
        "a1": [(8, 16, 32)], "a2": [(9, 16, 30)], "a3": [(8, 14, 33)],
        "b1": [(-16, 8, -16)], "b2": [(-15, 9, -16)], "b3": [(-16, 7, -18)],
    }  # fmt: skip
    method = FedFomo(candidates=6)
    bench = Bench(method, rows=wanted, optim=Optim("sgd", lr=0.1))
    for _ in range(5):
        bench.round()
    chosen = {c: method.chosen(bench.state, c, bench.turn()) for c in wanted}
    bench.round()
    for client in wanted:
        told: Any = bench.replies[client].facts["helped"]
        good = {c: max(0.0, w) for c, w in zip(chosen[client], told, strict=True)}
        assert sum(w for c, w in good.items() if c[0] == client[0]) > 0.9 * sum(good.values())


def test_shares_do_not_depend_on_the_scale_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Bench(build("fedfomo", SURE), **ONE)
    scaled = Bench(build("fedfomo", SURE), **ONE)
    for bench in (plain, scaled):
        bench.round()
        bench.round()
        loss = Desk.loss
        monkeypatch.setattr(Desk, "loss", lambda *a, of=loss: 4 * of(*a))
    assert scaled.trained("b") == plain.trained("b")  # a share of 0.55, to the last bit
    assert scaled.replies["b"].facts["helped"] == [88.0, 72.0]


def test_without_candidates_it_is_local() -> None:
    assert alike(ran(FedFomo(candidates=0), training=SGD), ran(Local(), training=SGD))
    mixes = ran(FedFomo(explore=0.0), training=SGD, rounds=3)
    assert not alike(mixes, ran(Local(), training=SGD, rounds=3))


def test_with_peers_that_help_nobody_it_is_local() -> None:
    # What a and b of the bench want points apart: only a client's own model is above 0.
    fomo, local = Bench(build("fedfomo", SURE)), Bench(build("local", {}))
    for _ in range(4):
        fomo.round()
        local.round()
        assert fomo.worn("a") == local.worn("a")
        assert fomo.worn("b") == local.worn("b")
    told: Any = fomo.replies["a"].facts["helped"]
    assert told[0] < 0 < told[1]


@desks
def test_the_order_of_candidates_does_not_count(seat: Seat) -> None:
    one, other = (mixed(seat, [], peers) for peers in (["peer/0", "peer/1"], ["peer/1", "peer/0"]))
    assert same(other["peer/0"], one["peer/0"])
    assert gap(other["personal"], one["personal"]) < 1e-6
    assert not same(one["personal"], one["peer/0"])


# ---- distances


@desks
def test_distances_are_what_they_are_called(seat: Seat) -> None:
    slots = dict(FedFomo().specs())
    with at_desk(body(), seat, slots=slots) as (desk, _):
        desk.fit(wear="peer/0", steps=3)
        mine, held = desk.whole("peer/0"), desk.whole("before")
        gaps = {k: mine[k] - held[k] for k in mine}
        forms = ("l2", "l2_squared", "l1", "product")
        found = {form: distance(desk, "peer/0", "before", form) for form in forms}
    assert found["l2"] == pytest.approx(norm(gaps), rel=1e-5)
    assert found["l2_squared"] == pytest.approx(norm(gaps) ** 2, rel=1e-5)
    assert found["l1"] == pytest.approx(sum(float(v.abs().sum()) for v in gaps.values()), rel=1e-5)
    pairs = lora_pairs(mine)
    rest = sum(float(gaps[k].square().sum()) for k in gaps if "lora" not in k)
    worn = sum(
        float((KIND.alpha / KIND.rank * (mine[b] @ mine[a] - held[b] @ held[a])).square().sum())
        for a, b in pairs.values()
    )
    assert found["product"] == pytest.approx((rest + worn) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("form", ["l1", "l2_squared", "product"])
def test_another_distance_gives_other_shares(form: Any) -> None:
    plain = ran(FedFomo(explore=0.0), rounds=3)
    assert not alike(ran(FedFomo(explore=0.0, distance=form), rounds=3), plain)


def test_mixes_of_b_over_a_common_a_are_mixes_of_products() -> None:
    found = ran(FedFomo(explore=0.0, share_a=True), rounds=3).adapters["c0"]
    begun = body().initial(KIND, Dice(0)("initial"))
    pairs = lora_pairs(begun)
    assert all(torch.equal(found[a], begun[a]) for a, _ in pairs.values())
    assert all(not torch.equal(found[b], begun[b]) for _, b in pairs.values())


# ---- who is offered


def picks(affinity: Affinity, chance: float, known: str = "abcdefgh") -> list[str]:
    """Whom a gets in many rounds."""
    how: dict[str, Any] = {"count": 2, "chance": chance}
    return [c for r in range(200) for c in affinity.chosen("a", [*known], round=r, **how)]


def test_the_most_helpful_are_offered_and_with_chance_epsilon_any() -> None:
    affinity = Affinity(1, 0.1, {"a": {"c": 0.5, "d": 0.3, "e": -1.0}})
    assert picks(affinity, 0.0) == ["c", "d"] * 200
    explored = picks(affinity, 0.3)
    assert 0.05 < sum(c not in "cd" for c in explored) / len(explored) < 0.3
    assert set(picks(affinity, 1.0)) == set("abcdefgh")


def test_the_own_model_is_a_candidate_by_its_affinity_and_comes_last() -> None:
    assert picks(Affinity(1, 0.1), 0.0)[1::2] == ["a"] * 200
    assert "a" not in picks(Affinity(1, -0.1), 0.0)


def test_who_has_not_uploaded_is_offered_to_nobody() -> None:
    method = FedFomo(candidates=3, explore=1.0)
    bench = Bench(method, rows={"a": [(8, 8, 8)], "b": [(8, 8, 8)], "c": [(8, 8, 8)]})
    assert bench.strategy.offer(bench.state, "a", bench.turn()).adapters == {}
    bench.round("b")
    assert method.chosen(bench.state, "a", bench.turn()) == ["c", "a"]
    assert method.chosen(bench.state, "b", bench.turn()) == ["a", "c"]


def test_exploration_ends() -> None:
    # epsilon is 1, 0.75, 0.5, 0.25 and then 0.
    method = FedFomo(candidates=2, explore=1.0, decay=0.25)
    bench = Bench(method, rows={c: [(8, 8, 8)] for c in "abcdefgh"})
    bench.round()
    affinity = replace(bench.state.affinity, rows={c: {"c": 0.5, "d": 0.3} for c in "abefgh"})
    state = replace(bench.state, affinity=affinity)
    seen = list[bool]()
    for bench.done in range(8):
        found = [method.chosen(state, client, bench.turn()) for client in "abefgh"]
        seen.append(found == [["c", "d"]] * 6)
    assert seen == [False] * 4 + [True] * 4


def test_what_a_client_tells_is_counted_only_if_it_is_a_number_for_each() -> None:
    plain = Affinity(1, 0.1)
    assert plain.added("a", ["b", "a"], [3.0, -1.0]).row("a") == {"b": 1.5, "a": 0.1 - 0.5}
    for odd in (None, [1.0], "ab", [1.0, "x"], [1.0, -1.0]):
        assert plain.added("a", ["b", "a"], odd) == plain


# ---- what is refused, and what it costs


def test_fedfomo_refuses_what_it_cannot_mix() -> None:
    setting = Setting("classification", Ia3(), {"a": whole(4)}, 4, head=True)
    assert FedFomo().refuses(setting) == ""
    assert "Set adapter.kind=lora" in FedFomo(distance="product").refuses(setting)
    assert "Set adapter.kind=lora" in FedFomo(share_a=True).refuses(setting)
    ranks = {"a": Seat(Cut(1), rank=2), "b": Seat(Cut(1))}
    found = FedFomo().refuses(Setting("classification", Lora(), ranks, 4, head=True))
    assert "Remove plan.ranks" in found


def test_without_validation_rows_it_says_so() -> None:
    shards = {c: Shard(shard(n).train) for n, c in enumerate("ab")}
    found = play(FedFomo(), whole(4), shards=shards, rounds=2).arrivals
    for arrival in found:
        assert arrival.failure is not None
        assert "no val rows to compare models on. Set data.split" in arrival.failure.error


@pytest.mark.parametrize("candidates", [0, 1, 3])
def test_a_round_of_fedfomo_costs_what_the_formula_says(candidates: int) -> None:
    # M near adapters down (its own one is there), one up. At a cut each candidate, and what the
    # client was before, passes the trunk once per validation batch, forward alone.
    method = FedFomo(candidates=candidates, explore=0.0, own_affinity=1.0)
    arrivals = play(method, SEATS, rounds=2, training=SGD, body=body()).arrivals
    begun = body().initial(KIND, Dice(0)("initial"))
    for arrival in arrivals:
        assert arrival.failure is None
        seat = SEATS[int(arrival.client[1])]
        near, cut = sizer(begun, seat)(ALL), seat != whole(4)
        looks = (candidates + 1 if candidates else 0) * 1.5  # six validation rows in fours
        assert (arrival.ledger.sent, arrival.ledger.received) == (
            cut * (STEPS * (2 * S + MASK) + int(looks * (S + MASK))) + near,
            cut * (STEPS * 2 * S + int(looks * S)) + max(0, candidates - 1) * near,
        ), arrival.client
