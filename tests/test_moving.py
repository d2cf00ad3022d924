"""A client that sits elsewhere from one round to the next: nothing is lost, and nothing else moves.

What lasts crosses the link once, counted; a move that fails has not happened.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import Played, backbone, cuts, play, same, shard, toy_task, whole

from flexp.client.desk import Training
from flexp.dice import Dice
from flexp.engine.base import Arrival, Assignment
from flexp.engine.local import LocalEngine
from flexp.errors import LinkError
from flexp.link.messages import Answer, Link, Message
from flexp.link.metered import Crossing, Ledger
from flexp.model.adapter import Dense, Kind, Lora
from flexp.model.backbone import Backbone
from flexp.model.cut import Cut, Seat
from flexp.model.ops import Optim, SlotSpec
from flexp.model.slots import moments
from flexp.parcel import Parcel, encode
from flexp.strategies import BUILT_IN
from flexp.strategies.base import Turn
from flexp.strategies.flexp import FlexP
from flexp.strategies.local import Local
from flexp.strategies.splitfed_v2 import SplitFedV2
from flexp.strategies.splitlora import SplitLora
from flexp.tensors import Tensors

DEPTH = 3
KIND = Lora(rank=2, alpha=4.0)
SEATS = [
    *(*cuts(DEPTH), whole(DEPTH), Seat(Cut(1, 2)), Seat(Cut(2, 1))),
    *(*cuts(DEPTH, "logits"), *cuts(DEPTH, "loss")),
]
A, B = Seat(Cut(1, 1)), Seat(Cut(2))
SLOTS = ("personal", *moments("personal"))
BEGUN: dict[Any, Tensors] = {}
TRAINING = Training(Optim(lr=1e-2), batch=4, steps=1)


@functools.cache
def body() -> Backbone:
    return backbone("bert-cls", DEPTH)


class Fleet:
    """One client under a method, turn by turn, each at a seat of its own."""

    def __init__(
        self,
        strategy: Any = None,
        wrap: Any = lambda client, link: link,
        kind: Kind = KIND,
    ) -> None:
        self.strategy = strategy or Local()
        self.wrap = wrap
        self.engine = LocalEngine(
            body(),
            toy_task(body()),
            {"me": shard(1)},
            kind=kind,
            training=TRAINING,
            dice=Dice(3),
            profile="open",
            keep_crossings=True,
            wrap=self.wrapped,
        )
        self.engine.begun = BEGUN
        self.rounds = 0

    def wrapped(self, client: str, link: Link) -> Link:
        return self.wrap(client, link)

    def turn(self, seat: Seat) -> Turn:
        return Turn(self.rounds, 9, 0, True, {"me": seat}, {}, body().block_of, body().depth)

    def train(self, seat: Seat, offer: Parcel | None = None) -> Arrival:
        work = Assignment("me", seat, offer or Parcel())
        (arrival,) = self.engine.run(self.strategy, [work], self.turn(seat))
        self.rounds += arrival.failure is None
        return arrival

    def look(self, seat: Seat) -> dict[str, tuple[Tensors, Tensors]]:
        """Near and far part of what lasts, as the client would find them at a seat."""
        work = Assignment("me", seat, Parcel())
        with self.engine.visit(self.strategy, work, self.turn(seat), Ledger()) as (desk, _):
            far = self.engine.tenants["me"].slots.values
            return {s: (dict(desk.model.near[s]), dict(far.get(s, {}))) for s in SLOTS}

    def kept(self) -> tuple[bytes, bytes, bytes, Seat]:
        """All that is kept of the client, on both sides."""
        memory, home = self.engine.memories["me"], self.engine.tenants["me"]
        shared = self.engine.tenants.shared.values
        parcels = (Parcel(memory.slots, facts=memory.facts), Parcel(home.slots.values))
        return encode(parcels[0]), encode(parcels[1]), encode(Parcel(shared)), home.seat


@functools.cache
def trained(seat: Seat) -> Fleet:
    fleet = Fleet()
    assert fleet.train(seat).failure is None
    return fleet


@functools.cache
def expected() -> dict[str, Tensors]:
    return {
        slot: near | far for slot, (near, far) in trained(whole(DEPTH)).look(whole(DEPTH)).items()
    }


@pytest.mark.parametrize("seat", SEATS, ids=str)
def test_between_any_two_seats_nothing_changes_but_the_side(seat: Seat) -> None:
    for other in SEATS:
        found = trained(seat).look(other)
        for slot, (near, far) in found.items():
            assert not near.keys() & far.keys()
            assert same(near | far, expected()[slot]), (slot, other)
            assert set(far) == {k for k in expected()[slot] if body().place(k, other).side == "far"}
        assert trained(seat).engine.tenants["me"].seat == seat


@given(st.lists(st.sampled_from(SEATS), min_size=2, max_size=5))
@settings(max_examples=12)
def test_any_way_over_seats_is_the_monolith(way: Sequence[Seat]) -> None:
    fleet, still = Fleet(), monolith(len(way))
    for seat in way:
        assert fleet.train(seat).failure is None
    found = fleet.look(way[0])
    fleet.engine.close()
    for slot, (near, far) in found.items():
        assert same(near | far, still[slot])


@pytest.mark.parametrize("kind", [Dense(("query",)), Dense()], ids=str)
def test_blocks_trained_in_full_move_as_all_else(kind: Kind) -> None:
    fleet, way = Fleet(kind=kind), (A, B, Seat(Cut(1), "logits"), whole(DEPTH), A)
    for seat in way:
        assert fleet.train(seat).failure is None
    found, still = fleet.look(A), monolith(len(way), kind)
    fleet.engine.close()
    for slot, (near, far) in found.items():
        assert near
        assert far
        assert same(near | far, still[slot])


@functools.cache
def monolith(turns: int, kind: Kind = KIND) -> dict[str, Tensors]:
    fleet = Fleet(kind=kind)
    for _ in range(turns):
        fleet.train(whole(DEPTH))
    found = fleet.look(whole(DEPTH))
    fleet.engine.close()
    return {slot: near for slot, (near, _) in found.items()}


# ---- whole runs

APART = (
    "flexp",
    "flexp_sft",
    "flexp_sfl",
    "hsplitlora",
    "pfsl",
    "splitfed_v2",
    "splitfed_v3",
    "splitfrozen",
    "splitlora",
)
NOT_LORA = ("pfedpg", "fedmosaic")
ALIKE = [m for m in BUILT_IN if m.name not in ("base", "pooled", *NOT_LORA, *APART)]
HERE = (Seat(Cut(1, 1)), Seat(Cut(2)), whole(4))
THERE = (Seat(Cut(2, 2)), Seat(Cut(1), "logits"), Seat(Cut(1)))


@pytest.mark.parametrize("method", ALIKE, ids=lambda m: m.name)
@pytest.mark.daily("fedavg", "scaffold", "ditto", "ddome", "fml", "fedppa", "fed_influence")
def test_a_run_that_moves_everybody_equals_one_that_does_not(method: Any) -> None:
    training = Training(Optim(lr=5e-2), batch=4, steps=2)
    still = play(method(), HERE, rounds=3, profile="open", training=training)
    moved = play(
        method(), HERE, rounds=3, profile="open", training=training, moves={1: THERE, 2: HERE[::-1]}
    )
    assert all(a.failure is None for a in moved.arrivals)
    assert moved.adapters.keys() == still.adapters.keys()
    for client, adapter in still.adapters.items():
        assert same(moved.adapters[client], adapter)


def test_flexp_without_alignment_and_alone_does_not_notice_a_move() -> None:
    free = FlexP(align=0.0, moments="keep")

    def run(moves: Any) -> Played:
        return play(free, Seat(Cut(1, 1)), rounds=3, seeds=[1], moves=moves)

    still, moved = run({}), run({1: Seat(Cut(2)), 2: Seat(Cut(3))})
    assert same(moved.adapters["c0"], still.adapters["c0"])


def test_flexp_wears_the_shared_block_where_there_is_one_and_its_own_where_not() -> None:
    """Block 2 is shared, by the other client; block 1 was nobody's but its own."""
    before = play(
        FlexP(align=0.0, moments="keep"), (Seat(Cut(3)), Seat(Cut(2, 1))), seeds=(1, 2), rounds=1
    )
    mine, shared = before.adapters["c0"], before.state
    turn = Turn(1, 2, 0, True, {"c0": A, "c1": A}, {}, before.engine.backbone.block_of, 4)
    engine = before.engine
    engine.trunk = type(engine.trunk)(engine.backbone, engine.tenants, engine.task)
    work = Assignment("c0", A, FlexP(align=0.0, moments="keep").offer(shared, "c0", turn))
    with engine.visit(FlexP(align=0.0, moments="keep"), work, turn, Ledger()) as (desk, _):
        found = desk.whole("personal")
    engine.close()
    hosted = {k for k in mine if engine.backbone.block_of(k) == 2}
    assert hosted == {k for k in shared if engine.backbone.block_of(k) == 2}
    assert same({k: found[k] for k in hosted}, {k: shared[k] for k in hosted})
    others = mine.keys() - shared.keys()
    assert {engine.backbone.block_of(k) for k in others} == {0, 1, 4}
    assert same({k: found[k] for k in others}, {k: mine[k] for k in others})


