"""Operations from the skeleton alone are those that the engine measures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import (
    CONVOLUTIONS,
    FAMILIES,
    Local,
    ToyTask,
    at_desk,
    backbone,
    batches_for,
    everywhere,
    kind_for,
)

from flexp.client.desk import Training
from flexp.data.examples import Batch, Examples, Shard
from flexp.dice import Dice
from flexp.engine.base import Assignment
from flexp.engine.local import LocalEngine
from flexp.errors import CutError
from flexp.model.adapter import Dense, Head, Kind, Lora, Prompt
from flexp.model.backbone import Backbone
from flexp.model.cut import Cut, Seat
from flexp.model.meter import Meter
from flexp.model.ops import Optim
from flexp.model.skeleton import Skeleton, TaskKind, skeleton
from flexp.parcel import Parcel
from flexp.plan.work import BlockWork, far_flops, measure_work, near_flops
from flexp.strategies.base import Turn

ROWS, LENGTH = 3, 9
SEATS = [Seat(Cut(1, 1)), Seat(Cut(2)), Seat(Cut(1, 2)), Seat(Cut(4)), Seat(Cut(2), "logits")]


def bones_of(body: Backbone) -> Skeleton:
    return Skeleton(body.model, body.blocks_path, body.depth, body.config)


def predicted(work: BlockWork, seat: Seat) -> tuple[int, int]:
    keep = seat.labels == "keep"
    cut = seat.cut.front, seat.cut.back
    return near_flops(work, *cut, head_near=keep), far_flops(work, *cut, head_near=keep)


class FullTask(ToyTask):
    """Rows without padding, as long as the plan says."""

    def collate(self, examples: Examples, indices: Any) -> Batch:
        found = super().collate(examples, indices)
        ids = torch.tensor([examples.ids[i] for i in indices])
        wanted = ids if self.name == "causal-lm" else found.labels
        return Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, wanted)


def measured(
    body: Backbone, seat: Seat, kind: Kind, *, rows: int = ROWS, length: int = LENGTH
) -> tuple[int, int]:
    """Operations near and far of one step, as an engine measures them."""
    some = Examples(
        tuple((5,) * length for _ in range(rows)), (0,) * rows, tuple(map(str, range(rows)))
    )
    name = "causal-lm" if body.task == "causal-lm" else "classification"
    engine = LocalEngine(
        body,
        FullTask(name),
        {"me": Shard(some, some, some)},
        kind=kind,
        training=Training(Optim(lr=1e-2), batch=rows, steps=1),
        dice=Dice(3),
        profile="open",
    )
    engine.measures = True
    turn = Turn(0, 1, 0, True, {"me": seat}, {}, body.block_of, body.depth)
    try:
        [arrival] = engine.run(Local(), [Assignment("me", seat, Parcel())], turn)
    finally:
        engine.close()
    assert arrival.measured is not None, arrival.failure
    return arrival.measured.near_flops, arrival.measured.far_flops


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("vit", "dinov2")])
def test_a_step_takes_what_is_predicted(family: str) -> None:
    body = backbone(family)
    kind = Lora(rank=3, alpha=6.0)
    work = measure_work(bones_of(body), kind, body.task, batch=ROWS, length=LENGTH)
    for seat in SEATS[:1] if family != "bert-cls" else SEATS:
        assert predicted(work, seat) == pytest.approx(measured(body, seat, kind), rel=0.01)


@pytest.mark.parametrize("family", ["vit", "dinov2", *CONVOLUTIONS])
def test_images_are_counted_by_their_size(family: str) -> None:
    body = backbone(family)
    kind = kind_for(body)
    work = measure_work(bones_of(body), kind, body.task, batch=3, length=1)
    seat = Seat(Cut(1, 1))
    with at_desk(body, seat, kind=kind) as (desk, _), Meter() as meter:
        desk.fit(batches=iter(batches_for(body, 1)))
        assert everywhere(desk, "personal")
    assert predicted(work, seat)[0] == pytest.approx(meter.flops, rel=0.01)


@pytest.mark.parametrize(
    "kind",
    [
        Lora(rank=2, targets=("dense",)),
        Lora(rank=2, head=False),
        Prompt(tokens=4),
        Dense(("bert.encoder.layer.2.output.dense",)),
        Dense(("query", "output.dense")),
        Dense(),
        Head(),
    ],
    ids=lambda kind: type(kind).__name__,
)
@pytest.mark.parametrize("seat", [Seat(Cut(1, 1)), Seat(Cut(3)), Seat(Cut(1), "logits")], ids=str)
def test_any_kind_of_adapter_is_predicted(kind: Kind, seat: Seat) -> None:
    body = backbone("bert-cls")
    work = measure_work(bones_of(body), kind, body.task, batch=ROWS, length=LENGTH)
    assert predicted(work, seat) == pytest.approx(measured(body, seat, kind), rel=0.05)


@pytest.mark.parametrize(
    ("name", "task", "cuts"),
    [
        ("bert-tiny", "classification", [(1, 0), (1, 1)]),
        ("minilm", "classification", [(1, 1), (3, 2), (6, 0)]),
        pytest.param("smollm2-135m", "causal-lm", [(2, 1), (12, 6)], marks=pytest.mark.slow),
    ],
)
def test_packaged_models_take_what_is_predicted(
    name: str, task: TaskKind, cuts: list[tuple[int, int]], asset: Callable[[str], Path]
) -> None:
    folder, kind = asset(name), Lora(rank=8)
    work = measure_work(skeleton(folder, task), kind, task, batch=2, length=24)
    body = Backbone.open(folder, task=task)
    for cut in cuts:
        seat = Seat(Cut(*cut))
        found = measured(body, seat, kind, rows=2, length=24)
        assert predicted(work, seat) == pytest.approx(found, rel=0.05)


def test_parts_add_up_and_recomputation_is_one_more_forward() -> None:
    body = backbone("llama")
    work = measure_work(bones_of(body), Lora(rank=3), body.task, batch=ROWS, length=LENGTH)
    assert work.blocks == 4
    assert work.first == 0
    assert near_flops(work, 4, 0) == work.total
    assert far_flops(work, 4, 0) == 0
    for a, b in ((1, 0), (1, 1), (2, 1)):
        both = near_flops(work, a, b) + far_flops(work, a, b)
        assert both == work.total + 2 * work.embed  # each pass begins in the model's embedding
        again = near_flops(work, a, b, recompute=a + b) - near_flops(work, a, b)
        assert again == (a + b) * work.forward[0]
        once = near_flops(work, a, b, recompute=1) - near_flops(work, a, b)
        assert once == work.forward[0]
    twice = measure_work(bones_of(body), Lora(rank=3), body.task, batch=2 * ROWS, length=LENGTH)
    assert twice.total == 2 * work.total


def test_what_lies_before_anything_trained_has_no_backward() -> None:
    body = backbone("bert-cls")
    kind = Dense(("bert.encoder.layer.2.output.dense",))
    work = measure_work(bones_of(body), kind, body.task, batch=ROWS, length=LENGTH)
    assert work.first == 2
    assert work.backward[:2] == (0, 0)
    assert 0 < work.backward[2] < work.backward[3]
    head = measure_work(bones_of(body), Head(), body.task, batch=ROWS, length=LENGTH)
    assert head.backward == (0,) * 4
    assert head.head_backward > 0
    assert near_flops(head, 2, 0, recompute=2) == near_flops(head, 2, 0)


@pytest.mark.parametrize("cut", [(-1, 0), (3, 2)])
def test_a_cut_outside_the_model_is_refused(cut: tuple[int, int]) -> None:
    work = BlockWork(0, (1,) * 4, (1,) * 4, 0, 0, 0)
    with pytest.raises(CutError, match="the model has 4 blocks"):
        near_flops(work, *cut)
