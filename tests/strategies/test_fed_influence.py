"""Fed-Influence, by hand, against training without a client, and beside what it observes.

In a bowl the step goes part of the way to what a client wants, so J is what is left of the way.
"""

from __future__ import annotations

from statistics import correlation
from typing import Any

import pytest
import torch
from strategies.bowls import A, B, Bench, flat, numbers
from strategies.prices import MASK, SEATS, SGD, STEPS, S, body, sizer
from strategies.softmax import Toy, toy
from strategies.softmax import flat as weights
from toys import play, same

from flexp.client.desk import Training
from flexp.dice import Dice
from flexp.errors import StrategyError
from flexp.model.adapter import Lora
from flexp.model.ops import Optim
from flexp.selection import ALL
from flexp.strategies import build
from flexp.strategies.base import Setting
from flexp.strategies.left_out import within

BOTH: dict[str, Any] = {"watch": ["a", "b"]}
THREE: dict[str, Any] = {"a": [A], "b": [B, B, B], "c": [(3, -5, 7), (9, 1, 2)]}
ASKING = pytest.mark.parametrize("mode", ["hvp", "hvp1"])


def observed(**options: Any) -> Any:
    return build("fed_influence", options)


def shift(bench: Bench, client: str) -> tuple[float, ...]:
    return flat(bench.state.shifts[client])


# ---- by hand


@ASKING
def test_fed_influence_finds_who_would_be_alone(mode: str) -> None:
    # a: (4, 8, 16), b: (8, 4, -8), so theta = (7, 5, -2). Without a it is b's: (1, -1, -6) more.
    bench = Bench(observed(mode=mode, **BOTH))
    bench.round()
    assert shift(bench, "a") == (1, -1, -6)
    assert shift(bench, "b") == (-3, 3, 18)
    # b alone goes on to (12, 6, -12), and theta to (10.5, 7.5, -3). Estimated: half of what it
    # was, and a third of theta - theta_a = (3, -3, -18).
    bench.round()
    assert shift(bench, "a") == (1.5, -1.5, -9)
    assert shift(bench, "b") == (-4.5, 4.5, 27)
    assert flat(bench.state.of) == bench.both() == (10.5, 7.5, -3)
    assert bench.state.turns == {"a": 2, "b": 2}


def test_fed_influence_forgets_nothing_in_mode_none() -> None:
    bench = Bench(observed(mode="none"))
    bench.round()
    bench.round()
    assert shift(bench, "a") == (2, -2, -12)  # (1, -1, -6) twice


def test_fed_influence_scales_by_squared_slopes_in_mode_diag() -> None:
    # One number; eta 1/8, two steps. a has one row and wants 1, b three and want -1: from 0 they
    # come to 15/64 and -15/64. theta = -15/128, without a it is 15/128 less.
    rows = {"a": [(1,)], "b": [(-1,)] * 3}
    how: dict[str, Any] = {"rows": rows, "start": numbers(FRONT=0.0), "steps": 2}
    bench = Bench(observed(mode="diag"), optim=Optim("sgd", lr=0.125), **how)
    bench.round()
    assert shift(bench, "a") == (-15 / 128,)
    assert flat(bench.replies["b"].adapters["curve"]) == (0.125,)  # eta times a slope of 1, squared
    # b's rows have a slope of 1 - 15/128, so J_b is (1 - (113/128)^2 / 8)^2.
    bench.round()
    left = (1 - (113 / 128) ** 2 / 8) ** 2
    moved = flat(bench.state.of)[0] - bench.trained("a")[0]
    assert shift(bench, "a")[0] == pytest.approx(-15 / 128 * left + moved / 3, abs=1e-6)


# ---- the oracles of its specification


@ASKING
def test_quadratic_losses_are_exact(mode: str) -> None:
    steps = 3 if mode == "hvp" else 1
    bench = Bench(observed(mode=mode, watch=[*THREE]), rows=THREE, steps=steps)
    rest = {c: {k: v for k, v in THREE.items() if k != c} for c in THREE}
    left = {c: Bench(build("fedavg", {}), rows=rows, steps=steps) for c, rows in rest.items()}
    for _ in range(3):
        bench.round()
        for without in left.values():
            without.round()
    for c, without in left.items():
        found = torch.tensor(flat(bench.state.of)) + torch.tensor(shift(bench, c))
        assert torch.allclose(found, torch.tensor(flat(without.state)), rtol=0, atol=1e-5), c


