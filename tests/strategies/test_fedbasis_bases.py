"""How bases of FedBasis come to differ, what blends find, and who counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
from strategies.bowls import Bench, Row, flat
from strategies.pairs import SGD
from strategies.test_fedbasis import ONE, blend_of
from toys import play, same, whole

from flexp.client.desk import Training
from flexp.model.cut import Cut, Seat
from flexp.model.ops import Optim
from flexp.parcel import Parcel
from flexp.strategies import build
from flexp.strategies.bases import share
from flexp.strategies.fedbasis import FedBasis
from flexp.tensors import add, dot, mean, norm

# ---- collapse


NAIVE: dict[str, Any] = {"warm": 0, "differ": "noise", "noise": 0.01, "sharp": 1.0}


def likeness(more: Mapping[str, Any], rounds: int = 8) -> tuple[float, float]:
    """How alike the ways are that three bases have gone since they were made, and how far apart.

    That is the mean cosine of V_k - V, where V is their mean as they were made, and the mean
    distance from their mean now, per what that has moved. (Cosines of V_k minus the mean of now
    say nothing: these add up to 0.)
    """
    how: dict[str, Any] = {"training": Training(Optim("sgd", lr=1.0), batch=4, steps=3)}
    how["training"] = replace(how["training"], still="allow")
    method: Any = build("fedbasis", {"bases": 3, "rate": 1.0, **more})
    begun, held = (
        play(method, whole(4), rounds=n, **how).state.held for n in (method.warm, rounds)
    )
    origin, middle = mean(begun, [1.0] * 3), mean(held, [1.0] * 3)
    ways = [add(base, origin, -1.0) for base in held]
    cosines = [dot(a, b) / norm(a) / norm(b) for a, b in combinations(ways, 2)]
    apart = sum(norm(add(base, middle, -1.0)) for base in held) / 3
    return sum(cosines) / 3, apart / norm(add(middle, origin, -1.0))


@pytest.mark.slow
def test_alike_bases_collapse_and_the_remedies_keep_them_apart() -> None:
    same_way, apart = likeness(NAIVE)
    assert same_way > 0.99
    assert apart < 0.1
    for remedy in ({"warm": 1}, {"warm": 2, "differ": "noise", "noise": 0.3}):
        same_way, apart = likeness(remedy)
        assert same_way < 0.5, remedy
        assert apart > 1.0, remedy


@pytest.mark.slow
def test_a_small_tau_while_bases_train_tears_them_apart() -> None:
    fast = {**NAIVE, "rate": 10.0}
    blunt, sharp = likeness(fast), likeness({**fast, "sharp": 0.2})
    assert blunt[0] > 0.99
    assert sharp[0] < 0.95
    assert sharp[1] > 5 * blunt[1]


# ---- what blends find


def test_a_fitted_blend_is_at_least_as_good_as_the_best_base() -> None:
    # Inside the triangle of three bases, on an edge, at a corner and outside of it.
    corners: tuple[Row, ...] = ((8, 0, 4), (0, 8, -4), (-4, -4, 8))
    wants = {"n0": (1, 1, 2), "n1": (4, 4, 0), "n2": (8, 0, 4), "n3": (20, 4, 2), "n4": (-9, 0, 9)}
    rows: dict[str, Sequence[Row]] = {f"c{n}": [corner] for n, corner in enumerate(corners)}
    rows |= {client: [want] for client, want in wants.items()}
    how = {"bases": 3, "warm": 1, "blend_steps": 200, "rate": 0.05, "newcomers": tuple(wants)}
    bench = Bench(build("fedbasis", how), rows=rows, optim=Optim("sgd", lr=1.0))
    bench.round()
    assert [flat(base) for base in bench.state.held] == [*corners]
    held = bench.state
    bench.round()
    bench.state = held
    for client, want in wants.items():
        found = distance(bench.serves(client), want)
        best = min(distance(corner, want) for corner in corners)
        # A softmax comes to a corner in the limit only: 1/1000 of where all begin is close.
        assert found <= best + 1e-3 * distance((4 / 3, 4 / 3, 8 / 3), want), client
        if client in ("n0", "n1"):
            assert found < best / 2, client


def distance(a: Sequence[float], b: Sequence[float]) -> float:
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / 2


TRUE: tuple[Row, Row] = ((8, 0, 4), (0, 8, -4))
MIXES = (1.0, 0.0, 0.75, 0.25, 0.5, 1.0, 0.0)


@pytest.mark.parametrize(
    "more", [{}, {"differ": "noise"}, {"relax": 20}], ids=["clients", "noise", "relaxed"]
)
@pytest.mark.daily("clients")
def test_mixtures_of_two_truths_are_recovered(more: Any) -> None:
    wants = {f"c{n}": [mixed(share)] for n, share in enumerate(MIXES)}
    how = {"bases": 2, "blend_steps": 10, "rate": 0.05, **more}
    bench = Bench(build("fedbasis", how), rows=wants, optim=Optim("sgd", lr=0.3), steps=3)
    for _ in range(40):
        bench.round()
    found = [blend_of(bench, client)[0] for client in wants]
    found = found if found[0] > 0.5 else [1 - share for share in found]  # either may be the first
    assert max(abs(a - b) for a, b in zip(found, MIXES, strict=True)) < 0.1


def mixed(share: float) -> Any:
    return tuple(share * a + (1 - share) * b for a, b in zip(*TRUE, strict=True))


# ---- how bases are made


def test_more_bases_than_clients_are_made_with_noise() -> None:
    # a goes to 4, b to 8, in the mean 6: two bases are theirs, and two are 6 with noise of 1/10.
    bench = Bench(build("fedbasis", {"bases": 4}), **ONE)
    bench.round()
    held = [flat(base)[0] for base in bench.state.held]
    assert held[:2] == [4, 8]
    assert len({6.0, *held}) == 5
    assert all(0 < abs(x - 6) < 0.6 * 4 for x in held[2:])


def test_clients_are_dealt_to_bases_by_turns() -> None:
    rows: dict[str, Sequence[Row]] = {c: [(8 * n,)] for n, c in enumerate("abcd", start=1)}
    bench = Bench(build("fedbasis", {"bases": 2}), rows=rows, start=ONE["start"])
    bench.round()  # 4, 8, 12, 16: of a and c, and of b and d
    assert [flat(base) for base in bench.state.held] == [(8,), (12,)]


def test_noise_is_relative_to_each_tensor_and_drawn_by_the_seed() -> None:
    method = FedBasis(bases=2, warm=0, differ="noise", noise=0.1)
    begun, again = (play(method, seats, rounds=0).state.held for seats in (whole(4), Seat(Cut(1))))
    assert all(same(a, b) for a, b in zip(begun, again, strict=True))
    plain = play(replace(method, bases=1), whole(4), rounds=0).state.held[0]
    for k, v in plain.items():
        found = [float((base[k] - v).square().mean().sqrt()) for base in begun]
        size = float(v.square().mean().sqrt())
        assert found == pytest.approx([0.1 * size] * 2, rel=0.5), k
    assert not same(begun[0], begun[1])
    still = play(replace(method, noise=0.0), whole(4), rounds=0).state.held
    assert all(same(base, plain) for base in still)


def test_if_all_fail_at_the_end_of_the_warm_start_bases_are_made_all_the_same() -> None:
    bench = Bench(build("fedbasis", {"bases": 2, "warm": 2}), **ONE)
    bench.round()
    bench.round("a", "b")
    made = [flat(base)[0] for base in bench.state.held]  # 6 with noise, for no client has any
    assert len({6.0, *made}) == 3
    assert all(abs(x - 6) < 0.6 * 4 for x in made)


def test_tau_of_bases_is_sharp_and_goes_to_that_of_blends() -> None:
    bench = Bench(build("fedbasis", {"bases": 2, "sharp": 0.2, "relax": 2, "warm": 1}), **ONE)
    offer, found = bench.strategy.offer, list[Any]()
    for bench.done in range(5):
        found.append(offer(bench.state, "a", bench.turn()).facts["sharp"])
    assert found == pytest.approx([0.2, 0.2, 0.6, 1.0, 1.0])
    stays = FedBasis(bases=2)
    assert stays.offer(bench.state, "a", bench.turn()).facts["sharp"] == 0.2


# ---- who counts


def test_newcomers_fit_blends_alone_and_upload_nothing() -> None:
    rows: dict[str, Sequence[Row]] = {"a": [(8,)], "b": [(16,)], "n": [(14,)]}
    how: dict[str, Any] = {"start": ONE["start"]}
    with_one = Bench(build("fedbasis", {"bases": 2, "newcomers": ("n",)}), rows=rows, **how)
    without = Bench(build("fedbasis", {"bases": 2}), **ONE)
    for bench in (with_one, without):
        for _ in range(4):
            bench.round()
    assert [flat(x) for x in with_one.state.held] == [flat(x) for x in without.state.held]
    assert with_one.replies["n"].adapters == {}
    assert blend_of(with_one, "n")[1] > 0.6
    assert with_one.replies["n"].facts["steps"] == 5


def test_who_has_fitted_nothing_serves_all_bases_alike() -> None:
    bench = Bench(build("fedbasis", {"bases": 2}), **ONE)
    bench.round()
    assert bench.serves("a") == bench.serves("b") == (6,)


def test_blends_stay_with_their_clients_unless_they_weigh() -> None:
    for weights, told in (("rows", False), ("blends", True)):
        bench = Bench(build("fedbasis", {"bases": 2, "weights": weights, "rate": 0.01}), **ONE)
        bench.round()
        bench.round()
        facts = bench.replies["a"].facts
        assert ("blend" in facts) == told
        assert "psi" not in facts
        assert "psi" in bench.memories["a"].facts


@pytest.mark.parametrize("odd", [None, 1.0, "ab", [0.5], [2.0, 0.5], [float("nan"), 0], ["x", 1]])
def test_what_is_no_share_counts_as_all(odd: Any) -> None:
    assert share(Parcel(facts={"blend": odd}), "base/0", 2) == 1.0
    assert share(Parcel(facts={"blend": [0.25, 0.75]}), "base/1", 2) == 0.75


def test_a_base_that_is_next_to_nothing_of_a_model_stays() -> None:
    # Its steps would be too short to move anything, which fails a turn.
    bench = Bench(build("fedbasis", {"bases": 2, "rate": 0.0}), **ONE)
    bench.round()
    for memory in bench.memories.values():
        memory.facts["psi"] = [0.0, 1.5]  # at 0.2 shares are as 1 to 1808
        memory.commit()
    before = [flat(base) for base in bench.state.held]
    bench.round()
    after = [flat(base) for base in bench.state.held]
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_a_base_for_which_nobody_counts_stays() -> None:
    bench = Bench(build("fedbasis", {"bases": 2, "weights": "blends", "rate": 0.0}), **ONE)
    bench.round()
    for memory in bench.memories.values():
        memory.facts["psi"] = [100.0, 0.0]  # at 0.2 the second share is 0
        memory.commit()
    before = [flat(base) for base in bench.state.held]
    bench.round()
    after = [flat(base) for base in bench.state.held]
    assert after[1] == before[1]
    assert after[0] != before[0]


def test_a_blend_without_a_finite_slope_stays() -> None:
    rows: dict[str, Any] = {"a": [(8,)], "b": [(16,)]}
    bench = Bench(build("fedbasis", {"bases": 2, "rate": 0.01}), rows=rows, start=ONE["start"])
    bench.round()
    rows["a"] = [(float("nan"),)]
    bench.round()
    assert "psi" not in bench.memories["a"].facts
    assert "psi" in bench.memories["b"].facts


def test_batches_in_parts_fit_the_same_blend() -> None:
    how: dict[str, Any] = {"rounds": 2, "training": SGD, "seeds": (1, 2)}
    method, found = FedBasis(bases=2, rate=5.0), list[Any]()
    for count in (1, 2):
        engine = play(method, Seat(Cut(1, 1), accumulate=count), **how).engine
        found.append(engine.memories["c0"].facts["psi"])
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert abs(found[0][0]) > 1e-3