# ---- one far copy for all


def test_a_copy_for_all_is_what_a_block_becomes_if_there_is_one() -> None:
    fleet = Fleet(SplitLora())
    assert fleet.train(Seat(Cut(1))).failure is None
    shared = dict(fleet.engine.tenants.shared.values["personal"])
    arrival = fleet.train(Seat(Cut(2)))  # block 1 comes near: a copy of the server's
    assert {c.name for c in crossed(arrival, "fetch")} == {
        f"slot/{slot}/{k}" for slot in SLOTS for k in shared if body().block_of(k) == 1
    }
    assert same(
        {
            k: v
            for k, v in fleet.engine.tenants.shared.values["personal"].items()
            if body().block_of(k) == 1
        },
        {k: v for k, v in shared.items() if body().block_of(k) == 1},
    )
    assert crossed(fleet.train(Seat(Cut(1))), "put") == []  # and the server's is there


def test_a_copy_for_all_that_is_not_there_yet_begins_with_who_brings_it() -> None:
    fleet = Fleet(SplitLora(every=9))
    assert fleet.train(Seat(Cut(2))).failure is None
    near = fleet.engine.memories["me"].slots["slot/personal"]
    mine = {k: v for k, v in near.items() if body().block_of(k) == 1}
    work, seat = Assignment("me", Seat(Cut(1)), Parcel()), Seat(Cut(1))
    with fleet.engine.visit(fleet.strategy, work, fleet.turn(seat), Ledger()):
        server = fleet.engine.tenants.shared.values["personal"]
        assert same({k: v for k, v in server.items() if body().block_of(k) == 1}, mine)
        assert len(fleet.engine.tenants.shared.values["personal@t"]) == len(server)
    held = fleet.engine.tenants.shared.values["personal"]
    assert {body().block_of(k) for k in held} == {2}