@pytest.mark.parametrize("mode", ["hvp", "hvp1", "diag", "none"])
def test_a_client_that_never_comes_has_no_influence(mode: str) -> None:
    bench = Bench(observed(mode=mode, watch=[*THREE]), rows=THREE)
    bench.round("c")
    bench.round("c")
    assert shift(bench, "c") == (0, 0, 0)
    assert bench.state.turns["c"] == 0
    assert any(shift(bench, "a"))


@ASKING
def test_without_memory_only_the_last_round_counts(mode: str) -> None:
    # A step of rate 1 goes all of the way, wherever it begins: J = 0.
    bench = Bench(observed(mode=mode, **BOTH), optim=Optim("sgd", lr=1.0))
    for _ in range(2):
        bench.round()
        for c, share in (("a", 1 / 3), ("b", 3.0)):
            pairs = zip(flat(bench.state.of), bench.trained(c), strict=True)
            assert shift(bench, c) == tuple(share * (all_ - mine) for all_, mine in pairs)


def test_a_client_that_is_alone_in_a_round_takes_it_back() -> None:
    bench = Bench(observed(mode="none"))
    bench.round()
    bench.round("b")  # only a: theta goes from (7, 5, -2) to (7.5, 10.5, 15)
    assert shift(bench, "a") == (1 - 0.5, -1 - 5.5, -6 - 17)
    assert shift(bench, "b") == (-3, 3, 18)
    bench.round("a", "b")
    assert shift(bench, "a") == (0.5, -6.5, -23)


def agreement(found: Toy, mode: str) -> tuple[float, float]:
    """Correlations of norms and of changes of the loss; the noisy rank lowest."""
    bench, theta = found.bench(observed(mode=mode, watch=[*found.rows])), found.trained()
    assert torch.allclose(weights(bench.state.of), theta, atol=1e-5)
    shifts = {c: weights(e) for c, e in bench.state.shifts.items()}
    real = {c: found.trained(c) - theta for c in shifts}
    change, changed = (
        {c: found.loss(theta + e[c]) - found.loss(theta) for c in e} for e in (shifts, real)
    )
    for one in (change, changed):
        assert set(sorted(one, key=lambda c: one[c])[: len(found.noisy)]) == set(found.noisy)
    norms = ([float(v.norm()) for v in e.values()] for e in (shifts, real))
    return correlation(*norms), correlation([*change.values()], [*changed.values()])


def test_hvp_is_what_training_without_a_client_says() -> None:
    assert min(agreement(toy(6, (1, 4), 4, 2, 0.1), "hvp")) > 0.99


def test_diag_is_nearly_what_training_without_a_client_says() -> None:
    assert min(agreement(toy(12, (3, 8), 8, 1, 0.1), "diag")) > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(20, 1, 0.1), (20, 5, 0.05)], ids=["one step", "five"])
@pytest.mark.parametrize(("mode", "least"), [("hvp", 0.99), ("hvp1", 0.99), ("diag", 0.95)])
def test_twelve_clients_two_of_them_noisy(shape: Any, mode: str, least: float) -> None:
    assert min(agreement(toy(12, (3, 8), *shape), mode)) > least


# ---- beside what it observes

