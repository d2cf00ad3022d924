"""Prompts at every place, and frames: what they do, and that a cut is not seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from agreement import trained
from toys import LENGTH, H, at_desk, backbone, batches_for, cuts, same, whole

from flexp.client.speech import Conversation
from flexp.errors import AdapterError, CutError, ModelError
from flexp.model.adapter import Lora
from flexp.model.cut import Cut, Seat
from flexp.model.ops import SlotSpec
from flexp.model.prompts import (
    AT_CUT,
    BEHIND,
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    Frame,
    Prompt,
    framed,
    put_in,
    spread_out,
    taken_out,
    widened,
)
from flexp.parcel import Parcel
from flexp.selection import ALL
from flexp.tensors import Term


@pytest.mark.parametrize(
    ("family", "at"),
    [
        ("bert-cls", "added"),
        ("llama", "added"),
        ("gpt2-cls", "added"),  # which looks for the end of a text among its ids
        ("bert-cls", "behind"),
        ("llama", "behind"),
        ("vit", "behind"),
        ("vit", "frame"),
        ("cnn", "frame"),
    ],
)
@pytest.mark.daily("bert-cls-added", "llama-added", "llama-behind", "cnn-frame")
def test_what_is_learned_at_the_input_learns_the_same_at_every_cut(family: str, at: Any) -> None:
    body = backbone(family, 3)
    kind = Frame(spread=0.1) if at == "frame" else Prompt(2, at=at)
    logits_w, first_w, after_w = trained(body, whole(body.depth), kind=kind)
    assert all(bool(g.any()) for g in first_w.values())
    forms = ("keep", "logits") if body.task == "causal-lm" else ("keep", "logits", "loss")
    for seat in (seat for form in forms for seat in cuts(body.depth, form)):
        logits, first, after = trained(body, seat, kind=kind)
        assert torch.equal(logits, logits_w), seat
        assert same(first, first_w), seat
        assert same(after, after_w), seat


@pytest.mark.parametrize("family", ["bert-cls", "llama", "gpt2-cls", "vit"])
def test_a_prompt_at_the_cut_is_one_of_the_servers_first_block(family: str) -> None:
    """The back and the labels may be anywhere: what counts is the block that it joins."""
    body, kind = backbone(family, 4), Prompt(2, at="cut")
    seats = [Seat(Cut(1)), Seat(Cut(1, 1)), Seat(Cut(1, 2)), Seat(Cut(1), "logits")]
    logits_w, first_w, after_w = trained(body, seats[0], kind=kind)
    assert bool(first_w[AT_CUT].any())
    for seat in (*seats[1:], Seat(Cut(1), "loss")):
        logits, first, after = trained(body, seat, kind=kind)
        assert torch.equal(logits, logits_w), seat
        assert same(first, first_w), seat
        assert same(after, after_w), seat
    (batch,) = batches_for(body, 1)
    inputs = dict(batch.inputs)
    with torch.no_grad(), at_desk(body, seats[1], kind=kind) as (desk, _):
        prompt = desk.whole("personal")[AT_CUT]
        front = body.run(inputs, last=1)
        shapes = {k: tuple(v.shape) for k, v in inputs.items()}
        blanks = body.blanks(*widened(shapes, inputs.get("attention_mask"), 2))
        plain = body.run(blanks, first=1, feed=put_in(front, prompt))
        plain = taken_out(plain, 2) if plain.dim() == 3 else plain
        assert torch.equal(desk.model.logits(batch), plain)
        assert not torch.equal(plain, body.run(inputs))


def test_a_prompt_at_the_cut_costs_no_gradient_back_to_the_client() -> None:
    body = backbone()
    size = 4 * H * 4  # of a position of four rows
    places: dict[Any, int] = {"behind": 2, "cut": 0}
    for at, wide in places.items():
        with at_desk(body, Seat(Cut(1, 1)), kind=Prompt(2, at=at)) as (desk, ledger):
            desk.fit(steps=1)
            got = ledger.received
        up, down = (LENGTH + wide) * size, (LENGTH + 2) * size
        assert got == (down + up if at == "behind" else down), at


def test_a_prompt_at_the_cut_needs_a_block_at_the_server() -> None:
    kind = Prompt(2, at="cut")
    for seat in (whole(4), Seat(Cut(2, 2)), Seat(Cut(4), "logits")):
        with (
            pytest.raises(CutError, match="needs a block at the server"),
            at_desk(backbone(), seat, kind=kind) as (desk, _),
        ):
            desk.fit(steps=1)


# ---- what they are


def test_rows_are_put_in_behind_the_first_and_taken_out_again() -> None:
    hidden, prompt = torch.arange(12.0).reshape(2, 3, 2), -torch.ones(2, 2)
    wide = put_in(hidden, prompt)
    assert wide[:, :, 0].tolist() == [[0, -1, -1, 2, 4], [6, -1, -1, 8, 10]]
    assert torch.equal(taken_out(wide, 2), hidden)
    mask = torch.tensor([[1, 1, 0]])
    shapes, longer = widened({"input_ids": (1, 3), "pixel_values": (1, 3, 8, 8)}, mask, 2)
    assert shapes == {"input_ids": (1, 5), "pixel_values": (1, 3, 8, 8)}
    assert longer is not None
    assert longer.tolist() == [[1, 1, 1, 1, 0]]


def test_an_added_prompt_is_for_the_first_tokens_that_are_no_padding() -> None:
    prompt, mask = torch.tensor([[1.0], [2.0]]), torch.tensor([[0, 1, 1, 1], [1, 0, 0, 0]])
    found = spread_out(prompt, mask, torch.float32)[..., 0]
    assert found.tolist() == [[0, 1, 2, 0], [1, 0, 0, 0]]


def test_a_frame_is_added_at_the_border() -> None:
    layout = backbone("vit").layout(Frame(width=2))
    assert layout[TOP] == layout[BOTTOM] == (3, 2, 16)
    assert layout[LEFT] == layout[RIGHT] == (3, 12, 2)
    assert sum(v[0] * v[1] * v[2] for v in layout.values()) == 3 * (2 * 2 * 16 + 2 * 2 * 12)
    frame = {k: torch.full(v, float(n + 1)) for n, (k, v) in enumerate(sorted(layout.items()))}
    added = framed(torch.zeros(1, 3, 16, 16), frame)[0, 0]
    assert added[0, 0] == added[1, 15] == frame[TOP].max()
    assert added[14, 0] == added[15, 15] == frame[BOTTOM].max()
    assert added[2, 0] == added[13, 1] == frame[LEFT].max()
    assert added[2, 14] == added[13, 15] == frame[RIGHT].max()
    assert not added[2:14, 2:14].any()
    gray = framed(torch.zeros(1, 3, 16, 16), {k: v[:1] for k, v in frame.items()})
    assert torch.equal(gray[0, 2], added)
    assert backbone("vit").layout(Frame(width=2, gray=True))[TOP] == (1, 2, 16)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("vit", Prompt(2)),
        ("cnn", Prompt(2, at="behind")),
        ("bert-cls", Frame()),
        ("vit", Frame(width=8)),
    ],
)
def test_what_has_no_place_in_a_model_is_refused(family: str, kind: Any) -> None:
    with pytest.raises(AdapterError, match=r"needs a model|for pictures|does not fit"):
        backbone(family).layout(kind)


def test_a_conversation_has_no_other_prompt_than_one_in_front() -> None:
    with (
        at_desk(backbone("llama"), Seat(Cut(1, 1)), kind=Prompt(2, at="behind")) as (desk, _),
        pytest.raises(ModelError, match="no other"),
    ):
        Conversation(desk)


# ---- beside a LoRA adapter


@pytest.mark.parametrize("seat", [Seat(Cut(1, 1)), Seat(Cut(1), "loss"), whole(4)])
def test_a_prompt_is_worn_beside_an_adapter(seat: Seat) -> None:
    slots = {"x": SlotSpec(), "y": SlotSpec(Prompt(2, head=False, at="behind"))}
    wear = (Term("x"), Term("y"))
    with at_desk(backbone(), seat, slots=slots) as (desk, _):
        before = {**desk.whole("x"), **desk.whole("y")}
        desk.fit(wear=wear, train={"y": ALL}, steps=1)
        middle = desk.whole(wear)
        desk.fit(wear=wear, train={"x": ALL}, steps=2)
        after = desk.whole(wear)
    assert before.keys() == middle.keys() == after.keys()
    assert {k for k in before if not torch.equal(before[k], middle[k])} == {BEHIND}
    moved = {k for k in before if not torch.equal(middle[k], after[k])}
    assert moved == before.keys() - {BEHIND}


def test_adapters_that_share_some_tensors_only_are_no_mix() -> None:
    slots = {"x": SlotSpec(), "y": SlotSpec(Lora(3, targets=("query",)))}
    with (
        at_desk(backbone(), whole(4), slots=slots) as (desk, _),
        pytest.raises(AdapterError, match="do not hold the same tensors"),
    ):
        desk.model.logits(batches_for(backbone(), 1)[0], (Term("x"), Term("y")))


def test_a_prompt_of_zeros_that_is_added_changes_nothing() -> None:
    body = backbone()
    (batch,) = batches_for(body, 1)
    zero = Parcel({"personal": {"prompt_added": torch.zeros(2, H)}})
    with at_desk(body, Seat(Cut(1, 1)), kind=Prompt(2, head=False, at="added"), offer=zero) as (
        desk,
        _,
    ):
        assert torch.equal(desk.model.logits(batch), body.run(batch.inputs))
