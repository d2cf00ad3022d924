"""DyPFL, once by hand and by the oracles of its specification.

On the bench of ``test_by_hand.py`` a client's validation rows are its training rows.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from strategies.bowls import Bench, flat, numbers
from strategies.pairs import SGD, alike, ran
from strategies.prices import SEATS, body
from toys import at_desk, play, same, shard, whole

from flexp.data.examples import Examples, Shard
from flexp.model.cut import Cut, Seat
from flexp.model.ops import Optim
from flexp.parcel import Parcel
from flexp.strategies import build
from flexp.strategies.dypfl import DyPfl
from flexp.strategies.fedavg import FedAvg
from flexp.strategies.pfedme import PFedMe
from flexp.tensors import Term

FIRST: dict[str, Any] = {"explore": 1.0, "decay": 0.0}  # all try in the first round, then nobody
NEAR: dict[str, Any] = {"lam": 0.5, "inner": 2, "eta": 2.0, "adapt": 2.0, **FIRST}
ONE: dict[str, Any] = {  # of two numbers the second is as all want it
    "start": numbers(FRONT=0.0, TRUNK=0.0),
    "rows": {"a": [(8, 0)], "b": [(16, 0)] * 3},
}
LINE: dict[str, Any] = {"start": ONE["start"]}


def told(bench: Bench, client: str) -> Any:
    """What the client said of its last turn: whether it personalised, its gap and its lambda."""
    facts = bench.replies[client].facts
    return facts["personalised"], facts["gap"], facts["lam"]


def test_dypfl_chooses_by_the_gap() -> None:
    # Both try: 5/8 of the way, a to 5 and b to 10. All of it is taken over: w = (5 + 30) / 4.
    bench = Bench(build("dypfl", NEAR), **ONE)
    bench.round()
    assert told(bench, "a") == told(bench, "b") == (True, 0.0, 0.5)
    assert (flat(bench.state.shared), bench.state.rate) == ((8.75, 0), 1.0)
    # At a w is better, 0.75^2 / 2 to 3^2 / 2, so it serves that; at b worse, 7.25^2 / 2 to 6^2 / 2.
    assert (bench.worn("a"), bench.worn("b")) == ((8.75, 0), (10, 0))
    # a adopts: half of the way from 8.75 to 8. Its lambda would double, but eta lambda is 1. b may
    # go further, lambda 1/4: 8.75, then 12.375, then 3.625 - 3.625 / 4 half, so 13.734375. w_b goes
    # half of the way there, eta lambda being 1/2: 11.2421875.
    bench.round()
    assert told(bench, "a") == (False, 0.28125 - 4.5, 0.5)
    assert told(bench, "b") == (True, 26.28125 - 18, 0.25)
    assert flat(bench.replies["a"].adapters["shared"]) == (8.375, 0)
    assert flat(bench.replies["b"].adapters["shared"]) == (11.2421875, 0)
    assert (flat(bench.state.shared), bench.state.rate) == ((10.525390625, 0), 0.5)
    # Rows count, not how often they were seen: (8.375 + 3 * 11.2421875) / 4. w has moved away from
    # a, which serves what it had adopted, and compares that; so it will personalise.
    assert (bench.worn("a"), bench.worn("b")) == ((8.75, 0), (13.734375, 0))
    bench.round()
    assert told(bench, "a") == (True, pytest.approx(2.9075, abs=1e-3), 0.5)
    assert told(bench, "b")[2] == 0.125
    assert bench.state.rate == 1.0


def test_the_server_takes_beta_of_the_mean() -> None:
    bench = Bench(build("dypfl", {**NEAR, "beta": 0.5}), **ONE)
    bench.round()
    assert flat(bench.state.shared) == (4.375, 0)


# ---- oracles


def test_with_an_imposed_rate_of_0_it_is_fedavg() -> None:
    found, fedavg = ran(DyPfl(rate=0.0)), ran(FedAvg())
    assert alike(found, fedavg)
    assert same(found.state.shared, fedavg.state)
    assert found.state.rate == 0.0
    assert not alike(ran(DyPfl(rate=1.0)), fedavg)


@pytest.mark.parametrize("beta", [1.0, 0.5])
@pytest.mark.parametrize("training", [None, replace(SGD, still="allow")], ids=["adamw", "sgd"])
def test_with_an_imposed_rate_of_1_it_is_pfedme(beta: float, training: Any) -> None:
    ours = ran(DyPfl(1.0, 3, 0.5, beta, rate=1.0), training=training)
    pfedme = ran(PFedMe(1.0, 3, 0.5, beta), training=training)
    assert alike(ours, pfedme)
    assert same(ours.state.shared, pfedme.state)
    assert ours.state.rate == 1.0
    assert not alike(ran(DyPfl(1.0, 3, 0.5, beta, rate=0.0), training=training), pfedme)


ODD = [(whole(4), f"{slot}, no number") for slot in ("personal", "shared")]  # refused at a cut
SPOILT = [(seat, s) for seat in (Seat(Cut(1, 1)), whole(4)) for s in ("personal", "shared", "none")]


@pytest.mark.parametrize(("seat", "spoilt"), [*SPOILT, *ODD])
def test_what_is_served_is_no_worse_than_either(seat: Seat, spoilt: str) -> None:
    method = DyPfl()
    with at_desk(body(), seat, slots=dict(method.slots)) as (desk, _):
        desk.assign("start", (Term("shared"),))
        desk.fit(steps=4)
        desk.fit(wear="shared", steps=2)
        slot, _, odd = spoilt.partition(", ")
        if slot != "none":  # as far the other way, or nowhere
            mix = (Term("start", 6.0), Term(slot, math.nan if odd else -5.0))
            desk.assign(slot, mix)
        served = method.personal(desk, Parcel(facts={"imposed": None})).adapter
        assert served is not None
        both = {name: desk.loss(name) for name in ("personal", "shared")}
        assert desk.loss(served) <= min(x for x in both.values() if not math.isnan(x))
        assert spoilt == "none" or served != slot
        assert len({*both.values()}) == 2


def test_nobody_ever_serves_the_worse_of_both() -> None:
    rows = {"a": [(8, 0)], "b": [(16, 0)] * 3, "c": [(9, 0)], "d": [(-4, 0)]}
    bench, seen = (
        Bench(build("dypfl", {**NEAR, "explore": 0.5, "decay": 1.0}), **LINE, rows=rows),
        set[str](),
    )
    for _ in range(8):
        bench.round()
        for client in rows:
            offer = bench.strategy.offer(bench.state, client, bench.turn())
            desk = bench.sit(client, offer)
            served = bench.strategy.personal(desk, offer).adapter
            assert isinstance(served, str)
            assert desk.loss(served) == min(desk.loss("personal"), desk.loss("shared"))
            seen.add(served)
    assert seen == {"personal", "shared"}


def rates(bench: Bench, rounds: int) -> list[float]:
    """The personalisation rate of each round."""
    out = list[float]()
    for _ in range(rounds):
        bench.round()
        out.append(bench.state.rate)
    return out


def test_who_wants_the_same_only_tries() -> None:
    # A try is here a turn of FedAvg, so v_i is the next w, and nobody is ever better off with it.
    same_step = {"lam": 0.5, "inner": 1, "eta": 2.0, "decay": 1.0}
    rows = {c: [(8, 0)] for c in "abcdefgh"}
    found = rates(Bench(build("dypfl", same_step), rows=rows, **LINE), 16)
    assert 0.15 < sum(found) / 16 < 0.45  # epsilon is 0.3
    found = rates(Bench(build("dypfl", {**same_step, "decay": 0.5}), rows=rows, **LINE), 12)
    assert found[0] > 0.0
    assert found[-4:] == [0.0] * 4


def test_who_wants_other_things_personalises() -> None:
    rows = {c: [(16 * (-1) ** n * (n + 1), 0)] for n, c in enumerate("abcdefghij")}
    options = {"lam": 0.5, "inner": 2, "eta": 1.0, "explore": 0.5}
    bench = Bench(build("dypfl", options), rows=rows, optim=Optim("sgd", lr=0.0625), **LINE)
    found = rates(bench, 30)
    assert found[0] < 0.8
    assert found[-10:] == [1.0] * 10


def conflicting(client: int) -> Shard:
    """The same texts for all, labelled otherwise by each."""
    one = shard(1)
    parts = {"train": one.train, "val": one.val, "test": one.test}
    return Shard(**{k: replace(v, labels=shifted(v, client)) for k, v in parts.items()})


def shifted(rows: Examples, by: int) -> tuple[int, ...]:
    return tuple((int(str(label)) + by) % 3 for label in rows.labels)


def test_conflicting_labels_drive_the_rate_to_1() -> None:
    method, shards = DyPfl(1.0, 3, 0.5, explore=0.5), {f"c{n}": conflicting(n) for n in range(3)}
    first, last = (
        play(method, SEATS, shards=shards, rounds=n, body=body()).state.rate for n in (1, 8)
    )
    assert first < last == 1.0


@pytest.mark.parametrize("power", [4, 8, 30])
def test_the_larger_lambda_the_nearer_is_v_to_w(power: int) -> None:
    lam = 2.0**power
    options = {"lam": lam, "inner": 4, "eta": 1 / lam, "adapt": 1.0, "rate": 1.0}
    how: dict[str, Any] = {**ONE, "start": numbers(FRONT=1.0, TRUNK=0.0)}
    bench = Bench(build("dypfl", options), optim=Optim("sgd", lr=1 / lam), **how)
    bench.round()
    assert 0 <= bench.worn("a")[0] - 1 <= 7 / lam
    assert (bench.worn("a")[0] == 1) == (power == 30)  # less than a float32 can tell
