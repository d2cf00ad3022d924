"""FML, once by hand and by the oracles of its specification."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from strategies.bowls import Bench, flat, numbers
from strategies.pairs import SGD, alike, ran
from strategies.prices import MASK, SEATS, STEPS, S, body, sizer
from torch import Tensor
from toys import at_desk, batches_for, play, same, whole

from flexp.client.desk import Training
from flexp.data.examples import Batch
from flexp.dice import Dice
from flexp.model.adapter import Dense, Head, Ia3, Kind, Lora, Prompt
from flexp.model.cut import Cut, Seat
from flexp.model.ops import Optim, SlotSpec
from flexp.parcel import Parcel
from flexp.selection import ALL
from flexp.strategies import build
from flexp.strategies.base import Setting
from flexp.strategies.fedavg import FedAvg
from flexp.strategies.fml import Fml, said
from flexp.strategies.local import Local

LABELS: dict[str, Any] = {"alpha": 1.0, "beta": 1.0}  # nobody listens to the other


def test_fml_learns_from_labels_and_from_the_other() -> None:
    # The bench's numbers are logits as well. A private model at 0 says 1/3 of each; a meme at
    # (ln 2, 0, 0) says 1/2, 1/4, 1/4. Of a's slope the labels are half, (0 - 8) / 2 = -4 and so on,
    # and half of 1/3 - 1/2 = -1/6 and of 1/3 - 1/4 = 1/12. A step is half of it.
    bench = Bench(build("fml", {}))
    bench.state = numbers(FRONT=math.log(2), TRUNK=0.0, HEAD=0.0)
    bench.round()
    assert bench.worn("a") == pytest.approx((2 + 1 / 24, 4 - 1 / 48, 8 - 1 / 48))
    assert bench.worn("b") == pytest.approx((4 + 1 / 24, 2 - 1 / 48, -4 - 1 / 48))
    # The meme of each goes a quarter of the way to what it wants, 14 and 12 to go in the mean of
    # (8, 16, 32) and (16, 8, -16), each client alike; and half of half of (1/6, -1/12, -1/12) back.
    front = math.log(2) + (12 - math.log(2)) / 4 - 1 / 24
    assert flat(bench.state) == pytest.approx((front, 3 + 1 / 48, 2 + 1 / 48))


def test_fml_counts_memes_alike_or_by_rows() -> None:
    for weights, mean in (("equal", (6, 6, 4)), ("rows", (7, 5, -2))):
        bench = Bench(build("fml", {**LABELS, "weights": weights}))
        bench.round()
        assert flat(bench.state) == mean
        assert bench.worn("a") == (4, 8, 16)


# ---- oracles


def test_with_labels_alone_it_is_local_and_its_meme_is_fedavg() -> None:
    # Steps are clipped here, each model's by its own norm.
    found = ran(Fml(1.0, 1.0, weights="rows"), rounds=3)
    assert alike(found, ran(Local(), rounds=3))
    assert same(found.state, ran(FedAvg(), rounds=3).state)
    other = ran(Fml(weights="rows"), rounds=3)
    assert not alike(other, ran(Local(), rounds=3))
    assert not same(other.state, found.state)


def test_one_side_may_listen_alone() -> None:
    assert alike(ran(Fml(1.0, 0.5)), ran(Local()))
    assert same(ran(Fml(0.5, 1.0)).state, ran(FedAvg()).state)  # with equal rows


@pytest.mark.parametrize("seat", [Seat(Cut(1, 1)), whole(4)], ids=["cut", "whole"])
def test_from_one_beginning_with_equal_shares_both_stay_one_model(seat: Seat) -> None:
    found = play(Fml(moments="keep"), [seat], seeds=(1,), rounds=3)
    assert same(found.adapters["c0"], found.state)
    apart = play(Fml(alpha=0.4, moments="keep"), [seat], seeds=(1,), rounds=3)
    assert not same(apart.adapters["c0"], apart.state)


class Labels:
    """A task whose labels say nothing, so that only the other model does."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return 0.0 * logits.sum()


def test_the_slope_at_the_logits_is_the_gap_of_what_both_say() -> None:
    stream = torch.Generator().manual_seed(2)
    mine = torch.randn(5, 7, generator=stream).requires_grad_()
    other = torch.randn(5, 7, generator=stream).requires_grad_()
    model: Any = cast("Any", type("Model", (), {"task": Labels()}))
    batch = Batch({}, torch.zeros(5, dtype=torch.int64))
    said(model, batch, mine, other, 0.3).backward()
    assert mine.grad is not None
    expected = 0.7 * (mine.softmax(1) - other.softmax(1)) / 5  # a mean over rows, not classes
    assert torch.allclose(mine.grad, expected, atol=1e-7)
    assert other.grad is None  # what the other says is a constant


def test_of_a_text_the_mean_is_over_tokens_that_are_learned() -> None:
    mine = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(2)).requires_grad_()
    model: Any = cast("Any", type("Model", (), {"task": Labels()}))
    labels = torch.tensor([[-100, -100, 3, 4], [-100, 1, -100, -100]])
    said(model, Batch({}, labels), mine, torch.zeros(2, 4, 7), 0.0).backward()
    assert mine.grad is not None
    learned = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]])[..., None]
    expected = learned * (mine.softmax(-1) - 1 / 7) / 3
    assert torch.allclose(mine.grad, expected, atol=1e-7)


