"""A step tried without memory holds what the same step holds with it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf
from toys import V, at_desk, backbone, task_of

from flexp.data.examples import Batch
from flexp.link.local import LocalLink
from flexp.link.messages import Answer, Message
from flexp.model.adapter import Dense, Kind, Lora
from flexp.model.backbone import Backbone
from flexp.model.cut import Cut, Seat
from flexp.model.meter import Meter
from flexp.model.quantize import Quantize, quantizable, quantize_maps
from flexp.model.skeleton import TaskKind, bare, image_shape, states_of
from flexp.model.targets import EVERY
from flexp.plan import BlockCosts, measure_costs, near_bytes, tried
from flexp.plan.sizes import adapter_bytes
from flexp.plan.trial import Shape

ROWS, LENGTH, DEPTH = 24, 32, 4
U = Seat(Cut(2, 1))


def costs_of(
    config: Any, task: TaskKind, adapter: Any, quantize: Quantize | None = None
) -> BlockCosts:
    bones = bare(config, task)
    states = states_of(config, task)
    size: dict[str, Any] = {"batch": ROWS, "length": LENGTH, "itemsize": 4}
    shapes = () if states is None else states.shapes
    sized = measure_costs(bones.model, bones.blocks_path, {}, **size, states=shapes)
    blocks, outside = adapter_bytes(adapter, bones.blocks_path, bones.depth, 4)
    sized = replace(sized, adapter_block_bytes=blocks, adapter_head_bytes=outside)
    how: dict[str, Any] = {"dtype": torch.float32, "quantize": quantize}
    return tried(sized, bones, task, adapter, Shape(ROWS, LENGTH), **how)


def peak(body: Backbone, seat: Seat, kind: Kind) -> int:
    """The most that two steps made, in bytes, the slots among it."""
    ids = torch.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) % (V - 3) + 3
    mask = torch.ones_like(ids)
    mask[0, -1], ids[0, -1] = 0, 0
    labels = torch.zeros(ROWS, dtype=torch.int64)
    if body.task == "causal-lm":
        labels = torch.where(mask.bool(), ids, -100)
    text = Batch({"input_ids": ids, "attention_mask": mask}, labels)

    def batches() -> Iterator[Batch]:
        for _ in range(2):  # an image feeds the first block itself, so it is made in there
            yield (
                text
                if body.task != "images"
                else Batch({"pixel_values": torch.randn(ROWS, *image_shape(body.config))}, labels)
            )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalLink, "send", far_away)
        with at_desk(body, seat, kind=kind) as (desk, _), Meter() as meter:
            desk.fit(batches=batches())
    return meter.peak


def far_away(link: LocalLink, message: Message, send: Any = LocalLink.send) -> Answer:
    """Sends, and goes on when the server's thread has let go of the message's tensors."""
    answer: Answer = send(link, message)
    trunk: Any = getattr(link.handle, "__self__", None)
    trunk.in_turn(lambda: None)
    return answer


def expected(costs: BlockCosts, seat: Seat) -> int:
    """The same as a plan has it."""
    parts = near_bytes(
        costs,
        seat.cut.front,
        seat.cut.back,
        head_near=seat.labels == "keep",
        recompute=seat.recompute,
        accumulate=seat.accumulate,
    )
    return parts["activations"] + parts["link"] + parts["adapters"]


@pytest.mark.parametrize(
    ("family", "seat", "kind"),
    [
        ("bert-cls", U, Lora(rank=2)),
        ("bert-cls", Seat(Cut(2), "logits"), Lora(rank=2)),
        ("bert-cls", replace(U, recompute=2), Lora(rank=2)),
        ("bert-cls", replace(U, recompute=1), Lora(rank=2)),
        ("llama", U, Lora(rank=2)),
        ("llama", replace(U, accumulate=3), Lora(rank=2)),
        ("gpt2", U, Lora(rank=2)),
        ("modernbert-cls", U, Lora(rank=2, dora=True)),
        ("gemma3", U, Lora(rank=2, targets=("up_proj", "down_proj"))),
        ("distilbert-cls", U, Dense(("distilbert.transformer.layer.1.ffn.lin1",))),
        ("bert-cls", U, Dense(("query", "value"))),
        ("bert-cls", U, Dense()),
        ("gpt2", replace(U, recompute=2), Dense()),
        ("vit", U, Dense((EVERY,))),
    ],
    ids=str,
)
def test_a_prediction_is_what_the_meter_counts(family: str, seat: Seat, kind: Kind) -> None:
    body = backbone(family, DEPTH)
    body.config.max_position_embeddings = LENGTH
    costs = costs_of(body.config, body.task, body.layout(kind))
    assert costs.full is not None
    assert not costs.full.rough
    assert peak(body, seat, kind) == pytest.approx(expected(costs, seat), rel=0.15)


@pytest.mark.parametrize(
    ("family", "seat"),
    [
        ("resnet", U),
        ("resnet", Seat(Cut(3), "logits")),
        ("resnet", replace(U, accumulate=3, recompute=2)),
        ("cnn", Seat(Cut(1, 2))),
    ],
    ids=str,
)
def test_convolutions_never_take_more_than_is_predicted(family: str, seat: Seat) -> None:
    """And not much less: the gradient that comes in counts as a message and as work."""
    body, kind = backbone(family, DEPTH), Dense((EVERY,))
    costs = costs_of(body.config, body.task, body.layout(kind))
    assert costs.full is not None
    assert not costs.full.rough
    found = peak(body, seat, kind)
    assert found <= expected(costs, seat) <= 1.3 * found


def test_a_prediction_counts_tiles_of_codes() -> None:
    body = backbone("bert-cls", DEPTH)
    body.config.max_position_embeddings = LENGTH
    kind, how = Lora(rank=2), Quantize("nf4", Lora(rank=2))
    quantize_maps(body.model, quantizable(body.model, body.blocks_path, kind), "nf4")
    narrow = Backbone(body.model, task=body.task)
    costs = costs_of(body.config, body.task, body.layout(kind), how)
    plain = costs_of(body.config, body.task, body.layout(kind))
    assert costs.single is not None
    assert plain.single is not None
    assert not costs.single.rough
    assert costs.single.blocks[0].work > plain.single.blocks[0].work
    assert peak(narrow, U, kind) == pytest.approx(expected(costs, U), rel=0.15)


def test_images_are_tried_too() -> None:
    body = backbone("vit", 2)
    costs = costs_of(body.config, task_of(body.model), body.layout(Lora(rank=2)))
    assert costs.full is not None
    assert not costs.full.rough
    assert costs.full.rows == ROWS
    assert costs.full.blocks[0].kept > costs.full.message


def test_a_family_that_cannot_be_tried_gets_a_rough_formula(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = hf.MixtralConfig(
        **sizes, vocab_size=V, num_attention_heads=2, num_key_value_heads=1, num_local_experts=4
    )
    with caplog.at_level(logging.ERROR):
        costs = costs_of(config, "causal-lm", {})
    assert costs.full is not None
    assert costs.full.rough
    assert costs.full.blocks[0].kept == 20 * costs.full.message
    assert not caplog.records
