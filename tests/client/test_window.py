"""Two parts of a batch under way at once: the same bits as one part after the other."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from mail import posting
from toys import at_desk, backbone, batches_for, examples, same, toy_task

from flexp.data.examples import Batch
from flexp.errors import StepError
from flexp.link.messages import Forward, Message
from flexp.model.adapter import Lora
from flexp.model.cut import Cut, Seat
from flexp.strategies.alignment import aligned_loss
from flexp.tensors import Tensors, Term

U, V, LOGITS = Seat(Cut(2, 1)), Seat(Cut(2), "loss"), Seat(Cut(1), "logits")


def batches(family: str) -> list[Batch]:
    body = backbone(family)
    if family == "vit":
        return batches_for(body, 3)
    data = examples(1, 15)
    return [toy_task(body).collate(data, range(at, at + 5)) for at in (0, 5, 10)]


Left = tuple[Mapping[str, Any], Tensors, Tensors, int, list[tuple[str, int]], tuple[int, int]]


def trained(family: str, seat: Seat, window: int, *, kind: Lora | None = None, **fit: Any) -> Left:
    """Facts, adapter, last gradient, rows, order of messages and bytes of a few steps."""
    with at_desk(backbone(family), seat, kind=kind or Lora(rank=3)) as (desk, ledger):
        with posting(desk, window, seconds=0.002) as mail:
            facts = desk.fit(batches=iter(batches(family)), **fit)
        assert mail.most == window
        size = ledger.sent, ledger.received
        whole, grad = desk.whole(), desk.whole("personal@g")
        return facts, whole, grad, desk.rows, mail.sent, size


def alike(one: Left, other: Left) -> None:
    assert one[0] == other[0]
    assert same(one[1], other[1])
    assert same(one[2], other[2])
    assert one[3] == other[3]
    assert one[5] == other[5]
    assert max(float(g.abs().max()) for g in one[2].values()) > 1e-4


@pytest.mark.parametrize("family", ["bert-cls", "llama", "vit"])
@pytest.mark.parametrize("seat", [U, V, LOGITS], ids=["u", "v", "logits"])
@pytest.mark.parametrize("parts", [2, 5])
@pytest.mark.daily(
    "2-u-bert-cls", "2-v-llama", "2-logits-vit", "5-u-llama", "5-v-vit", "5-logits-bert-cls"
)
def test_two_at_a_time_are_one_after_another_bit_for_bit(
    family: str, seat: Seat, parts: int
) -> None:
    seat = replace(seat, accumulate=parts)
    kind = Lora(rank=3, dropout=0.3)
    one, two = (trained(family, seat, n, kind=kind, clip_norm=0.1) for n in (1, 2))
    alike(one, two)


@pytest.mark.parametrize("seat", [replace(U, recompute=2), V])
def test_messages_come_in_one_order(seat: Seat) -> None:
    found = trained("bert-cls", replace(seat, accumulate=3), 2)[4]
    steps = [kind for kind in found if kind[0] in ("forward", "backward")]
    assert len(steps) == 3 * 6
    for at in range(0, 18, 6):
        step = steps[at : at + 6]
        assert step[:2] == [("forward", 0), ("forward", 1)]
        assert [part for phase, part in step if phase == "forward"] == [0, 1, 2]


def test_a_loss_of_the_callers_with_several_forwards_is_the_same() -> None:
    aligned, seat, found = aligned_loss(0.5, 0.5), replace(U, accumulate=3), list[Left]()
    assert aligned is not None

    def both(model: Any, batch: Batch) -> Any:
        return aligned(model, batch) + 0.3 * model.loss(batch)

    for window in (1, 2):
        with at_desk(backbone(), seat, kind=Lora(rank=3, dropout=0.2)) as (desk, _):
            desk.assign("reference", (Term("personal", 0.5),))
            with posting(desk, window, seconds=0.002) as mail:
                facts = desk.fit(both, batches=iter(batches("bert-cls")), clip_norm=0.1)
            whole, grad = desk.whole(), desk.whole("personal@g")
            found.append((facts, whole, grad, desk.rows, mail.sent, (0, 0)))
    alike(*found)


def test_operations_ride_on_the_first_part() -> None:
    rode: list[tuple[int, int]] = []

    def seen(message: Message) -> bool:
        if isinstance(message, Forward):
            rode.append((message.part, len(message.ops)))
        return False

    with at_desk(backbone(), replace(U, accumulate=2)) as (desk, _), posting(desk, fails=seen):
        desk.fit(batches=iter(batches("bert-cls")))
    assert rode[0] == (0, 0)
    assert rode[2:] == [(0, 2), (1, 0)] * 2


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("nth", [0, 1])
def test_what_fails_in_one_part_ends_both(phase: str, nth: int) -> None:
    seen: list[Message] = []

    def fails(message: Message) -> bool:
        if message.key.phase == phase:
            seen.append(message)
        return message.key.phase == phase and len(seen) == nth + 1

    with (
        at_desk(backbone(), replace(U, accumulate=4)) as (desk, _),
        posting(desk, seconds=0.005, fails=fails),
        pytest.raises(StepError, match="lost on the way"),
    ):
        desk.fit(batches=iter(batches("bert-cls")))


@pytest.mark.parametrize("at", [0, 1, 3])
def test_what_the_loss_raises_comes_out(at: int) -> None:
    begun: list[Batch] = []

    def loss(model: Any, batch: Batch) -> Any:
        begun.append(batch)
        mine = len(begun) - 1
        value = model.loss(batch)
        if mine == at:
            raise ZeroDivisionError("in the loss")
        return value

    with (
        at_desk(backbone(), replace(U, accumulate=4)) as (desk, _),
        posting(desk, seconds=0.005),
        pytest.raises(ZeroDivisionError, match="in the loss"),
    ):
        desk.fit(loss, batches=iter(batches("bert-cls")))


def test_only_one_part_computes_at_a_time() -> None:
    busy, most = 0, 0
    lock = threading.Lock()

    def loss(model: Any, batch: Batch) -> Any:
        nonlocal busy, most
        logits = model.logits(batch)
        with lock:
            busy += 1
            most = max(most, busy)
        time.sleep(0.003)
        with lock:
            busy -= 1
        return model.task.loss(logits, batch.labels)

    with at_desk(backbone(), replace(U, accumulate=4)) as (desk, _), posting(desk):
        desk.fit(loss, batches=iter(batches("bert-cls")))
    assert most == 1


def test_a_step_that_waits_is_shorter_by_the_waiting() -> None:
    took: list[float] = []
    for window in (1, 2):
        wide = ThreadPoolExecutor(2)
        with (
            at_desk(backbone(), replace(U, accumulate=2)) as (desk, _),
            posting(desk, window, seconds=0.1, road=wide),
        ):
            began = time.monotonic()
            desk.fit(batches=iter(batches("bert-cls")[:2]))
            took.append(time.monotonic() - began)
    assert took[0] > 2 * 4 * 0.1
    assert took[1] < took[0] - 0.2


def test_without_a_link_that_posts_parts_come_one_after_another() -> None:
    seat = replace(U, accumulate=2)
    found: list[Tensors] = []
    for window in (1, 2):
        with at_desk(backbone(), seat) as (desk, _):
            desk.session.window = window
            desk.fit(batches=iter(batches("bert-cls")))
            found.append(desk.whole())
    assert same(*found)
    assert torch.isfinite(next(iter(found[0].values()))).all()
