"""The trunk on the wire: exactly once, and nothing that does not fit is computed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from toys import H, at_desk, same
from wires import DOUBLE, KIND, U, V, Wire, body, initial, served

from flexp.errors import AdapterError, FlexpError, LinkError, StepError
from flexp.link.messages import (
    Do,
    Fetch,
    Join,
    Leave,
    Put,
    Submit,
)
from flexp.model.cut import Cut, Seat
from flexp.model.ops import Dot, Grad, SlotSpec, Step
from flexp.parcel import Parcel
from flexp.selection import ALL, FAR, Where
from flexp.server.pending import MAX_PENDING
from flexp.tensors import Tensors, Term


@pytest.fixture
def wire() -> Iterator[Wire]:
    trunk, wires = served(U)
    wires[0].join()
    yield wires[0]
    trunk.close()


@pytest.fixture
def far_loss() -> Iterator[Wire]:
    trunk, wires = served(V)
    wires[0].join()
    yield wires[0]
    trunk.close()


# ---- exactly once


def test_operations_of_a_repeated_forward_are_applied_once(wire: Wire) -> None:
    before = wire.held()
    message = wire.forward(ops=(DOUBLE,))
    first = wire.send(message, "d")
    again = wire.send(message, "d")
    assert torch.equal(first.tensors["hidden"], again.tensors["hidden"])
    assert same(wire.held(), {k: 2 * v for k, v in before.items()})
    with pytest.raises(StepError, match="different message"):
        wire.send(replace(message, ops=(DOUBLE, DOUBLE)), "other")
    assert same(wire.held(), {k: 2 * v for k, v in before.items()})


def test_operations_of_a_forward_that_failed_are_not_applied_twice(far_loss: Wire) -> None:
    before = far_loss.held()
    message = far_loss.forward(ops=(DOUBLE,))
    with pytest.raises(LinkError, match="needs labels"):
        far_loss.send(replace(message, labels=None))
    far_loss.send(message)
    assert same(far_loss.held(), {k: 2 * v for k, v in before.items()})


def test_a_repeated_backward_gathers_its_gradient_once(wire: Wire) -> None:
    ahead = wire.forward()
    out = wire.send(ahead).tensors["hidden"]
    behind = wire.backward(ahead, torch.ones_like(out))
    first, again = wire.send(behind, "d"), wire.send(behind, "d")
    assert torch.equal(first.tensors["grad"], again.tensors["grad"])
    wire.send(Do(wire.key("do"), (Grad(("personal",), ("g",)),)))
    once = wire.held("g")
    ahead = wire.forward(1)
    wire.send(ahead)
    wire.send(wire.backward(ahead, torch.ones_like(out)))
    wire.send(Do(wire.key("do", 1), (Grad(("personal",), ("g",)),)))
    assert same(wire.held("g"), once)
    assert any(bool(v.any()) for v in once.values())


def test_a_message_of_an_earlier_step_is_refused(wire: Wire) -> None:
    early = Do(wire.key("do", 0), (DOUBLE,))
    wire.send(Do(wire.key("do", 1), ()))
    before = wire.held()
    with pytest.raises(StepError, match="is over"):
        wire.send(early)
    assert same(wire.held(), before)


def test_backward_never_steps(wire: Wire) -> None:
    before = wire.held()
    ahead = wire.forward()
    out = wire.send(ahead).tensors["hidden"]
    wire.send(wire.backward(ahead, torch.ones_like(out)))
    assert same(wire.held(), before)
    wire.send(Do(wire.key("do"), (Grad(("personal",), ("g",)), Step("personal", "g", 0.5))))
    g = wire.held("g")
    expected = {k: v - 0.5 * (0.5 * g[k]) for k, v in before.items()}
    assert same(wire.held(), expected)


# ---- replies


@pytest.mark.parametrize("odd", ["unknown", "far", "misshapen", "lacking"])
def test_a_reply_that_is_not_of_the_slot_is_refused_by_name(wire: Wire, odd: str) -> None:
    """It would end everybody's merge."""
    whole = initial(SlotSpec())
    near = near_of(wire, whole)
    name = next(k for k in near if ".layer.0." in k)
    changed = {
        "unknown": near | {"odd": torch.ones(1)},
        "far": whole,
        "misshapen": near | {name: torch.ones(1, 1)},
        "lacking": {k: v for k, v in near.items() if k != name},
    }
    wanted = {"unknown": "odd", "far": "layer.1", "misshapen": name, "lacking": name}
    wire.send(submit(wire, near))
    with pytest.raises(LinkError, match=re.escape(wanted[odd])):
        wire.send(submit(wire, changed[odd]))
    reply = wire.trunk.tenants["c0"].reply
    assert reply is not None
    assert same(reply.adapters["personal"], near | wire.held())