TIED = {"name": "flexp", "align": 0.3}
CASES = [
    ("fedavg", "hvp"), ("fedavg", "hvp1"), ("fedavg", "diag"), ("fedavg", "none"),
    ("splitfed_v1", "diag"), (TIED, "hvp"), (TIED, "diag"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("of", "mode"), CASES, ids=lambda one: one if isinstance(one, str) else one["name"]
)
def test_an_observer_changes_nothing(of: Any, mode: str) -> None:
    told = {"name": of} if isinstance(of, str) else dict(of)
    plain = build(told.pop("name"), told)
    clip = 0.5 if mode in ("hvp", "none") else None
    how: dict[str, Any] = {
        "training": Training(Optim("sgd", lr=0.5), batch=4, steps=2, clip_norm=clip),
        "kind": Lora(rank=3, alpha=6.0, dropout=0.2),
        "seeds": (1, 2, 3),
        "body": body(),
    }
    watching = play(observed(of=of, mode=mode, watch=["c0", "c2"], rows=4), SEATS, **how)
    alone = play(plain, SEATS, **how)
    assert all(a.failure is None for a in (*watching.arrivals, *alone.arrivals))
    for client, adapter in alone.adapters.items():
        assert same(watching.adapters[client], adapter), client
    assert same(watching.state.of, alone.state)
    # Who has all near takes no part in what flexp averages.
    moves = [any(bool(v.any()) for v in e.values()) for e in watching.state.shifts.values()]
    assert moves == [True, of is not TIED]


@pytest.mark.parametrize("mode", ["hvp", "hvp1", "diag", "none"])
def test_a_round_of_fed_influence_costs_what_the_formula_says(mode: str) -> None:
    # FedAvg's, and: a diagonal and a pass over 12 rows for it; or, for each of three clients, e_c
    # both ways, and two turns more, or two passes over the rows.
    method = observed(mode=mode, watch=["c0", "c1", "c2"], rows=4)
    played = play(method, SEATS, training=SGD, body=body())
    begun, (adapters, more) = (
        body().initial(Lora(3, 6.0), Dice(0)("initial")),
        {
            "hvp": ((4, 4), 2 * 3 * STEPS),
            "hvp1": ((4, 4), 2 * 3 * STEPS),  # of a pass as much as a turn has
            "diag": ((1, 2), 3),
            "none": ((1, 1), 0),
        }[mode],
    )
    for seat, arrival in zip(SEATS, played.arrivals, strict=True):
        near, steps = sizer(begun, seat)(ALL), STEPS + more
        steps = steps if arrival.client != "c2" else 0
        assert (arrival.ledger.received, arrival.ledger.sent) == (
            steps * 2 * S + adapters[0] * near,
            steps * (2 * S + MASK) + adapters[1] * near,
        ), arrival.client


# ---- the check by block, and what is refused


def test_each_block_is_kept_within_its_bound() -> None:
    found = {"x": torch.tensor([3.0]), "y": torch.tensor([4.0]), "z": torch.tensor([1.0])}
    bound = {"x": torch.tensor([0.5]), "y": torch.tensor([0.0]), "z": torch.tensor([1.0])}
    kept = within(found, bound, 2.0, {"x": 0, "y": 0, "z": 1}.__getitem__)
    assert {k: round(float(v), 6) for k, v in kept.items()} == {"x": 0.6, "y": 0.8, "z": 1.0}
    assert within(found, bound, None, len) == found


def test_the_bounds_are_those_of_the_options() -> None:
    bench = Bench(observed(mode="none", most=0.5))
    bench.round()
    # theta has gone (7, 5, -2), a block each: of (-3, 3, 18) at most 3.5, 2.5 and 1 are left.
    assert shift(bench, "b") == (-3, 2.5, 1)
    bench = Bench(observed(mode="none", growth=1.5))
    bench.round()
    bench.round()
    assert shift(bench, "b") == (-4.5, 4.5, 27)  # not (-6, 6, 36)


REFUSED: list[tuple[dict[str, Any], Optim, str]] = [
    ({"of": "ditto"}, Optim("sgd"), 'follows a mean over clients, which "ditto"'),
    ({"of": {"name": "flexp", "trunk": "pulled"}}, Optim("sgd"), "with these options is not"),
    ({"of": "fedprox"}, Optim("sgd"), 'which "fedprox"'),
    ({"mode": "hvp"}, Optim("sgd"), "needs names of clients in strategy.watch, from these: a, b"),
    ({"watch": ["z"]}, Optim("sgd"), "needs names of clients"),
    ({}, Optim(), "Set train.optimizer=sgd without momentum"),
    ({"mode": "hvp", "watch": ["a"]}, Optim("sgd", momentum=0.5), "derives SGD steps"),
    ({"of": "flexp", "mode": "none"}, Optim(), ""),
]


@pytest.mark.parametrize(("options", "optim", "why"), REFUSED)
def test_what_cannot_be_followed_is_refused(options: Any, optim: Optim, why: str) -> None:
    seats = dict(zip("ab", SEATS, strict=False))
    setting = Setting("classification", Lora(3, 6.0), seats, 4, head=True, training=Training(optim))
    found = observed(**options).refuses(setting)
    assert why in found if why else found == ""


def test_a_wrong_method_is_said_before_anything_starts() -> None:
    with pytest.raises(StrategyError, match=r'strategy.of.name: there is no method "fedavgg"'):
        observed(of="fedavgg")
    with pytest.raises(StrategyError, match=r"strategy.of.rate: method .fedavg. has no such"):
        observed(of={"name": "fedavg", "rate": 1})
