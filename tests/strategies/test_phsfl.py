"""PHSFL: the oracles of its section, by hand, what it equals, and what a round of it costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from strategies.bowls import A, B, Bench
from strategies.pairs import alike
from strategies.prices import MASK, SEATS, STEPS, S, check_round, sizer
from toys import Played, backbone, examples, gap, play, same, whole

from flexp.client.desk import Training
from flexp.data.examples import Examples, Shard
from flexp.dice import Dice
from flexp.engine.host import beginning
from flexp.model.adapter import Lora
from flexp.model.cut import Cut, Seat
from flexp.model.ops import Optim, SlotSpec
from flexp.selection import HEAD
from flexp.strategies import build
from flexp.strategies.base import Setting
from flexp.strategies.fedbabu import FedBabu
from flexp.strategies.phsfl import Phsfl
from flexp.strategies.splitfed_v1 import SplitFedV1

U, V = Seat(Cut(1, 1)), Seat(Cut(2), "loss")
SGD = Training(Optim("sgd", lr=3.0), batch=4, steps=STEPS)
FLAT = Phsfl(edges=1, edge_rounds=1, tune_rounds=0, head_rows=None)
ROOM = 1 << 20


def ran(method: Any, seats: Any, **more: Any) -> Played:
    """Two rounds, in which nobody fails."""
    options: dict[str, Any] = {"training": SGD, "profile": "open", **more}
    found = play(method, seats, **options)
    assert all(arrival.failure is None for arrival in found.arrivals)
    return found


# ---- by hand


def test_phsfl_averages_at_edges_then_centrally_and_tunes_heads_last() -> None:
    # a and b are at an edge each, and two edge rounds pass before the centre averages.
    bench = Bench(build("phsfl", {}), rounds=4)
    bench.round()
    assert bench.worn("a") == (4, 8, 0)
    assert bench.worn("b") == (8, 4, 0)
    # a: (6, 12), b: (12, 6), three rows to one: (6 + 36) / 4 = 10.5, (12 + 18) / 4 = 7.5.
    bench.round()
    assert bench.both() == (10.5, 7.5, 0)
    # The last round before heads goes up as well, after one edge round: (9.25 + 39.75) / 4.
    bench.round()
    assert bench.both() == (12.25, 8.75, 0)
    bench.round()  # half of the way, heads alone
    assert bench.worn("a") == (12.25, 8.75, 16)
    assert bench.worn("b") == (12.25, 8.75, -8)


def test_phsfl_deals_clients_to_edges_in_turn() -> None:
    # a and c share an edge, with one row each, b has another with three. Fronts: a 4, c 8, b 8.
    rows = {"a": [A], "b": [B] * 3, "c": [B]}
    bench = Bench(build("phsfl", {"edge_rounds": 3}), rows=rows)
    bench.round()
    assert [bench.worn(c)[0] for c in "abc"] == [6, 8, 6]
    bench.round()  # from 6: a 7, c 11; from 8: b 12
    assert [bench.worn(c)[0] for c in "abc"] == [9, 12, 9]
    # From 9: a 8.5, c 12.5, so 10.5; b 14. The centre: two rows to three, (2 * 10.5 + 3 * 14) / 5.
    bench.round()
    assert [bench.worn(c)[0] for c in "abc"] == pytest.approx([12.6] * 3)


def test_phsfl_gives_the_body_once_more_to_who_missed_the_first_round_of_heads() -> None:
    bench = Bench(build("phsfl", {"tune_rounds": 2, "edges": 1}), rounds=3)
    bench.round()
    bench.round("b")
    assert bench.worn("a") == (7, 5, 16)
    assert bench.worn("b") == (7, 5, 0)
    assert not bench.offered("a")
    bench.round()
    assert bench.worn("a") == (7, 5, 24)
    assert bench.worn("b") == (7, 5, -8)


def test_phsfl_tunes_as_many_steps_as_asked() -> None:
    bench = Bench(build("phsfl", {"tune_steps": 3}), rounds=2)
    bench.round()
    bench.round()
    assert bench.worn("a")[2] == 28


def test_an_edge_that_nobody_answered_for_counts_nothing() -> None:
    bench = Bench(build("phsfl", {"edge_rounds": 1}))
    bench.round("b")
    assert bench.both() == (4, 8, 0)
    bench.round("a", "b")
    assert bench.both() == (4, 8, 0)


# ---- the oracles of the section


@pytest.mark.parametrize("seats", [SEATS, V], ids=["mixed cuts", "v-shape"])
def test_one_edge_server_kappa_1_and_the_head_unfrozen_is_splitfed_v1(seats: Any) -> None:
    found = ran(replace(FLAT, head="trained"), seats)
    v1 = ran(SplitFedV1(), seats)
    assert alike(found, v1)
    assert same(found.state.bodies["0"], v1.state)
    assert not alike(ran(FLAT, seats), v1)


def joined(shards: Any) -> Shard:
    """The training rows of several clients as one's."""
    parts = [shard.train for shard in shards]
    ids, labels = (tuple(x for p in parts for x in getattr(p, name)) for name in ("ids", "labels"))
    return Shard(Examples(ids, labels, ("toy",) * len(ids)))