def test_a_reply_of_another_rank_is_for_slots_that_may_have_any(wire: Wire) -> None:
    near = near_of(wire, initial(SlotSpec()))
    a = next(k for k in near if ".lora_A." in k)
    b = a.replace(".lora_A.", ".lora_B.")
    wider = {a: torch.ones(5, near[a].shape[1]), b: torch.ones(len(near[b]), 5)}
    with pytest.raises(LinkError, match=re.escape(a)):
        wire.send(submit(wire, near | wider))
    home = wire.trunk.tenants["c0"]
    home.specs = {"personal": replace(home.specs["personal"], any_rank=True)}
    wire.send(submit(wire, near | wider))
    assert home.reply is not None
    assert same({k: home.reply.adapters["personal"][k] for k in near}, near | wider)
    none = {a: torch.ones(0, near[a].shape[1]), b: torch.ones(len(near[b]), 0)}
    for odd in (wider | {b: near[b]}, {a: torch.ones(5, 2)}, {b: torch.ones(2, 5)}, none):
        with pytest.raises(LinkError, match="submitted"):  # what is no pair ends the merge
            wire.send(submit(wire, near | wider | odd))


def test_a_reply_of_a_slot_that_is_not_given_is_refused(wire: Wire) -> None:
    near = near_of(wire, initial(SlotSpec()))
    given: dict[str, Where] = {"personal": ALL}
    mine: dict[str, Tensors] = {"personal": near}
    for held, far in ((mine | {"odd": {}}, given), (mine, given | {"odd": FAR})):
        with pytest.raises(LinkError, match='slot "odd", which is none that it gives'):
            wire.send(Submit(wire.key("submit"), held, far, {}, {}))
    with pytest.raises(LinkError, match='slot "personal", which is none that it gives'):
        wire.send(Submit(wire.key("submit"), {"personal": near}, {}, {}, {}))
    assert wire.trunk.tenants["c0"].reply is None


def submit(wire: Wire, near: Tensors) -> Submit:
    return Submit(wire.key("submit"), {"personal": near}, {"personal": ALL}, {}, {})


def near_of(wire: Wire, whole: Tensors) -> Tensors:
    place = wire.seat.place
    return {k: v for k, v in whole.items() if place(body().block_of(k), 4).side == "near"}


# ---- forwards that wait


def test_a_backward_needs_its_forward(wire: Wire) -> None:
    ahead = wire.forward()
    grad = torch.ones_like(ahead.hidden)
    with pytest.raises(StepError, match="no forward that waits"):
        wire.send(wire.backward(ahead, grad))
    wire.send(ahead)
    wire.send(wire.backward(ahead, grad))
    other = replace(wire.backward(ahead, grad), key=wire.key("backward", 0, 99))
    with pytest.raises(StepError, match="no forward that waits"):
        wire.send(other)


def test_a_backward_of_another_step_is_refused(wire: Wire) -> None:
    ahead = wire.forward(0)
    wire.send(ahead)
    with pytest.raises(StepError, match="no forward that waits"):
        wire.send(wire.backward(ahead, torch.ones_like(ahead.hidden), step=1))


def test_a_forward_without_gradient_leaves_nothing_waiting(wire: Wire) -> None:
    ahead = wire.forward(keep=False)
    wire.send(ahead)
    assert not wire.trunk.pending.held[wire.client]
    assert wire.trunk.tenants[wire.client].rows == 0
    with pytest.raises(StepError, match="no forward that waits"):
        wire.send(wire.backward(ahead, torch.ones_like(ahead.hidden)))


