"""Recompute and accumulation: less memory, the same training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from agreement import trained
from toys import at_desk, backbone, batches_for, examples, gap, play, same, toy_task, whole

from flexp import checkpoint
from flexp.client.desk import Training
from flexp.data.examples import Batch
from flexp.dice import Dice
from flexp.errors import CutError
from flexp.model.adapter import Dense, Head, Ia3, Kind, Lora, Prompt
from flexp.model.cut import Cut, Seat
from flexp.model.meter import Meter
from flexp.model.ops import Optim, SlotSpec
from flexp.parcel import Parcel
from flexp.recipe import Recipe
from flexp.strategies.fedavg import FedAvg
from flexp.tensors import PerRow

U, V = Seat(Cut(2, 1)), Seat(Cut(2), "loss")
KINDS: dict[str, tuple[str, Kind]] = {
    "lora": ("llama", Lora(rank=3, dropout=0.3)),
    "dora": ("bert-cls", Lora(rank=3, dora=True, dropout=0.3)),
    "ia3": ("gpt2", Ia3()),
    "prompt": ("qwen3", Prompt(tokens=2)),
    "dense": ("bert-cls", Dense(("bert.encoder.layer.0.output.dense",))),
    "all linear maps in full": ("gpt2", Dense()),
    "head": ("bert-cls", Head()),
    "distilbert": ("distilbert-cls", Lora(rank=2)),
    "modernbert": ("modernbert-cls", Lora(rank=2)),
    "gemma": ("gemma3", Lora(rank=2)),
    "opt": ("opt", Lora(rank=2)),
    "vit": ("vit", Lora(rank=2)),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.daily("lora", "dora", "prompt", "dense", "gemma", "vit")
def test_recomputed_blocks_train_alike_bit_for_bit(name: str) -> None:
    family, kind = KINDS[name]
    body = backbone(family)
    for seat in (whole(), U):
        plain = trained(body, seat, kind=kind)
        for some in (1, sum((seat.cut.front, seat.cut.back))):
            again = trained(body, replace(seat, recompute=some), kind=kind)
            assert torch.equal(plain[0], again[0])
            assert same(plain[1], again[1])
            assert same(plain[2], again[2])
            assert any(bool(g.any()) for g in again[1].values())


@pytest.mark.parametrize("seat", [Seat(Cut(6, 2)), Seat(Cut(8, 0)), Seat(Cut(6), "logits")])
def test_recompute_keeps_nothing_from_inside_a_block(seat: Seat) -> None:
    body = backbone("bert-cls", 8)
    ids = torch.ones(8, 32, dtype=torch.int64)
    batch = Batch({"input_ids": ids, "attention_mask": ids}, torch.zeros(8, dtype=torch.int64))
    peaks: list[int] = []
    near = sum((seat.cut.front, seat.cut.back))
    for recompute in (0, near // 2, near):
        with at_desk(body, replace(seat, recompute=recompute)) as (desk, _), Meter() as meter:
            desk.fit(batches=iter([batch]))
        peaks.append(meter.peak)
    assert peaks[2] < 0.5 * peaks[0]
    assert peaks[2] < peaks[1] < peaks[0]


def batches(family: str) -> list[Batch]:
    """Rows that count for unequal numbers of tokens."""
    body = backbone(family)
    if family == "vit":
        return batches_for(body, 2)
    data = examples(1, 10)
    return [toy_task(body).collate(data, range(at, at + 5)) for at in (0, 5)]


@pytest.mark.parametrize("family", ["bert-cls", "llama", "vit"])
@pytest.mark.parametrize("seat", [whole(), U, V], ids=["whole", "u", "v"])
@pytest.mark.parametrize("count", [2, 3, 9])
def test_a_batch_in_parts_has_the_batchs_gradient(family: str, seat: Seat, count: int) -> None:
    body = backbone(family)
    found: list[Any] = []
    for accumulate in (1, count):
        with at_desk(body, replace(seat, accumulate=accumulate)) as (desk, _):
            facts = desk.fit(batches=iter(batches(family)), steps=2)
            found.append((facts, desk.whole("personal@g"), desk.rows))
    (plain, grad, rows), (parts, summed, counted) = found
    largest = max(float(g.abs().max()) for g in grad.values())
    assert gap(grad, summed) <= 1e-6 * max(1.0, largest)
    assert largest > 1e-3
    assert counted == rows == parts["rows"] == plain["rows"]
    assert parts["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    assert parts["steps"] == plain["steps"] == 2


@pytest.mark.parametrize("seat", [U, V, Seat(Cut(1), "logits")], ids=["u", "v", "logits"])
def test_the_server_counts_rows_of_all_parts(seat: Seat) -> None:
    training = Training(Optim(lr=1e-2), batch=5, steps=3, clip_norm=0.5)
    plain = play(FedAvg(), seat, rounds=1, training=training)
    parts = play(FedAvg(), replace(seat, accumulate=3), rounds=1, training=training)
    assert [a.rows for a in parts.arrivals] == [a.rows for a in plain.arrivals] == [15] * 3
    for client in plain.adapters:
        assert gap(plain.adapters[client], parts.adapters[client]) < 1e-4


def test_a_loss_of_the_callers_counts_as_the_tasks_does() -> None:
    body, found = backbone("llama"), list[Any]()
    for accumulate in (1, 3):
        with at_desk(body, replace(U, accumulate=accumulate)) as (desk, _):
            desk.fit(lambda model, batch: 2 * model.loss(batch), batches=iter(batches("llama")))
            found.append(desk.whole("personal@g"))
    assert gap(*found) < 1e-6


def test_rows_that_wear_different_slots_keep_theirs_in_parts() -> None:
    body, found = backbone(), list[Any]()
    wear = PerRow(("a", "b"), (0, 1, 1, 0, 1))
    begun = body.initial(Lora(rank=3), Dice(1))
    offer = Parcel({"a": begun, "b": {k: v + 0.1 for k, v in begun.items()}})
    slots = {"a": SlotSpec(), "b": SlotSpec()}
    for accumulate in (1, 2):
        seat = replace(U, accumulate=accumulate)
        with at_desk(body, seat, slots=slots, offer=offer) as (desk, _):
            desk.fit(wear=wear, batches=iter(batches("bert-cls")[:1]))
            found.append({f"{s}/{k}": v for s in slots for k, v in desk.whole(f"{s}@g").items()})
    assert max(float(v.abs().max()) for v in found[0].values()) > 1e-3
    assert gap(*found) < 1e-6


def test_less_than_one_part_is_refused() -> None:
    with pytest.raises(CutError, match='client "anna" takes a batch in 0 parts'):
        Seat(Cut(1), accumulate=0).check(4, who="anna")


def test_a_seat_is_resumed_as_it_was(tmp_path: Path) -> None:
    seat = Seat(Cut(1, 1), rank=3, recompute=1, accumulate=2)
    engine = play(FedAvg(), seat, rounds=1).engine
    path = checkpoint.write(tmp_path, 1, Recipe(), None, engine)
    fresh = play(FedAvg(), seat, rounds=0).engine
    checkpoint.read(path, FedAvg(), fresh)
    assert {home.seat for home in fresh.tenants.homes.values()} == {seat}


def test_how_a_client_computes_may_change_between_turns() -> None:
    """Nothing moves, and what lasts stays as it is."""
    engine = play(FedAvg(), U, rounds=1).engine
    specs = {"personal": SlotSpec(lasts="run")}
    engine.tenants.join("c0", U, specs)
    held = dict(engine.tenants["c0"].slots.values["personal"])
    engine.tenants.join("c0", replace(U, recompute=1, accumulate=2), specs)
    assert same(engine.tenants["c0"].slots.values["personal"], held)
    assert engine.tenants["c0"].seat.recompute