def test_kappas_of_1_equal_weights_and_full_batches_are_centralized_descent() -> None:
    once = replace(SGD, batch=99, steps=1)
    shards = {f"c{n}": Shard(examples(n, 6)) for n in range(4)}
    found = ran(Phsfl(edge_rounds=1, tune_rounds=0), U, shards=shards, training=once)
    together = {"all": joined(shards.values())}
    pooled = ran(Phsfl(tune_rounds=0), [whole(4)], shards=together, training=once)
    ours, theirs = found.state.bodies["0"], pooled.state.bodies["0"]
    assert gap(ours, theirs) < 1e-6
    begun = found.engine.initial(SlotSpec())
    assert gap(ours, {k: begun[k] for k in ours}) > 1e-3


@pytest.mark.parametrize("seats", [U, V, SEATS], ids=["u", "v", "mixed"])
def test_the_head_is_unchanged_until_personalisation_and_the_body_during_it(seats: Any) -> None:
    before, after = (ran(Phsfl(tune_rounds=n), seats, rounds=2 + n) for n in (0, 1))
    begun = before.engine.initial(Phsfl().specs()["personal"])
    for client, adapter in after.adapters.items():
        for k, v in adapter.items():
            learned = before.adapters[client][k]
            if "classifier" in k:
                assert torch.equal(learned, begun[k])
                assert not torch.equal(v, begun[k])
            else:
                assert torch.equal(v, learned), k
                assert not torch.equal(v, begun[k]), k


def test_two_levels_equal_the_flat_weighted_mean_when_kappa_1_is_1() -> None:
    uneven = {f"c{n}": Shard(examples(n, 4 + n % 2 * 4)) for n in range(4)}
    how: dict[str, Any] = {"shards": uneven, "training": replace(SGD, steps=None, epochs=1)}
    flat_mean = ran(FLAT, U, **how).state.bodies["0"]
    two = ran(replace(FLAT, edges=2), U, **how).state.bodies
    assert gap(two["0"], flat_mean) < 1e-6
    assert same(two["0"], two["1"])
    apart = ran(replace(FLAT, edges=2, edge_rounds=2), U, rounds=1, **how)
    assert gap(*apart.state.bodies.values()) == 0  # the last round goes up
    apart = ran(replace(FLAT, edges=2, edge_rounds=2, tune_rounds=0), U, rounds=2, **how)
    assert gap(apart.state.bodies["0"], flat_mean) > 5e-6


@pytest.mark.parametrize(
    "seat", [U, Seat(Cut(2, 0)), V, whole(4)], ids=["u", "no tail", "v", "whole"]
)
def test_cached_feature_fine_tuning_is_the_uncached_one_bit_for_bit(seat: Seat) -> None:
    """Where a row's feature has the same bits in any batch; as here, with all rows in one."""
    tuned = Phsfl(tune_rounds=2, tune_steps=5)
    found = [
        ran(tuned, seat, rounds=3, rows=4, training=replace(SGD, cache=cache))
        for cache in (0, ROOM)
    ]
    assert alike(*found)
    hidden = [played.arrivals[0].ledger.kinds.get(("up", "hidden"), 0) for played in found]
    assert hidden == ([0, 0] if seat == whole(4) else [5 * S, S])