def test_only_so_many_forwards_may_wait(wire: Wire) -> None:
    for _ in range(MAX_PENDING):
        wire.send(wire.forward())
    with pytest.raises(StepError, match=f"More than {MAX_PENDING} forwards"):
        wire.send(wire.forward())
    wire.send(wire.forward(1))  # those of a step that is over are dropped
    assert len(wire.trunk.pending.held[wire.client]) == 1


def test_rows_of_a_step_count_once(wire: Wire) -> None:
    for step in (0, 0, 1, 2):
        ahead = wire.forward(step)
        out = wire.send(ahead).tensors["hidden"]
        wire.send(wire.forward(step))  # looked at, not learned from
        wire.send(wire.backward(ahead, torch.ones_like(out)))
    assert wire.trunk.tenants[wire.client].rows == 9  # three rows in each of three steps


# ---- what does not fit


@pytest.mark.parametrize(
    "hidden",
    [torch.zeros(3, H), torch.zeros(3, 9, H + 1), torch.zeros(3, 9, 1, H)],
    ids=["two", "width", "four"],
)
def test_hidden_states_of_another_shape_are_refused(wire: Wire, hidden: Tensor) -> None:
    with pytest.raises(LinkError, match=rf"\[rows, length, {H}\]"):
        wire.send(wire.forward(hidden=hidden))