@pytest.mark.parametrize("strategy", [SplitFedV2(), SplitLora()], ids=lambda s: s.name)
def test_methods_with_a_copy_for_all_go_on_after_any_move(strategy: Any) -> None:
    found = play(strategy, HERE, rounds=3, profile="open", moves={1: THERE, 2: HERE[::-1]})
    assert all(a.failure is None for a in found.arrivals)


# ---- what it costs, and what stops it


def crossed(arrival: Arrival, phase: str) -> list[Crossing]:
    assert arrival.failure is None, arrival.failure
    assert arrival.ledger.crossings is not None
    return [one for one in arrival.ledger.crossings if one.phase == phase]


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(SEATS[:4], 2)), ids=str)
def test_a_move_costs_what_it_moves(first: Seat, second: Seat) -> None:
    fleet = Fleet()
    fleet.train(first)
    arrival, sides = fleet.train(second), {}
    for k in expected()["personal"]:
        sides[k] = body().place(k, first).side, body().place(k, second).side
    for way, phase, change in (("up", "put", ("near", "far")), ("down", "fetch", ("far", "near"))):
        moving = {k for k, change_of in sides.items() if change_of == change}
        found = [one for one in crossed(arrival, phase) if one.way == way]
        assert {one.name for one in found} == {f"slot/{s}/{k}" for s in SLOTS for k in moving}
        value = expected()["personal"]
        size = sum(3 * 4 * value[k].numel() + 4 for k in moving)  # value, two moments, steps
        assert sum(one.bytes for one in found) == size
    fleet.engine.close()


