"""Tenancies: whose slots are whose, what lasts, and what a failed turn leaves behind."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping

import pytest
import torch
from toys import backbone, play, same, whole

from flexp.checkpoint import encode_state
from flexp.client.desk import Desk
from flexp.dice import Dice
from flexp.errors import AdapterError, CutError, LinkError
from flexp.model.adapter import Lora
from flexp.model.backbone import Backbone
from flexp.model.cut import Cut, Seat
from flexp.model.ops import Assign, Dot, Optim, SlotSpec, Step
from flexp.model.slots import moments
from flexp.parcel import Parcel
from flexp.server.tenants import Tenants
from flexp.strategies.flexp import FlexP
from flexp.strategies.local import Local
from flexp.tensors import Tensors, Term, total

KIND = Lora(rank=3, alpha=6.0)
A, B = Seat(Cut(1, 1)), Seat(Cut(2, 0))
ROUND, RUN = SlotSpec(), SlotSpec(lasts="run", moments="keep")
SERVER = SlotSpec(home="server")


@functools.cache
def body() -> Backbone:
    return backbone()


@functools.cache
def initial(spec: SlotSpec = ROUND, rank: int | None = None) -> Tensors:
    return body().initial(spec.kind or KIND, Dice(0), rank)


def tenants(**seats: Seat) -> Tenants:
    out = Tenants(body(), initial)
    for client, seat in seats.items():
        out.join(client, seat, {"personal": RUN})
    return out


def held(server: Tenants, client: str, slot: str = "personal") -> Tensors:
    return {k: v.clone() for k, v in server.take(client, [slot])[slot].items()}


def double(slot: str = "personal") -> Assign:
    return Assign(slot, (Term(slot, 2.0), Term(slot, 0.5)))


def ones(values: Mapping[str, torch.Tensor]) -> Tensors:
    return {k: torch.ones_like(v) for k, v in values.items()}


def far(seat: Seat, values: Tensors) -> Tensors:
    return {k: v for k, v in values.items() if body().place(k, seat).side == "far"}


# ---- whose is what


def test_a_tenancy_begins_with_the_far_part_of_the_beginning() -> None:
    server = tenants(a=A, b=B)
    assert same(held(server, "a"), far(A, initial()))
    assert same(held(server, "b"), far(B, initial()))
    assert {body().block_of(k) for k in held(server, "a")} == {1, 2}
    assert {body().block_of(k) for k in held(server, "b")} == {2, 3}


def test_operations_move_only_the_tenants_own_slots() -> None:
    server = tenants(a=A, b=A)
    before = held(server, "b")
    server.do("a", [double()])
    assert not same(held(server, "a"), before)
    assert same(held(server, "b"), before)


def test_a_tenant_cannot_name_another_ones_slot() -> None:
    server = tenants(a=A, b=A)
    server.do("a", [Assign("secret", (Term("personal", 3.0),))])
    with pytest.raises(AdapterError, match='no slot "secret"'):
        server.do("b", [Assign("personal", (Term("secret"),))])
    with pytest.raises(AdapterError, match='no slot "secret"'):
        server.take("b", ["secret"])


def test_nobody_without_a_seat_is_served() -> None:
    server = tenants(a=A)
    for act in (
        lambda: server.do("b", []),
        lambda: server.take("b", ["personal"]),
        lambda: server.put("b", "personal", {}),
        lambda: server.leave("b"),
    ):
        with pytest.raises(LinkError, match='"b" has no seat'):
            act()
    server.rollback("b")  # nothing to take back


def test_near_tensors_are_refused() -> None:
    server = tenants(a=A)
    before = held(server, "a")
    for name in initial():
        if name not in before:
            with pytest.raises(AdapterError, match="is not far"):
                server.put("a", "personal", {name: initial()[name]})
    assert same(held(server, "a"), before)


def test_tensors_of_another_shape_are_refused_and_nothing_is_kept() -> None:
    server = tenants(a=A)
    before = held(server, "a")
    first, last = min(before), max(before)
    wrong = torch.zeros(before[last].shape[0] + 1, *before[last].shape[1:])
    with pytest.raises(AdapterError, match="Check the rank"):
        server.put("a", "personal", {first: torch.ones_like(before[first]), last: wrong})
    assert same(held(server, "a"), before)


def test_what_is_put_is_a_copy() -> None:
    server = tenants(a=A)
    mine = ones(held(server, "a"))
    server.put("a", "personal", mine)
    for v in mine.values():
        v.zero_()
    assert all(bool((v == 1).all()) for v in held(server, "a").values())


# ---- what lasts


def test_what_lasts_and_what_begins_anew() -> None:
    specs = {"lasting": RUN, "fresh": SlotSpec(lasts="run"), "turn": ROUND}
    server = Tenants(body(), initial)
    server.join("a", A, specs)
    for slot in specs:
        server.optims("a", {slot: Optim(lr=0.1)})
        server.do("a", [Assign("g", (Term(slot, 1.0),)), Step(slot, "g"), Step(slot, "g")])
    moved = {slot: held(server, "a", slot) for slot in specs}
    server.leave("a")
    server.join("a", A, specs)
    assert same(held(server, "a", "lasting"), moved["lasting"])
    assert same(held(server, "a", "fresh"), moved["fresh"])
    assert same(held(server, "a", "turn"), far(A, initial()))
    slots = server["a"].slots
    assert {s for s in slots.values if "@" in s} == {"lasting@m", "lasting@v", "lasting@t"}
    assert {float(n) for n in slots.values["lasting@t"].values()} == {2.0}
    assert "g" not in slots.values


def test_an_offer_is_cut_between_tenancy_and_client() -> None:
    server = tenants(a=A)
    offer = {k: v + 1 for k, v in initial().items()}
    server.join("a", A, {"personal": RUN}, offer=Parcel({"personal": offer}))
    assert same(held(server, "a"), far(A, offer))
    near = server["a"].offered["personal"]
    assert near.keys() | held(server, "a").keys() == offer.keys()
    assert not near.keys() & held(server, "a").keys()


# ---- failed turns


def state_of(server: Tenants, client: str) -> dict[str, Tensors]:
    slots = server[client].slots
    return {s: {k: v.clone() for k, v in h.items()} for s, h in slots.values.items()}


def equal(a: dict[str, Tensors], server: Tenants, client: str) -> bool:
    values = state_of(server, client)
    return a.keys() == values.keys() and all(same(a[s], values[s]) for s in values)


def test_a_failed_turn_leaves_the_tenancy_as_it_was() -> None:
    server = tenants(a=A)
    train = [Assign("g", (Term("personal", 1.0),)), Step("personal", "g")]
    server.optims("a", {"personal": Optim(lr=0.1)})
    server.do("a", train)
    server.leave("a")
    before = state_of(server, "a")
    assert {float(n) for n in before["personal@t"].values()} == {1.0}
    for _ in range(2):  # a second failure must not be worse
        server.join("a", A, {"personal": RUN}, offer=Parcel({"personal": initial()}))
        server.optims("a", {"personal": Optim(lr=0.1)})
        server.do("a", [*train, *train])
        server.put("a", "personal", ones(held(server, "a")))
        server.rollback("a")
        assert equal(before, server, "a")


def test_a_failed_first_turn_leaves_nothing() -> None:
    server = tenants(a=A)
    server.do("a", [double()])
    server.rollback("a")
    server.join("a", A, {"personal": RUN})
    assert same(held(server, "a"), far(A, initial()))


# ---- one far copy for all


def test_a_slot_at_the_server_is_seen_and_moved_by_all_in_turn() -> None:
    server = Tenants(body(), initial)
    for client, seat in (("a", A), ("b", B)):
        server.join(client, seat, {"common": SERVER})
    start = initial()
    server.do("a", [Assign("common", (Term("common", 2.0),))])
    seen = held(server, "b", "common")
    for k, v in far(B, start).items():  # block 2 is far for both, block 3 for b alone
        assert torch.equal(seen[k], 2 * v if body().block_of(k) == 2 else v), k
    server.do("b", [Assign("common", (Term("common", 3.0),))])
    seen = held(server, "a", "common")
    for k, v in far(A, start).items():
        assert torch.equal(seen[k], 6 * v if body().block_of(k) == 2 else 2 * v), k
    dots = server.do("a", [Dot("common", "common")])[0]
    assert total(dots) == pytest.approx(sum(float((v * v).sum()) for v in seen.values()), rel=1e-5)


def test_its_optimizer_is_common_too() -> None:
    server, alone = Tenants(body(), initial), Tenants(body(), initial)
    spec = SlotSpec(home="server", optim=Optim(lr=0.1))
    for client in ("a", "b"):
        server.join(client, A, {"common": spec})
    alone.join("a", A, {"common": spec})
    ops = [Assign("g", (Term("common", 1.0),)), Step("common", "g")]
    for n in range(4):
        server.do("ab"[n % 2], ops)
        alone.do("a", ops)
    assert same(held(server, "b", "common"), held(alone, "a", "common"))
    assert {float(n) for n in server.shared.values["common@t"].values()} == {4.0}


def test_clients_train_one_trunk_in_turn() -> None:
    """SplitFed v2: what client n finds far is what client n - 1 left."""
    slots = {"personal": SlotSpec(home="server", optim=Optim("sgd", lr=0.5))}
    found: list[tuple[Tensors, Tensors]] = []

    class InTurn(Local):
        def train(self, desk: Desk, offer: Parcel) -> Parcel:
            before = desk.session.fetch("personal", far=True)
            desk.fit(steps=2)
            desk.session.flush()
            found.append((before, desk.session.fetch("personal", far=True)))
            return Parcel()

    strategy = type("Toy", (InTurn,), {"slots": slots})()
    play(strategy, A, rounds=2)
    assert len(found) == 6
    assert same(found[0][0], far(A, body().initial(KIND, Dice(0)("initial"))))
    for (before, after), (following, _) in itertools.pairwise(found):
        assert not same(before, after)
        assert same(after, following)


# ---- another cut


def test_who_moves_keeps_what_stays_and_hands_over_the_rest() -> None:
    server = tenants(a=A)
    server.do("a", [double()])
    before = held(server, "a")
    server.leave("a")
    server.join("a", B, {"personal": RUN})
    home = server["a"]
    assert home.seat == B
    assert {body().block_of(k) for k in home.leaving["personal"]} == {1}
    assert {body().block_of(k) for _, k in home.awaited} == {3}
    with pytest.raises(LinkError, match="and 3 more have not come"):
        server.settled("a")
    arriving = {k: v + 1 for k, v in initial().items() if body().block_of(k) == 3}
    server.hand_in("a", "personal", arriving)
    server.settled("a")
    middle = {k: v for k, v in before.items() if body().block_of(k) == 2}
    assert same(held(server, "a"), {**middle, **arriving})
    with pytest.raises(LinkError, match="no block of them has moved"):
        server.hand_in("a", "personal", arriving)


def test_nobody_hands_anything_in_without_moving() -> None:
    server = tenants(a=A)
    with pytest.raises(LinkError, match="no block of them has moved"):
        server.hand_in("a", "personal", {})


def test_a_failed_turn_takes_the_seat_back_as_well() -> None:
    server = tenants(a=A)
    server.do("a", [double()])
    server.leave("a")
    before = state_of(server, "a")
    server.join("a", B, {"personal": RUN})
    for bad in (Seat(Cut(3, 2)), Seat(Cut(2, 0), rank=2)):
        server.rollback("a")
        with pytest.raises(CutError, match='lient "a"'):
            server.join("a", bad, {"personal": RUN})
        server.rollback("a")
        assert server["a"].seat == A
        assert equal(before, server, "a")
    server.join("a", A, {"personal": RUN})
    assert not server["a"].moving


def test_who_has_nothing_that_lasts_moves_freely() -> None:
    server = tenants(a=A)
    server.join("a", Seat(Cut(2, 0), rank=2), {"personal": SlotSpec()})
    server.settled("a")
    assert {v.shape[0] for k, v in held(server, "a").items() if "lora_A" in k} == {2}


# ---- law 5: personal state lives with its owner


@pytest.mark.parametrize("strategy", [Local(), FlexP(moments="keep")], ids=["local", "flexp"])
def test_personal_state_lives_with_its_owner(strategy: Local | FlexP) -> None:
    seats = {"c0": A, "c1": B, "c2": whole(4)}
    played = play(strategy, list(seats.values()))
    engine, everything = played.engine, set(initial())
    state = encode_state(played.state)
    for client, seat in seats.items():
        memory = engine.memories[client].slots
        assert set(memory) == {"slot/personal", *(f"slot/{m}" for m in moments("personal"))}
        near = set(memory["slot/personal"])
        slots = engine.tenants[client].slots.values
        far_names = set(slots.get("personal", {}))
        assert near | far_names == everything
        assert near == {k for k in everything if body().place(k, seat).side == "near"}
        assert not near & far_names
        assert set(slots["personal@m"]) == far_names if far_names else True
        for tensor in state.tensors.values():  # and nothing near is in the strategy's state
            assert not any(torch.equal(tensor, v) for v in memory["slot/personal"].values())
    if isinstance(strategy, Local):
        assert played.state is None
    else:
        hosted = {k for s in seats.values() for k in everything if body().place(k, s).side == "far"}
        assert set(played.state) == hosted