@pytest.mark.parametrize("shape", [(2, 9, H), (3, 8, H), (1, 9, H)], ids=str)
def test_hidden_states_that_do_not_fit_their_mask_are_refused(
    wire: Wire, shape: tuple[int, ...]
) -> None:
    with pytest.raises(FlexpError):
        wire.send(wire.forward(hidden=torch.zeros(shape)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_hidden_states_that_are_not_finite_are_refused(wire: Wire, bad: float) -> None:
    ahead = wire.forward()
    ahead.hidden[1, 2, 3] = bad
    before = wire.held()
    with pytest.raises(LinkError, match="NaN or infinity"):
        wire.send(replace(ahead, ops=(DOUBLE,)))
    assert same(wire.held(), before)  # nor did its operations run
    assert not wire.trunk.pending.held[wire.client]


def test_gradients_of_another_shape_are_refused(wire: Wire) -> None:
    ahead = wire.forward()
    wire.send(ahead)
    with pytest.raises(LinkError, match="The gradient has shape"):
        wire.send(wire.backward(ahead, torch.ones(1)))


@pytest.mark.parametrize("given", [(), (torch.ones(6), torch.ones(6)), (torch.ones(2),)], ids=len)
def test_coefficients_that_do_not_fit_the_wear_are_refused(
    wire: Wire, given: tuple[Tensor, ...]
) -> None:
    wear = (Term("personal", float("nan")),)
    with pytest.raises(FlexpError):
        wire.send(wire.forward(wear=wear, coefs=given))


@pytest.mark.parametrize("until", ["logits", "loss"])
def test_who_keeps_the_labels_gets_no_logits_from_the_server(wire: Wire, until: str) -> None:
    with pytest.raises(LinkError, match=f"cannot ask for {until}"):
        wire.send(wire.forward(until=until))


def test_a_far_loss_needs_labels(far_loss: Wire) -> None:
    assert float(far_loss.send(far_loss.forward()).tensors["loss"]) > 0
    with pytest.raises(LinkError, match="needs labels"):
        far_loss.send(far_loss.forward(labels=None))


def test_unknown_slots_are_refused(wire: Wire) -> None:
    with pytest.raises(AdapterError, match='no slot "other"'):
        wire.send(wire.forward(wear="other"))
    with pytest.raises(AdapterError, match='no slot "other"'):
        wire.send(Do(wire.key("do"), (Dot("personal", "other"),)))


# ---- who is who


def test_strangers_and_wrong_seats_are_refused(wire: Wire) -> None:
    stranger = Wire(wire.trunk, "stranger", U)
    with pytest.raises(LinkError, match='"stranger" has no seat'):
        stranger.join()
    with pytest.raises(LinkError, match="the same recipe"):
        wire.send(Join(wire.key("join"), V, {}))


def test_clients_see_and_move_only_their_own() -> None:
    trunk, (a, b) = served(U, U)
    try:
        for one in (a, b):
            one.join()
        before = b.held()
        a.send(Do(a.key("do"), (DOUBLE,)))
        mine = a.send(Fetch(a.key("fetch"), "personal", far=True)).tensors
        theirs = b.send(Fetch(b.key("fetch"), "personal", far=True)).tensors
        assert same(theirs, {f"slot/personal/{k}": v for k, v in before.items()})
        assert same(mine, {k: 2 * v for k, v in theirs.items()})
        ahead = a.forward()
        a.send(ahead)
        with pytest.raises(StepError, match="no forward that waits"):
            b.send(replace(a.backward(ahead, torch.ones_like(ahead.hidden))))
    finally:
        trunk.close()


def test_nothing_may_be_put_without_moving(wire: Wire) -> None:
    near = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"
    with pytest.raises(LinkError, match="no block of them has moved"):
        wire.send(Put(wire.key("put"), "personal", {near: torch.zeros(3, H)}))


def test_clients_that_write_at_once_get_what_they_would_alone() -> None:
    def talk(one: Wire) -> list[Tensor]:
        out: list[Tensor] = []
        for step in range(4):
            ops = (Grad(("personal",), ("g",)), Step("personal", "g")) if step else ()
            ahead = one.forward(step, ops=ops)
            out.append(one.send(ahead).tensors["hidden"])
            out.append(one.send(one.backward(ahead, torch.ones_like(out[-1]))).tensors["grad"])
        return out

    trunk, wires = served(U, U, Seat(Cut(1, 2)))
    try:
        for one in wires:
            one.join()
        wires[1].send(Do(wires[1].key("do"), (DOUBLE,)))
        with ThreadPoolExecutor(3) as pool:
            together = list(pool.map(talk, wires))
    finally:
        trunk.close()
    trunk, wires = served(U, U, Seat(Cut(1, 2)))
    try:
        for one in wires:
            one.join()
        wires[1].send(Do(wires[1].key("do"), (DOUBLE,)))
        for one, found in zip(wires, together, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(talk(one), found, strict=True))
    finally:
        trunk.close()


# ---- the end of a turn


def test_a_reply_is_near_tensors_and_the_tenancys_own(wire: Wire) -> None:
    near = {"base_model.model.classifier.bias": torch.tensor([1.0, 2.0, 3.0])}
    loose = {"prior": torch.tensor([0.5])}
    far = {"personal": FAR | Where(names="*classifier.bias")}
    wire.send(Submit(wire.key("submit"), {"personal": near}, far, loose, {"steps": 3}))
    home = wire.trunk.tenants[wire.client]
    assert home.reply is not None
    assert same(home.reply.adapters["personal"], near | wire.held())
    assert list(home.reply.adapters["personal"]) == sorted(near | wire.held())
    assert same(home.reply.tensors, loose)
    assert home.reply.facts == {"steps": 3}


def test_leaving_drops_the_turn(wire: Wire) -> None:
    wire.send(wire.forward())
    wire.send(Leave(wire.key("leave")))
    assert wire.client not in wire.trunk.pending.held
    assert wire.trunk.tenants[wire.client].slots.values == {}


def test_offered_near_tensors_are_fetched_in_part_or_whole() -> None:
    offer = Parcel({"personal": initial(SlotSpec())})
    with at_desk(body(), U, kind=KIND, offer=offer) as (desk, _):
        whole = desk.session.fetch("personal", where=ALL)
        place = desk.model.near.place
        assert same(whole, {k: v for k, v in offer.adapters["personal"].items() if k in whole})
        assert {place(k).side for k in whole} == {"near"}
        assert len(whole) == sum(place(k).side == "near" for k in offer.adapters["personal"])
        assert desk.session.fetch("unoffered") == {}