def test_of_unlike_private_models_only_the_meme_is_on_the_wire() -> None:
    seats = (Seat(Cut(1, 1), rank=2), Seat(Cut(2), rank=5), whole(4))
    found = play(Fml(meme="lora", rank=1), seats, rounds=2, keep_crossings=True)
    ranks = [len(next(v for k, v in a.items() if "lora_A" in k)) for a in found.adapters.values()]
    assert ranks == [2, 5, 3]
    for arrival in found.arrivals:
        assert arrival.failure is None
        slots = [c for c in arrival.ledger.crossings or () if c.name.startswith("slot/")]
        assert {c.name.split("/")[1] for c in slots} == {"shared"}
        assert {c.shape[0] for c in slots if "lora_A" in c.name} == {1}


def test_one_meme_that_hears_labels_alone_is_trained_as_in_one_place() -> None:
    one: dict[str, Any] = {"seeds": (1,), "rounds": 3, "training": SGD}
    meme = play(Fml(beta=1.0), [Seat(Cut(1, 1))], **one).state
    assert same(meme, play(Local(), [whole(4)], **one).adapters["c0"])


def test_labels_come_first_if_asked() -> None:
    # With a ramp of two, the first round hears labels alone, and the third the shares as given.
    assert alike(ran(Fml(ramp=2), rounds=1), ran(Local(), rounds=1))
    assert not alike(ran(Fml(ramp=2)), ran(Local()))
    offers = [bench_offer(Fml(ramp=2), r) for r in range(4)]
    assert offers == [0.0, 0.5, 1.0, 1.0]
    assert (Fml().alpha, Fml().beta) == (0.5, 0.5)


def bench_offer(method: Fml, round: int) -> Any:
    bench = Bench(method)
    bench.done = round
    return bench.strategy.offer(bench.state, "a", bench.turn()).facts["way"]


def test_a_meme_may_keep_its_optimizer() -> None:
    assert not same(ran(Fml(moments="keep")).state, ran(Fml()).state)


# ---- memes of another shape, and of another head

KINDS: dict[str, Kind] = {
    "lora": Lora(2, 4.0),
    "ia3": Ia3(),
    "prompt": Prompt(3),
    "dense": Dense(("query",)),
    "head": Head(),
}


@pytest.mark.parametrize("meme", KINDS)
def test_a_meme_may_be_of_another_kind(meme: Any) -> None:
    targets = ("query",) if meme == "dense" else ()
    method = Fml(meme=meme, rank=2, tokens=3, targets=targets)
    found = ran(method, training=Training(Optim(lr=5e-2), batch=4, steps=3))
    assert {k: tuple(v.shape) for k, v in found.state.items()} == body().layout(KINDS[meme])
    assert any(
        not torch.equal(v, w) for v, w in zip(found.state.values(), begun(meme), strict=True)
    )
    assert not alike(found, ran(Local(), training=Training(Optim(lr=5e-2), batch=4, steps=3)))


def begun(meme: str) -> list[Tensor]:
    """Where a meme of that kind begins."""
    return list(body().initial(KINDS[meme], Dice(0)("initial")).values())


@pytest.mark.parametrize("seat", [Seat(Cut(1, 1)), whole(4)], ids=["cut", "whole"])
def test_a_slot_of_its_own_kind_is_worn_with_its_own_alpha(seat: Seat) -> None:
    kind, (batch,) = Lora(rank=2, alpha=32.0), batches_for(body(), 1)
    stream = torch.Generator().manual_seed(4)
    held = {k: torch.randn(v, generator=stream) * 0.1 for k, v in body().layout(kind).items()}
    logits = list[Tensor]()
    for recipe, own in ((kind, None), (Lora(3, 6.0), kind)):
        slots, offer = {"x": SlotSpec(own)}, Parcel({"x": held})
        with at_desk(body(), seat, kind=recipe, slots=slots, offer=offer) as (desk, _):
            logits.append(desk.model.logits(batch, "x").detach())
    assert torch.equal(*logits)


def test_heads_stay_at_home_if_only_bodies_are_shared() -> None:
    found = play(Fml(share="body"), SEATS, keep_crossings=True)
    assert not any("classifier" in k for k in found.state)
    for arrival in found.arrivals:
        sent = [c.name for c in arrival.ledger.crossings or () if c.name.startswith("slot/")]
        assert sent
        assert not any("classifier" in name for name in sent)
    heads = {"a": ("classification", "x", "y"), "b": ("classification", "z", "w")}
    setting = Setting("classification", Lora(), {}, 4, head=True, heads=heads)
    assert Fml(share="body").refuses(setting) == ""
    assert "the heads of all clients" in Fml().refuses(setting)


def test_fml_refuses_memes_of_unlike_ranks() -> None:
    seats = {"a": Seat(Cut(1), rank=2), "b": Seat(Cut(1))}
    setting = Setting("classification", Lora(), seats, 4, head=True)
    assert "Remove plan.ranks" in Fml().refuses(setting)
    assert Fml(meme="lora").refuses(setting) == ""


# ---- what it costs


@pytest.mark.parametrize("kind", [None, "lora"])
def test_a_round_of_fml_costs_what_the_formula_says(kind: Any) -> None:
    # Two passes of a step, and the meme each way: 2 |m| q, whatever the private model is.
    method = Fml(meme="same" if kind is None else kind, rank=2)
    arrivals = play(method, SEATS, rounds=2, training=SGD, body=body()).arrivals
    meme = body().initial(Lora(3, 6.0) if kind is None else Lora(2, 4.0), Dice(0)("initial"))
    for arrival in arrivals:
        assert arrival.failure is None
        seat = SEATS[int(arrival.client[1])]
        near, steps = sizer(meme, seat)(ALL), 0 if seat == whole(4) else STEPS
        assert (arrival.ledger.sent, arrival.ledger.received) == (
            2 * steps * (2 * S + MASK) + near,
            2 * steps * 2 * S + near,
        ), arrival.client