# ---- relations


def test_phsfl_of_one_edge_is_fedbabu() -> None:
    for rounds in (1, 3):
        found = ran(Phsfl(edges=1, edge_rounds=1, head_rows=None), whole(4), rounds=rounds)
        assert alike(found, ran(FedBabu(tune="head"), whole(4), rounds=rounds))
    assert not alike(found, ran(FedBabu(tune="all"), whole(4), rounds=3))


@pytest.mark.parametrize("form", ["orthogonal", "etf"])
def test_a_frozen_head_may_have_rows_apart(form: Any) -> None:
    spec = SlotSpec(head_rows=2.0, head_form=form)
    begun = beginning(backbone(), spec, None, kind=Lora(3), dice=Dice(0))
    rows = begun["base_model.model.classifier.weight"]
    gram = rows @ rows.T
    wanted = torch.full((3, 3), -0.5 if form == "etf" else 0.0).fill_diagonal_(1.0)
    assert torch.allclose(gram, 4 * wanted, atol=1e-5)
    found = ran(Phsfl(head_form=form), U)
    drawn = ran(Phsfl(), U)
    assert not alike(found, drawn)


# ---- what a round costs


def test_an_edge_round_of_phsfl_costs_steps_and_fronts_each_way() -> None:
    check_round(Phsfl(tune_rounds=0), 1, ~HEAD, ~HEAD)


def test_a_step_with_labels_at_the_edge_costs_two_hidden_states_and_labels() -> None:
    found = ran(Phsfl(tune_rounds=0), V)
    begun = found.engine.initial(SlotSpec())
    near, labels = sizer(begun, V)(~HEAD), 4 * 8
    for arrival in found.arrivals:
        assert arrival.ledger.sent == STEPS * (S + MASK + labels + 4) + near
        assert arrival.ledger.received == STEPS * (S + 4) + near


@pytest.mark.parametrize(
    ("rounds", "cache", "passes", "bodies"),
    # The body comes once. Then a feature is one hidden state each way: of every step, or, kept,
    # of each of twelve rows once, which is three steps of four.
    [(2, 0, 9, 1), (3, 0, 9, 0), (2, ROOM, 3, 1), (3, ROOM, 3, 0)],
)
def test_fine_tuning_costs_a_forward_of_the_data(
    rounds: int, cache: int, passes: int, bodies: int
) -> None:
    tuned = Phsfl(tune_rounds=rounds - 1, tune_steps=9)
    found = ran(tuned, U, rounds=rounds, training=replace(SGD, cache=cache))
    body = bodies * sizer(found.engine.initial(SlotSpec()), U)(~HEAD)
    for arrival in found.arrivals:
        assert (arrival.ledger.sent, arrival.ledger.received) == (
            passes * (S + MASK),
            passes * S + body,
        )


# ---- where it cannot run


def setting(**changes: Any) -> Setting:
    return replace(
        Setting("classification", Lora(3, 6.0), {"anna": U, "ben": V}, 4, head=True), **changes
    )


HEADS = {"anna": ("classification", "a", "b"), "ben": ("classification", "c", "d")}


@pytest.mark.parametrize(
    ("method", "changes", "why"),
    [
        (Phsfl(), {"heads": HEADS}, ""),
        (Phsfl(head="trained"), {"heads": HEADS}, "brings the heads of all clients together"),
        (Phsfl(), {"seats": {"anna": U, "ben": replace(U, rank=2)}}, "all clients need one rank"),
        (Phsfl(), {"head": False, "task": "causal-lm"}, "Set strategy.blocks"),
        (Phsfl(blocks=1), {"head": False, "task": "causal-lm"}, ""),
        (Phsfl(blocks=4), {}, "choose fewer"),
    ],
)
def test_phsfl_says_where_it_cannot_run(method: Phsfl, changes: Any, why: str) -> None:
    found = method.refuses(setting(**changes))
    assert (why in found) if why else not found
