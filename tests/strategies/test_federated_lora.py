"""Federated LoRA: by hand, what each must equal, unequal ranks, and what a round costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from strategies.bowls import FACTOR, PAIR, Bench, after_two_rounds
from strategies.prices import SGD, check_round
from toys import Played, play, same, whole

from flexp.model.adapter import Ia3, Lora
from flexp.model.cut import Cut, Seat
from flexp.strategies import build
from flexp.strategies.base import Setting, Strategy
from flexp.strategies.fedsa_lora import FedSaLora
from flexp.strategies.ffa_lora import A, FfaLora
from flexp.strategies.local import Local

U = Seat(Cut(1, 1))
MIXED = (U, Seat(Cut(2, 0)), whole(4))


def alike(a: Played, b: Played) -> bool:
    return all(same(a.adapters[c], b.adapters[c]) for c in a.adapters)


# ---- A is shared, B is not


def test_fedsa_lora_averages_a_and_keeps_b() -> None:
    # a: the slopes are -8, so A = B = 2. b: they are 8, so A = B = 0. A: (2 + 3 * 0) / 4 = 0.5.
    bench = Bench(FedSaLora(), **PAIR)
    bench.round()
    assert list(bench.replies["a"].adapters["personal"]) == [FACTOR]  # B does not travel
    assert bench.worn("a") == (0.5, 2)
    assert bench.worn("b") == (0.5, 0)
    # a: B A - 9 = -8, the slopes -16 and -4, so A = 2.5, B = 2.5. b: B A + 7 = 7, the slopes 0 and
    # 3.5, so A = 0.5, B = -0.4375. A: (2.5 + 3 * 0.5) / 4 = 1.
    bench.round()
    assert bench.worn("a") == (1, 2.5)
    assert bench.worn("b") == (1, -0.4375)


def test_fedsa_lora_of_one_client_is_local() -> None:
    plain: dict[str, Any] = {"rounds": 3, "seeds": (1,), "training": SGD}
    for seat in (U, whole()):
        assert alike(play(FedSaLora(), [seat], **plain), play(Local(), [seat], **plain))


def test_fedsa_lora_shares_what_ffa_lora_does_not() -> None:
    sa, ffa = play(FedSaLora(), MIXED), play(FfaLora(), MIXED)
    for one, other in zip(sa.adapters.values(), list(sa.adapters.values())[1:], strict=False):
        assert all(("lora_A" in k) == bool((v == other[k]).all()) for k, v in one.items())
    assert sa.state.keys() | ffa.state.keys() == set(sa.adapters["c0"])
    assert not sa.state.keys() & ffa.state.keys()


# ---- what a round costs

# method: fits per turn, and near tensors sent down and up
COSTS: dict[str, tuple[Strategy[Any], int, Any, Any]] = {
    "fedsa_lora": (FedSaLora(), 1, A, A),
}


@pytest.mark.parametrize("name", COSTS)
def test_a_round_of_federated_lora_costs_what_the_formula_says(name: str) -> None:
    check_round(*COSTS[name])


# ---- where they cannot run, and what their optimizers remember


def setting(**changes: Any) -> Setting:
    seats = {"anna": U, "ben": Seat(Cut(2, 0))}
    return replace(Setting("classification", Lora(3, 6.0), seats, 4, head=True), **changes)


RANKS = {"anna": replace(U, rank=2), "ben": replace(U, rank=4)}
REFUSED: list[tuple[Strategy[Any], dict[str, Any], str]] = [
    (FedSaLora(), {"adapter": Ia3()}, "Set adapter.kind=lora"),
    (FedSaLora(), {"seats": RANKS}, "all clients need one rank"),
    (FedSaLora(), {}, ""),
]


@pytest.mark.parametrize(("method", "changes", "why"), REFUSED)
def test_federated_lora_says_where_it_cannot_run(
    method: Strategy[Any], changes: dict[str, Any], why: str
) -> None:
    found = method.refuses(setting(**changes))
    assert (why in found) if why else not found


# Both want 8: see test_by_hand.py, which has the rule and the other methods.
ENDS: dict[str, tuple[float, ...]] = {"fedsa_lora": (6, 6, 6)}


@pytest.mark.parametrize("name", ENDS)
def test_momentum_of_federated_lora(name: str) -> None:
    assert after_two_rounds(build(name, {})) == ENDS[name]
