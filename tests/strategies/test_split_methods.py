"""Split methods beyond the first ones: by hand, what each must equal, and what a step costs."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from strategies.bowls import FACTOR, FRONT, WIDE, Bench, after_two_rounds
from strategies.prices import MASK, SGD, STEPS, S, check_round
from toys import Played, backbone, play, same, whole

from flexp.client.desk import Desk
from flexp.dice import Dice
from flexp.model.adapter import Ia3, Lora
from flexp.model.backbone import Backbone
from flexp.model.cut import Cut, Seat
from flexp.parcel import Parcel
from flexp.products import lora_pairs
from flexp.selection import ALL, Where
from flexp.strategies import build
from flexp.strategies.base import ClientId, Setting, Strategy
from flexp.strategies.hsplitlora import HSplitLora
from flexp.strategies.local import Local
from flexp.strategies.ranks import allotted
from flexp.strategies.sl import Sl
from flexp.strategies.sl_ushape import SlUshape
from flexp.strategies.splitfrozen import SplitFrozen
from flexp.strategies.splitlora import SplitLora

U, V = Seat(Cut(1, 1)), Seat(Cut(2), "loss")
MIXED = (U, Seat(Cut(2, 0)), whole(4))


@functools.cache
def body() -> Backbone:
    return backbone()


def alike(a: Played, b: Played) -> bool:
    return all(same(a.adapters[c], b.adapters[c]) for c in a.adapters)


# ---- U-shaped split learning


def test_sl_ushape_goes_on_at_both_ends() -> None:
    # a: (4, 8, 16). b from there, half of the way to (16, 8, -16): (10, 8, 0). No weights.
    bench = Bench(SlUshape())
    bench.round()
    assert bench.trained("a") == (4, 8, 16)
    assert bench.both() == (10, 8, 0)
    assert bench.order == ["a", "b"]


def test_sl_ushape_of_one_client_is_training_in_one_place() -> None:
    alone: dict[str, Any] = {"rounds": 3, "seeds": (1,)}  # with AdamW, whose moments go on
    local = play(Local(), [whole()], **alone)
    for seat in (U, Seat(Cut(2, 1)), Seat(Cut(3, 0)), whole()):
        assert alike(play(SlUshape(), [seat], **alone), local), seat
    assert not alike(play(Sl(), [U], **alone), local)  # which begins each turn with a new optimizer


def test_sl_ushape_without_moments_is_sl_and_keeps_its_labels() -> None:
    found = play(SlUshape(), MIXED, training=SGD, keep_crossings=True)
    assert alike(found, play(Sl(), whole(), training=SGD))
    names = {c.name.split("/")[0] for a in found.arrivals for c in a.ledger.crossings or ()}
    assert names == {"hidden", "mask", "grad", "slot"}


# ---- frozen devices


def test_splitfrozen_relays_the_trunk_and_moves_nothing_else() -> None:
    # In the order drawn, b first: half of the way to 8 is 4, then half of the way to 16 is 10.
    bench = Bench(SplitFrozen(), seed=2)
    bench.round()
    assert bench.order == ["b", "a"]
    assert bench.both() == (0, 10, 0)
    bench.round("a")  # who fails moves nothing: b brings 10 to 9
    assert bench.both() == (0, 9, 0)


@dataclass(frozen=True)
class Late(Local):
    """One machine with the whole model that trains the last two blocks and the head."""

    slots: ClassVar[Any] = {
        "personal": replace(SplitFrozen.slots["personal"], home="tenant", lasts="run")
    }

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        return Parcel(facts=desk.fit(train=Where(last=2)))


@dataclass(frozen=True)
class LateRelay(Sl):
    """The same, one client after another in the order that splitfrozen draws."""

    slots: ClassVar[Any] = {"personal": replace(SplitFrozen.slots["personal"], home="tenant")}

    def waves(self, state: Any, chosen: Sequence[ClientId], dice: Dice) -> Any:
        return SplitFrozen().waves(None, chosen, dice)

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        return desk.reply("personal", facts=desk.fit(train=Where(last=2)))


@pytest.mark.parametrize("labels", ["loss", "logits"])
def test_splitfrozen_of_one_client_is_training_the_last_blocks(labels: Any) -> None:
    found = play(SplitFrozen(), [replace(V, labels=labels)], seeds=(1,), rounds=3, profile="open")
    assert alike(found, play(Late(), [whole()], seeds=(1,), rounds=3))


def test_splitfrozen_is_one_server_net_on_everybodys_rows() -> None:
    found = play(SplitFrozen(), V, training=SGD, rounds=3, profile="open")
    assert alike(found, play(LateRelay(), whole(), training=SGD, rounds=3))


@pytest.mark.parametrize(
    ("seat", "up", "down"),
    [
        (V, S + MASK + 4 * 8 + 4, 4),  # labels of four rows, a loss, and the gradient of one
        (replace(V, labels="logits"), S + MASK + 4 * 3 * 4, 4 * 3 * 4),
        (U, 2 * S + MASK, S),
    ],
    ids=["loss", "logits", "keep"],
)
def test_splitfrozen_sends_no_gradient_down_and_no_weight(seat: Seat, up: int, down: int) -> None:
    played = play(SplitFrozen(), seat, training=SGD, profile="open")
    for arrival in played.arrivals:
        assert (arrival.ledger.sent, arrival.ledger.received) == (STEPS * up, STEPS * down)


# ---- LoRA of other ranks on both sides


def test_hsplitlora_stacks_fronts_of_other_ranks() -> None:
    # Pairs of rank 2 that wear 0; a has rank 1 and wants 8, b wants -16. a: the slope of B is -8,
    # so B = 1 and it wears 1. b wears B A / 2: the slopes are 8, so B = (-1, -1): it wears -1.
    # (1 - 3 * 1) / 4 = -0.5, of which everybody gets the best of its rank.
    bench = Bench(HSplitLora(every=2), **WIDE)
    bench.round()
    assert [bench.serves(c) for c in "ab"] == [(1,), (-1,)]  # nothing is averaged yet
    bench = Bench(HSplitLora(), **WIDE)
    bench.round()
    for client in "ab":
        assert bench.serves(client) == pytest.approx((-0.5,))
    # B A / rank = -0.5, so a has 0.7 and -0.7, b a pair with 1 and -1, and one of zeros.
    near = [bench.offered(client)["personal"] for client in "ab"]
    assert near[0][FACTOR].flatten().tolist() == pytest.approx([0.5**0.5])
    assert near[1][FRONT].flatten().tolist() == pytest.approx([-1, 0], abs=1e-6)


def test_hsplitlora_of_equal_ranks_is_splitlora_but_for_cross_terms() -> None:
    assert alike(play(HSplitLora(every=9), MIXED), play(SplitLora(every=9), MIXED))
    kind = Lora(rank=32, alpha=6.0)  # nothing is lost by cutting back
    even = HSplitLora(ranks="seat")
    found, other = (play(m, U, rounds=1, kind=kind) for m in (even, SplitLora()))
    trained = [a.reply.adapters["personal"] for a in found.arrivals if a.reply is not None]
    rows, near = [a.rows for a in found.arrivals], 0
    ours, theirs = found.adapters["c0"], other.adapters["c0"]
    for path, (a, b) in lora_pairs(ours).items():
        if body().place(a, U).side == "far":  # one copy, which saw the same stream
            assert torch.equal(ours[a], theirs[a])
            assert torch.equal(ours[b], theirs[b])
            continue
        shares = [t[b] @ t[a] * r / sum(rows) for t, r in zip(trained, rows, strict=True)]
        true = torch.stack(shares).sum(0)
        assert torch.allclose(ours[b] @ ours[a], true, atol=1e-6), path
        assert not torch.allclose(theirs[b] @ theirs[a], true, atol=1e-6)
        near += 1
    assert near


def test_ranks_of_hsplitlora_may_differ() -> None:
    seats = (replace(U, rank=2), Seat(Cut(2, 0)), Seat(Cut(1, 0), rank=5))
    found = play(HSplitLora(ranks="seat"), seats, rounds=3)
    assert all(a.failure is None for a in found.arrivals)
    for (client, adapter), rank in zip(found.adapters.items(), (2, 3, 5), strict=True):
        place = body().place
        for a, _ in lora_pairs(adapter).values():
            far = place(a, seats[int(client[1])]).side == "far"
            assert len(adapter[a]) == (3 if far else rank)  # the server's is the recipe's


def test_rows_go_where_they_are_worth_most() -> None:
    # Rank 2 for two: 4 rows, 1 each, and 2 more. a: 6/2 against 1/2, then 6/3 against 1/2.
    worth, equal = {"a": 6.0, "b": 1.0}, {"a": 5, "b": 5}
    assert allotted(worth, equal, 2, most=4) == {"a": 3, "b": 1}
    assert allotted(worth, equal, 2, most=2) == {"a": 2, "b": 2}
    # Rows of a take 3 numbers: of the 8, 4 are left, which is one more for a, and one for b.
    assert allotted(worth, {"a": 3, "b": 1}, 2, most=9) == {"a": 2, "b": 2}
    assert allotted({"a": 1.0}, equal, 1, most=9) == {"a": 1, "b": 1}


def test_hsplitlora_adds_up_how_far_averages_move_a_matrix() -> None:
    bench = Bench(HSplitLora(), **WIDE)  # as above: from wearing 0 to -0.5
    path = FACTOR.removesuffix(".lora_A.weight")
    bench.round()
    assert bench.state.worth == pytest.approx({path: 0.5})
    (moved,) = bench.serves("a")
    bench.round()
    assert bench.state.worth[path] == pytest.approx(0.5 + abs(bench.serves("b")[0] - moved))


def test_hsplitlora_allots_ranks_by_importance() -> None:
    found = play(HSplitLora(), U, rounds=3, training=SGD)
    near = {
        path: [len(one[a]) for one in found.adapters.values()]
        for path, (a, _) in lora_pairs(found.adapters["c0"]).items()
        if body().place(a, U).side == "near"
    }
    assert all(len(set(ranks)) == 1 for ranks in near.values())  # everybody has the same seat
    ranks = {path: held[0] for path, held in near.items()}
    assert sum(ranks.values()) == 3 * len(ranks)  # no more than before
    worth = found.state.worth
    most, least = max(ranks, key=worth.__getitem__), min(ranks, key=worth.__getitem__)
    assert 6 >= ranks[most] > 3 > ranks[least] >= 1
    for path, (a, _) in lora_pairs(found.adapters["c0"]).items():
        assert path in ranks or len(found.adapters["c0"][a]) == 3  # the server's is the recipe's


def test_blocks_of_a_client_of_another_rank_move() -> None:
    low, high = (replace(seat, rank=r) for seat, r in ((U, 2), (Seat(Cut(2, 0)), 5)))
    there = {1: (replace(low, cut=Cut(2, 1)), replace(high, cut=Cut(1, 0)))}
    back = {2: (low, high)}
    for method in (HSplitLora(), HSplitLora(ranks="seat"), HSplitLora(every=2)):
        for moves in (there, there | back):
            found = play(method, (low, high), rounds=4, seeds=(1, 2), moves=moves)
            assert all(a.failure is None for a in found.arrivals), method
    found = play(HSplitLora(ranks="seat"), (low, high), rounds=2, seeds=(1, 2), moves=there)
    seats = there[1]
    for (client, adapter), seat in zip(found.adapters.items(), seats, strict=True):
        for a, _ in lora_pairs(adapter).values():
            near = body().place(a, seat).side == "near"
            assert not near or len(adapter[a]) == seat.rank, client


@pytest.mark.parametrize("method", [SlUshape(), HSplitLora()], ids=lambda m: m.name)
def test_a_round_costs_four_hidden_states_a_step_and_near_adapters(method: Strategy[Any]) -> None:
    check_round(method, 1, ALL, ALL)


def test_a_run_of_hsplitlora_ends_in_adapters_of_two_ranks(flexp: Any, recipe_of: Any) -> None:
    recipe = recipe_of(plan__ranks={"anna": 3}, rounds=2)
    code, out, err = flexp("run", str(recipe), "strategy.name=hsplitlora", "--json")
    assert code == 0, err
    for path in json.loads(out)["adapters"]:
        config = json.loads((Path(path) / "adapter_config.json").read_text())
        held = load_file(Path(path) / "adapter_model.safetensors")
        ranks = {len(held[a]) for a, _ in lora_pairs(held).values()}
        assert ranks == {config["r"], *config["rank_pattern"].values()}


# ---- where they cannot run, and what their optimizers remember


def setting(**changes: Any) -> Setting:
    seats = {"anna": U, "ben": Seat(Cut(2, 0))}
    return replace(Setting("classification", Lora(3, 6.0), seats, 4, head=True), **changes)


RANKS = {"anna": replace(U, rank=2), "ben": replace(U, rank=4)}
REFUSED: list[tuple[Strategy[Any], dict[str, Any], str]] = [
    (SlUshape(), {}, ""),
    (SlUshape(), {"seats": {"anna": U, "ben": V}}, 'Set plan.labels to "keep"'),
    (SlUshape(), {"seats": RANKS}, "all clients need one rank"),
    (SplitFrozen(), {}, ""),
    (SplitFrozen(), {"seats": {"anna": U, "ben": whole(4)}}, '"ben" has the whole model'),
    (SplitFrozen(), {"seats": RANKS}, "all clients need one rank"),
    (HSplitLora(), {"seats": RANKS}, ""),
    (HSplitLora(), {"adapter": Ia3()}, "Set adapter.kind=lora"),
    (HSplitLora(), {"adapter": Lora(3, 6.0, dora=True)}, "Set adapter.dora=false"),
    (HSplitLora(every=0), {}, "every is 0"),
]


@pytest.mark.parametrize(("method", "changes", "why"), REFUSED)
def test_a_split_method_says_where_it_cannot_run(
    method: Strategy[Any], changes: dict[str, Any], why: str
) -> None:
    found = method.refuses(setting(**changes))
    assert (why in found) if why else not found


# Both want 8: see test_by_hand.py, which has the rule and the other methods.
ENDS: dict[str, tuple[float, ...]] = {
    # a: m -8, w 4. b with its own: m -4, w 6. a again: m -4 - 2, w 9. b: m -2 + 1, w 9.5.
    "sl_ushape": (9.5, 9.5, 9.5),
    "hsplitlora": (8, 10, 8),  # as splitlora's
    "splitfrozen": (0, 10, 0),  # one for the steps of both, as splitfed_v2's
}


@pytest.mark.parametrize("name", ENDS)
def test_momentum_of_split_methods(name: str) -> None:
    assert after_two_rounds(build(name, {})) == ENDS[name]
