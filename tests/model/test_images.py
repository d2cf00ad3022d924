"""Models of images: hidden states of other shapes from block to block, and weights of a seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from agreement import trained
from toys import CONVOLUTIONS, at_desk, backbone, batches_for, cuts, same, whole

from flexp.data.examples import Batch
from flexp.errors import AdapterError, LinkError, ModelError
from flexp.model.adapter import Dense, Lora
from flexp.model.backbone import Backbone
from flexp.model.cut import Cut, Labels, Seat
from flexp.model.quantize import Quantize
from flexp.model.skeleton import image_shape
from flexp.model.targets import EVERY
from flexp.model.together import Together
from flexp.selection import Where
from flexp.tensors import Tensors

FULL = Dense((EVERY,))
FORMS: tuple[Labels, ...] = ("keep", "logits", "loss")


@pytest.mark.parametrize("family", [*CONVOLUTIONS, "vit"])
def test_all_of_its_blocks_train_at_every_cut_like_the_whole(family: str) -> None:
    body = backbone(family, 3)
    logits_w, first_w, after_w = trained(body, whole(body.depth), kind=FULL)
    assert all(bool(g.any()) for g in first_w.values())
    for seat in (seat for form in FORMS for seat in cuts(body.depth, form)):
        logits, first, after = trained(body, seat, kind=FULL)
        assert torch.equal(logits, logits_w), seat
        assert same(first, first_w), seat
        assert same(after, after_w), seat


@pytest.mark.parametrize("family", [*CONVOLUTIONS, "vit"])
def test_the_gradient_of_a_pixel_comes_back_through_the_trunk(family: str) -> None:
    """Also where nothing near trains: what is added to an image can be learned."""
    body = backbone(family, 3)
    batch = batches_for(body, 1)[0]
    found: list[torch.Tensor] = []
    for seat in (whole(body.depth), Seat(Cut(1, 1))):
        frame = torch.zeros(image_shape(body.config), requires_grad=True)
        framed = Batch({"pixel_values": batch.inputs["pixel_values"] + frame}, batch.labels)
        with at_desk(body, seat, kind=FULL) as (desk, _), desk.model.training({}, None):
            desk.model.loss(framed).backward()
        assert frame.grad is not None
        found.append(frame.grad)
    assert found[0].any()
    assert torch.equal(*found)


@pytest.mark.parametrize("family", CONVOLUTIONS)
def test_hidden_states_of_other_shapes_are_not_computed_jointly(family: str) -> None:
    assert not Together(backbone(family)).possible


def test_a_hidden_state_that_is_not_of_the_cut_is_refused() -> None:
    body = backbone("resnet", 3)
    with at_desk(body, Seat(Cut(1, 1))) as (desk, _):
        plain = body.run
        body.run = lambda inputs, *a, **k: plain(inputs, *a, **k)[:, :4]  # type: ignore[method-assign]
        try:
            with torch.no_grad(), pytest.raises(LinkError, match=r"\[8, 16, 16\] a row"):
                desk.model.logits(batches_for(body, 1)[0])
        finally:
            body.run = plain  # type: ignore[method-assign]


def test_lora_needs_linear_maps() -> None:
    with pytest.raises(AdapterError, match="dense"):
        backbone("resnet").layout(Lora(head=False))


@pytest.mark.parametrize("seat", [Seat(Cut(2)), Seat(Cut(2), "loss"), whole(3)])
@pytest.mark.parametrize("family", ["cnn", "resnet", "vit"])
def test_images_cross_a_front_that_stays_still_once(family: str, seat: Seat) -> None:
    """Later epochs train the same bits, and the first block has computed each row once."""
    body, found = backbone(family, 3), list[Tensors]()
    batches = batches_for(body, 2)
    station: Any = body.model.get_submodule(f"{body.blocks_path}.0").forward
    inner, seen = station.forward, list[int]()

    def noted(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(hidden))
        return inner(hidden, *args, **kwargs)

    station.forward = noted
    try:
        for cache in (0, 1 << 20):
            seen.clear()
            with at_desk(body, seat, kind=FULL, cache=cache) as (desk, _):
                desk.fit(batches=iter(batches * 3), train=Where(part="head"))
                found.append(desk.whole("personal"))
        assert sum(seen) == sum(batch.rows for batch in batches)
    finally:
        station.forward = inner
    assert same(*found)


# ---- without a checkpoint


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    """A folder with a config alone."""
    config: dict[str, Any] = {
        "model_type": "flexp-blocks",
        "drawn": True,
        "residual": True,
        "channels": [8, 16],
        "image_size": 16,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def opened(folder: Path, **more: Any) -> Backbone:
    return Backbone.open(folder, task="images", classes=3, **more)


def test_weights_are_drawn_from_the_seed_on_both_sides(drawn: Path) -> None:
    body, inputs = opened(drawn, seed=5), {}
    inputs = batches_for(body, 1)[0].inputs
    near, far = (
        opened(drawn, seed=5, blocks=frozenset({0, 2})),
        opened(drawn, seed=5, blocks=frozenset({1}), outside=False),
    )
    blank = far.blanks({k: tuple(v.shape) for k, v in inputs.items()}, None)
    middle = far.run(blank, first=1, last=2, feed=near.run(inputs, last=1))
    assert torch.equal(near.run(inputs, first=2, feed=middle), body.run(inputs))
    assert not torch.equal(opened(drawn, seed=6).run(inputs), body.run(inputs))
    assert body.head == ("head",)


def test_what_is_drawn_keeps_the_size_of_what_comes_in(drawn: Path) -> None:
    body = opened(drawn)
    weights = [p for p in body.model.parameters() if p.dim() > 1]
    for weight in weights:
        assert weight.square().sum() / len(weight) == pytest.approx(1.0, rel=0.5)


def test_drawn_weights_are_no_codes(drawn: Path) -> None:
    with pytest.raises(ModelError, match="quantize to none"):
        opened(drawn, quantize=Quantize("int8", FULL))
