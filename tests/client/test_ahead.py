"""The next batch's front is sent ahead of this one's gradient: a step behind, the same anywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from mail import Mail, posting
from torch import Tensor
from toys import at_desk, backbone, batches_for, examples, play, same, shard, toy_task, whole

from flexp import recipe_file
from flexp.client.desk import Desk, Drag, Training
from flexp.data.examples import Batch
from flexp.dice import Dice
from flexp.engine.base import Arrival, Assignment
from flexp.engine.local import LocalEngine
from flexp.errors import RecipeError, StrategyError
from flexp.link.messages import Answer, Backward, Forward, Message, Reply
from flexp.model.adapter import Lora
from flexp.model.cut import Cut, Seat
from flexp.model.ops import Optim
from flexp.model.personal import PersonalModel
from flexp.parcel import Parcel
from flexp.recipe import Recipe
from flexp.selection import FAR, FRONT
from flexp.stage import check_ahead
from flexp.strategies.base import Turn
from flexp.strategies.ditto import Ditto
from flexp.strategies.fedavg import FedAvg
from flexp.strategies.fedprox import FedProx
from flexp.strategies.flexp import FlexP
from flexp.strategies.local import Local
from flexp.strategies.splitfed_v2 import SplitFedV2
from flexp.tensors import Tensors, Term

U, V, LOGITS = Seat(Cut(2, 1)), Seat(Cut(2), "loss"), Seat(Cut(1), "logits")
SEATS = pytest.mark.parametrize("seat", [U, V, LOGITS], ids=["u", "v", "logits"])
SGD, ADAMW = Optim("sgd", lr=0.3, momentum=0.9), Optim("adamw", lr=3e-2, weight_decay=0.1)
DROPS = Lora(rank=3, dropout=0.3)


def batches(family: str = "bert-cls", count: int = 4) -> list[Batch]:
    body = backbone(family)
    if family == "vit":
        return batches_for(body, count)
    data = examples(1, 5 * count)
    return [toy_task(body).collate(data, range(at, at + 5)) for at in range(0, 5 * count, 5)]


def ahead(desk: Desk, on: bool = True) -> Desk:
    desk.training = replace(desk.training, ahead=on)
    return desk


# ---- what it trains


def by_hand(seat: Seat, optim: Optim, late: bool = True) -> Tensors:
    """Each gradient is taken where the front was a step ago and the rest is now; on a whole model.

    Steps are those of the optimizers of torch, one for everything.
    """
    with at_desk(backbone(), whole(), kind=Lora(rank=3)) as (desk, _):
        begun, body = desk.whole(), desk.model.backbone
        now = {k: v.clone() for k, v in begun.items()}
        past, first = None, {k for k in now if 0 <= body.block_of(k) < seat.cut.front}
        held: list[Tensor] = list(now.values())
        if optim.name == "sgd":
            made: torch.optim.Optimizer = torch.optim.SGD(
                held, optim.lr, optim.momentum, foreach=False
            )
        else:
            made = torch.optim.AdamW(
                held, optim.lr, weight_decay=optim.weight_decay, eps=optim.eps, foreach=False
            )
        for batch in batches():
            fronts = past if late and past is not None else now
            leaves = {
                k: (fronts if k in first else now)[k].detach().clone().requires_grad_() for k in now
            }
            logits = desk.model.logits(batch, near=leaves)
            loss = desk.task.loss(logits, batch.labels)  # pyright: ignore[reportAttributeAccessIssue]
            grads = torch.autograd.grad(loss, list(leaves.values()))
            for tensor, grad in zip(held, grads, strict=True):
                tensor.grad = grad
            past = {k: v.clone() for k, v in now.items()}
            made.step()
        assert {body.block_of(k) for k in first} == set(range(seat.cut.front))
        return now


@SEATS
@pytest.mark.parametrize("optim", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_gradients_are_taken_where_the_front_was_a_step_ago(seat: Seat, optim: Optim) -> None:
    with at_desk(backbone(), seat, kind=Lora(rank=3), optim=optim) as (desk, _):
        ahead(desk).fit(batches=iter(batches()))
        found = desk.whole()
    assert same(found, by_hand(seat, optim))
    assert not same(found, by_hand(seat, optim, late=False))


Left = tuple[Mapping[str, Any], Tensors, Tensors, int]


def trained(
    seat: Seat,
    on: bool,
    window: int | None = None,
    *,
    family: str = "bert-cls",
    loss: Any = None,
    **fit: Any,
) -> Left:
    """Facts, adapter, last gradient and rows after a few steps; by mail if there is a window."""
    with at_desk(backbone(family), seat, kind=DROPS) as (desk, _):
        ahead(desk, on).assign("given", (Term("personal", 0.5),))
        if window is None:
            facts = desk.fit(loss, batches=iter(batches(family)), **fit)
        else:
            with posting(desk, window, seconds=0.001):
                facts = desk.fit(loss, batches=iter(batches(family)), **fit)
        return facts, desk.whole(), desk.whole("personal@g"), desk.rows


def alike(one: Left, other: Left) -> bool:
    assert max(float(g.abs().max()) for g in one[2].values()) > 1e-4
    return one[0] == other[0] and same(one[1], other[1]) and same(one[2], other[2])


@SEATS
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("train", [FAR, ~FRONT], ids=["far", "not the front"])
@pytest.mark.daily("far-1-u", "far-2-v", "not the front-1-logits", "not the front-2-u")
def test_where_nothing_in_the_front_trains_it_is_exact(seat: Seat, parts: int, train: Any) -> None:
    seat = replace(seat, accumulate=parts)
    exact = trained(seat, on=False, train=train)
    for window in (None, 1, 2):
        assert alike(exact, trained(seat, True, window, train=train))
    assert not alike(trained(seat, on=False), trained(seat, on=True))


def test_a_client_with_the_whole_model_has_no_reason_to_be_late() -> None:
    assert alike(trained(whole(), on=False), trained(whole(), on=True, window=1))


# ---- the same over any link


def several(model: PersonalModel, batch: Batch) -> Tensor:
    """Three forwards and a front: all of one batch wear the same."""
    mine, teacher = model.logits(batch), model.logits(batch, "given").detach()
    out = model.task.loss(mine, batch.labels) + 0.1 * (mine - teacher).square().mean()
    near = model.hidden(batch, at="cut")
    return out + 0.3 * model.loss(batch) + 0.01 * near.square().mean()


@SEATS
@pytest.mark.parametrize(
    ("family", "parts"),
    [("bert-cls", 1), ("bert-cls", 2), ("bert-cls", 5), ("llama", 2), ("vit", 2)],
)
@pytest.mark.daily("bert-cls-1-u", "bert-cls-2-v", "bert-cls-5-logits", "llama-2-u", "vit-2-v")
def test_what_is_sent_ahead_is_what_one_process_trains(family: str, seat: Seat, parts: int) -> None:
    seat = replace(seat, accumulate=parts)
    here = trained(seat, on=True, family=family)
    for window in (1, 2):
        assert alike(here, trained(seat, True, window, family=family))
        assert here[3] == 5 * 4 if family != "vit" else 3 * 4


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    "fit",
    [
        {"loss": several},
        {"add": (Term("given", 0.01),), "pull": (Drag("given", 0.1, form="product"),)},
        {"wear": (Term("personal", 0.7), Term("given", 0.3)), "train": {"personal": FAR | FRONT}},
    ],
    ids=["several forwards", "add and pull", "mix"],
)
def test_losses_sums_pulls_and_mixes_are_the_same(parts: int, fit: dict[str, Any]) -> None:
    seat = replace(U, accumulate=parts)
    here = trained(seat, on=True, **fit)
    assert alike(here, trained(seat, True, 1, **fit))
    assert alike(here, trained(seat, True, 2, **fit))
    assert not alike(here, trained(seat, on=False, **fit))


@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_step_without_a_finite_loss_is_skipped_on_both_sides(at: int) -> None:
    def odd(model: PersonalModel, batch: Batch) -> Tensor:
        wrong = torch.equal(batch.labels, batches()[at].labels)
        return model.loss(batch) * (float("nan") if wrong else 1.0)

    facts, here, _, _ = trained(U, on=True, loss=odd)
    assert (facts["steps"], facts["skipped"]) == (4, 1)
    assert all(bool(torch.isfinite(v).all()) for v in here.values())
    for window in (1, 2):
        found = trained(U, True, window, loss=odd)
        assert found[0] == facts
        assert same(found[1], here)
    with at_desk(backbone(), U, kind=DROPS) as (desk, _):  # only what was fine has moved it
        left = [b for n, b in enumerate(batches()) if n != at]
        ahead(desk).fit(batches=iter(left[:1]))
        assert not same(desk.whole(), here)


def by_mail(method: type[Any], window: int) -> type[Any]:
    """A method whose clients send by mail."""

    def train(self: Any, desk: Desk, offer: Parcel) -> Parcel:
        with posting(desk, window):
            return method.train(self, desk, offer)

    return type("ByMail", (method,), {"train": train})


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        (FedAvg, {}),
        (FedProx, {}),
        (Ditto, {}),
        (FlexP, {"distil": 0.3, "feature": 0.1}),
        (SplitFedV2, {}),
    ],
    ids=lambda m: getattr(m, "name", ""),
)
@pytest.mark.daily("fedavg--1", "flexp--2", "splitfed_v2--1")
def test_two_rounds_of_a_method_are_the_same(
    method: type[Any], options: dict[str, float], window: int
) -> None:
    seats = [replace(s, accumulate=window) for s in (U, Seat(Cut(1)), Seat(Cut(3, 1)))]
    training = Training(Optim(lr=1e-2), batch=4, steps=3, ahead=True)
    more: dict[str, Any] = {"kind": DROPS, "training": training}
    here = play(method(**options), seats, **more)
    there = play(by_mail(method, window)(**options), seats, **more)
    late = replace(training, ahead=False)
    exact = play(method(**options), seats, kind=DROPS, training=late)
    assert here.adapters
    for client, adapter in here.adapters.items():
        assert same(adapter, there.adapters[client])
        assert not same(adapter, exact.adapters[client])
    for one, other in zip(here.arrivals, there.arrivals, strict=True):
        assert one.failure is other.failure is None
        assert one.rows == other.rows == (24 if method is Ditto else 12)
        assert one.reply is not None
        assert other.reply is not None
        assert one.reply.facts == other.reply.facts


# ---- what goes over the link, and when


@dataclass
class Withholding(Mail):
    """Answers a backward only when the next forward has come, as after a lost connection.

    Then both are asked again, in their order, as who dials again does.
    """

    last: int = 0  # how many backwards there are; nothing follows the last one
    backwards: int = 0
    held: list[tuple[Message, Future[Answer], Answer]] = field(default_factory=list[Any])

    def begin(self, message: Message) -> Reply:
        future: Future[Answer] = Future()
        answer = self.inner.send(message)
        self.sent.append((message.key.phase, getattr(message, "part", -1)))
        self.backwards += isinstance(message, Backward)
        self.held.append((message, future, answer))
        if isinstance(message, Backward) and self.backwards < self.last:
            return Reply(future, future.result)
        for each, waiting, before in self.held:
            again = self.inner.send(each)
            assert same(again.tensors, before.tensors)
            waiting.set_result(again)
        self.held = []
        return Reply(future, future.result)


def test_the_next_forward_goes_out_before_the_gradient_is_back() -> None:
    """Else this would wait for ever; and what is asked again is known to the step table."""
    here = trained(U, on=True)
    with at_desk(backbone(), U, kind=DROPS) as (desk, _):
        ahead(desk).assign("given", (Term("personal", 0.5),))
        with posting(desk, 1, Withholding, last=4) as mail:
            facts = desk.fit(batches=iter(batches()))
        found = facts, desk.whole(), desk.whole("personal@g"), desk.rows
    assert alike(here, found)
    assert [phase for phase, _ in mail.sent] == ["forward", "backward"] * 4


def test_the_far_step_rides_behind_the_backward() -> None:
    order: list[tuple[str, int, int]] = []

    def seen(message: Message) -> bool:
        ops = len(message.ops) if isinstance(message, Forward) else 0
        order.append((message.key.phase, message.key.step, ops))
        return False

    with at_desk(backbone(), U) as (desk, _), posting(desk, 1, fails=seen):
        ahead(desk).fit(batches=iter(batches()))
    kinds = [(phase, ops) for phase, _, ops in order]
    assert kinds[:2] == [("forward", 0), ("backward", 0)]
    assert kinds[2:] == [("forward", 2), ("backward", 0)] * 3
    steps = [step for _, step, _ in order]
    assert steps == [steps[0] + n // 2 for n in range(8)]


def test_no_more_is_under_way_than_one_batch_and_the_gradient_before() -> None:
    for window in (1, 2):
        seat = replace(U, accumulate=2)
        with at_desk(backbone(), seat) as (desk, _), posting(desk, window) as mail:
            ahead(desk).fit(batches=iter(batches()))
        assert mail.most <= 2 * window
        kinds = [kind for kind in mail.sent if kind[0] in ("forward", "backward")]
        parts = [("forward", 0), ("forward", 1), ("backward", -1), ("backward", -1)]
        one = [parts[0], parts[2], parts[1], parts[3]]
        assert kinds == (one if window == 1 else parts) * 4


# ---- what fails


class Site:
    """One client, turn by turn, on a link of which a message may fail."""

    def __init__(self, window: int) -> None:
        body = backbone()
        self.engine = LocalEngine(
            body,
            toy_task(body),
            {"me": shard(1)},
            kind=DROPS,
            training=Training(Optim(lr=1e-2), batch=4, steps=3, ahead=True),
            dice=Dice(3),
        )
        self.fails: Callable[[Message], bool] = lambda message: False
        self.seat = replace(U, accumulate=window)
        self.turn = Turn(0, 1, 0, True, {"me": self.seat}, {}, body.block_of, body.depth)
        site = self

        def train(self: Any, desk: Desk, offer: Parcel) -> Parcel:
            with posting(desk, window, fails=site.fails):
                return Local.train(self, desk, offer)

        self.strategy = type("ByMail", (Local,), {"train": train})()

    def train(self) -> Arrival:
        work = Assignment("me", self.seat, Parcel())
        (arrival,) = self.engine.run(self.strategy, [work], self.turn)
        return arrival

    def kept(self) -> tuple[Tensors, Tensors]:
        near = self.engine.memories["me"].slots
        far = self.engine.tenants["me"].slots.values
        return near["slot/personal"], far["personal"]


@pytest.mark.parametrize("window", [1, 2])
def test_a_turn_that_fails_at_any_message_is_done_again(window: int) -> None:
    still, site, sent = Site(window), Site(window), list[Message]()

    def count(message: Message) -> bool:
        sent.append(message)
        return False

    still.fails = count
    assert still.train().failure is None
    total = len(sent)
    assert total >= 2 * 3 * window
    for at in range(1, total + 1):
        sent.clear()
        site.fails = lambda message, at=at: count(message) or len(sent) == at
        failure = site.train().failure
        assert failure is not None
        assert "lost on the way" in failure.error
    site.fails = lambda message: False
    assert site.train().failure is None
    for mine, theirs in zip(site.kept(), still.kept(), strict=True):
        assert same(mine, theirs)
    site.engine.close()
    still.engine.close()


@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize("when", ["loss", "batch"])
def test_what_a_loss_or_a_batch_raises_comes_out(at: int, when: str) -> None:
    begun: list[Batch] = []

    def loss(model: PersonalModel, batch: Batch) -> Tensor:
        begun.append(batch)
        value = model.loss(batch)
        if when == "loss" and len(begun) > at:
            raise ZeroDivisionError("in the middle")
        return value

    def given() -> Any:
        for n, batch in enumerate(batches()):
            if when == "batch" and n == at:
                raise ZeroDivisionError("in the middle")
            yield batch

    with (
        at_desk(backbone(), U) as (desk, _),
        posting(desk, 1, seconds=0.001),
        pytest.raises(ZeroDivisionError, match="in the middle"),
    ):
        ahead(desk).fit(loss, batches=given())


# ---- what is refused


def test_a_clip_is_refused_before_anything_starts() -> None:
    asked = {"link": {"ahead": True}, "train": {"clip_norm": 1.0}}
    with pytest.raises(RecipeError, match=r"link\.ahead.*remove train\.clip_norm"):
        recipe_file.make(asked)


def test_a_clip_of_the_methods_own_is_refused_where_it_is_asked() -> None:
    with at_desk(backbone(), U) as (desk, ledger):
        before = ledger.messages
        with pytest.raises(StrategyError, match=r"Switch link\.ahead off, or do not clip"):
            ahead(desk).fit(batches=iter(batches()), clip_norm=1.0)
        assert ledger.messages == before


def test_a_method_without_a_barrier_is_refused() -> None:
    recipe = Recipe.model_validate({"link": {"ahead": True}})
    check_ahead(FlexP(), recipe)
    with pytest.raises(StrategyError, match=r'"flexp" has no barrier.*Switch link\.ahead off'):
        check_ahead(FlexP(server="sequential"), recipe)
    check_ahead(FlexP(server="sequential"), Recipe())