@dataclass
class Failing:
    """A link that fails at its n-th message, before or after that was carried out."""

    inner: Link
    at: int
    late: bool
    sent: int = 0

    def send(self, message: Message) -> Answer:
        self.sent += 1
        if self.sent == self.at and not self.late:
            raise LinkError("the cable was cut")
        answer = self.inner.send(message)
        if self.sent == self.at:
            raise LinkError("the cable was cut")
        return answer

    def close(self) -> None:
        self.inner.close()


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("strategy", [Local(), SplitLora()], ids=lambda s: s.name)
def test_a_move_that_fails_at_any_message_has_not_happened(strategy: Any, late: bool) -> None:
    fleet, still = Fleet(strategy), Fleet(strategy)
    for one in (fleet, still):
        one.train(A)
    before, total = fleet.kept(), still.train(B).ledger.messages
    for at in range(1, total + 1):
        fleet.wrap = lambda client, link, at=at: Failing(link, at, late)
        arrival = fleet.train(B)
        assert arrival.failure is not None
        assert fleet.kept() == before, at
    fleet.wrap = lambda client, link: link
    assert fleet.train(B).failure is None
    assert fleet.kept() == still.kept()
    for one in (fleet, still):
        one.engine.close()


def test_nobody_moves_to_another_rank() -> None:
    fleet = Fleet()
    fleet.train(A)
    arrival = fleet.train(replace(B, rank=3))
    assert arrival.failure is not None
    assert 'Client "me" moved from rank None to 3' in arrival.failure.error
    assert fleet.train(B).failure is None


def test_a_server_that_did_not_move_a_client_is_told_apart() -> None:
    fleet = Fleet()
    fleet.train(B)
    fleet.engine.tenants.homes.clear()  # as if it had been resumed from another checkpoint
    arrival = fleet.train(A)
    assert arrival.failure is not None
    assert "does not know that it moved" in arrival.failure.error


def test_a_block_moves_only_when_the_seat_does() -> None:
    """Whatever a method does, a near tensor leaves undeclared only in a move, before it trains."""
    fleet = Fleet()
    fleet.train(B)
    assert crossed(fleet.train(B), "put") == []
    assert crossed(fleet.train(A), "put") != []

    class Greedy(Local):
        def train(self, desk: Any, offer: Parcel) -> Parcel:
            return desk.reply("personal", facts=desk.fit())

    fleet.strategy = Greedy()
    arrival = fleet.train(B)
    assert arrival.failure is not None
    assert arrival.failure.error.startswith("EgressError")


def test_slots_that_do_not_last_do_not_travel() -> None:
    strategy = type("Brief", (Local,), {"slots": {"personal": SlotSpec()}})()
    fleet = Fleet(strategy)
    fleet.train(A)
    arrival = fleet.train(B)
    assert crossed(arrival, "put") == crossed(arrival, "fetch") == []
    assert torch.is_tensor(next(iter(expected()["personal"].values())))
