"""pFedPT, once by hand and by the oracles of its specification."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from strategies.bowls import Bench, flat
from strategies.pictures import Pictures, seen
from strategies.prices import SEATS, SGD, STEPS, body, sizer
from toys import LENGTH, H, at_desk, backbone, examples, play, same, whole

from flexp.client.desk import Desk, Training
from flexp.data.examples import Batch, Shard
from flexp.dice import Dice
from flexp.model.adapter import Lora, Prompt
from flexp.model.cut import Cut, Seat
from flexp.model.ops import Optim
from flexp.model.prompts import BOTTOM, LEFT, RIGHT, TOP, framed
from flexp.parcel import Parcel
from flexp.selection import ALL, FAR, NEAR
from flexp.strategies import build
from flexp.strategies.base import Setting
from flexp.strategies.fedavg import FedAvg
from flexp.strategies.pfedpt import WORN, PFedPt

PLAIN: dict[str, Any] = {"prompt_lr": 0.5, "prompt_momentum": 0.0}


def test_pfedpt_trains_the_prompt_and_then_the_model_under_it() -> None:
    # On the bench a prompt is added to the model's numbers. First a's goes half of the way from 0,
    # to (4, 8, 16), b's to (8, 4, -8); then the model half of what is left: (2, 4, 8), (4, 2, -4).
    # In the mean (2 + 12) / 4 = 3.5, (4 + 6) / 4 = 2.5, (8 - 12) / 4 = -1.
    bench = Bench(build("pfedpt", PLAIN))
    bench.round()
    assert flat(bench.state) == (3.5, 2.5, -1)
    assert flat(bench.kept["a"]["prompt"]) == (4, 8, 16)
    # a is at 7.5 of 8, so its prompt goes to 4.25, and the model from 3.5 to 3.625.
    bench.round()
    assert flat(bench.kept["a"]["prompt"])[0] == 4.25
    assert bench.trained("a")[0] == 3.625


def test_rates_of_the_prompt_fade_step_by_step() -> None:
    # Steps of 1/2 and 1/4 of the way: from 0 to 4, and then to 5 of 8.
    bench = Bench(build("pfedpt", {**PLAIN, "fade": 0.5}), steps=2)
    bench.round()
    assert flat(bench.kept["a"]["prompt"])[0] == 5


# ---- oracles


@pytest.mark.parametrize(("family", "form"), [("bert-cls", "added"), ("vit", "frame")])
def test_without_a_prompt_it_is_fedavg(family: str, form: Any) -> None:
    still = PFedPt(form=form, spread=0.0, prompt_steps=0)
    fedavg = play(FedAvg(), SEATS, **seen(family)).state
    assert same(play(still, SEATS, **seen(family)).state, fedavg)
    for moved in (replace(still, spread=0.1), replace(still, prompt_steps=1)):
        assert not same(play(moved, SEATS, **seen(family)).state, fedavg)


@pytest.mark.parametrize("seat", [Seat(Cut(1, 1)), whole(4)], ids=["cut", "whole"])
def test_first_the_model_stands_still_and_then_the_prompt(
    seat: Seat, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, fit = PFedPt(tokens=2), Desk.fit
    found = list[tuple[bool, bool]]()

    def watched(desk: Desk, *args: Any, **more: Any) -> Any:
        before = desk.whole("personal"), desk.whole("prompt")
        out = fit(desk, *args, **more)
        found.append(
            (same(before[0], desk.whole("personal")), same(before[1], desk.whole("prompt")))
        )
        return out

    monkeypatch.setattr(Desk, "fit", watched)
    with at_desk(backbone(), seat, slots=dict(method.specs())) as (desk, _):
        frozen = {k: v.clone() for k, v in desk.model.backbone.model.state_dict().items()}
        method.train(desk, Parcel())
        now = desk.model.backbone.model.state_dict()
        assert all(torch.equal(v, now[k]) for k, v in frozen.items())
    assert found == [(True, False), (False, True)]


def test_a_frame_leaves_the_middle_of_a_picture_alone() -> None:
    method, picture = PFedPt(form="frame"), backbone("vit")
    with at_desk(picture, whole(4), slots=dict(method.specs())) as (desk, _):
        frame, pixels = desk.whole("prompt"), torch.randn(2, 3, 16, 16)
    found = framed(pixels, frame)
    assert torch.equal(found[..., 2:14, 2:14], pixels[..., 2:14, 2:14])
    assert not torch.equal(found, pixels)
    assert sum(v.numel() for v in frame.values()) == 3 * (2 * 2 * 16 + 2 * 2 * 12)


@pytest.mark.parametrize(("family", "form"), [("bert-cls", "front"), ("vit", "frame")])
def test_no_prompt_is_ever_on_the_wire(family: str, form: Any) -> None:
    found = play(PFedPt(form=form, tokens=2), SEATS, keep_crossings=True, **seen(family))
    for arrival in found.arrivals:
        assert arrival.failure is None
        names = [c.name for c in arrival.ledger.crossings or ()]
        assert any(name.startswith("slot/personal/") for name in names)
        assert not any("prompt" in name or "frame" in name for name in names)


@pytest.mark.slow
def test_who_wears_anothers_prompt_is_worse_off() -> None:
    # Both have the same rows, but labels that contradict: only the prompt can say whose they are.
    rows = examples(5, 12)
    turned = replace(rows, labels=tuple((int(str(y)) + 1) % 3 for y in rows.labels))
    shards = {"a": Shard(rows), "b": Shard(turned)}
    method = PFedPt(form="behind", tokens=4, prompt_lr=0.5)
    training = Training(Optim(lr=2e-2), batch=12, steps=15)
    end = play(method, whole(4), shards=shards, rounds=8, training=training)
    right = dict[tuple[str, str], float]()
    for owner in shards:
        kept = end.engine.memories[owner].slots["slot/prompt"]
        offer = Parcel({"personal": end.state, "prompt": kept})
        with at_desk(body(), whole(4), slots=dict(method.specs()), offer=offer) as (desk, _):
            for client, held in shards.items():
                batch = desk.task.collate(held.train, range(12))
                logits = desk.model.logits(batch, WORN)
                right[client, owner] = float((logits.argmax(-1) == batch.labels).float().mean())
    assert right["a", "a"] > right["a", "b"] + 0.2
    assert right["b", "b"] > right["b", "a"] + 0.2


@pytest.mark.parametrize("seat", [Seat(Cut(1, 1)), whole(4)], ids=["cut", "whole"])
def test_the_slope_of_a_frame_is_the_sum_of_those_of_the_pixels_at_the_border(seat: Seat) -> None:
    method, data = PFedPt(form="frame"), examples(1, 4)
    batch = Pictures().collate(data, range(4))
    with at_desk(backbone("vit"), seat, slots=dict(method.specs())) as (desk, _):
        desk.grad(desk.model.loss(batch, WORN), ["prompt"], ["slope"])
        slope, frame = desk.whole("slope"), desk.whole("prompt")
        pixels = framed(batch.inputs["pixel_values"], frame).requires_grad_()
        with desk.model.training({}, None):
            desk.model.loss(Batch({"pixel_values": pixels}, batch.labels), "personal").backward()
    assert pixels.grad is not None
    total = pixels.grad.sum(0)
    assert torch.allclose(slope[TOP], total[:, :2], atol=1e-7)
    assert torch.allclose(slope[BOTTOM], total[:, 14:], atol=1e-7)
    assert torch.allclose(slope[LEFT], total[:, 2:14, :2], atol=1e-7)
    assert torch.allclose(slope[RIGHT], total[:, 2:14, 14:], atol=1e-7)


# ---- what is shared, refused, and what it costs


def test_the_trunk_may_be_all_that_is_shared() -> None:
    method = PFedPt(tokens=2, share="trunk")
    found = play(method, SEATS, keep_crossings=True)
    for arrival in found.arrivals:
        assert not any(c.name.startswith("slot/") for c in arrival.ledger.crossings or ())
        seat = SEATS[int(arrival.client[1])]
        assert arrival.reply is not None
        assert {body().place(k, seat).side for k in arrival.reply.adapters["personal"]} <= {"far"}
    assert (method.given(), PFedPt().given()) == (FAR, ALL)
    assert method.owns().words() != PFedPt().owns().words()


def test_pfedpt_refuses_forms_that_are_for_other_inputs() -> None:
    text = Setting("classification", Lora(), {"a": whole(4)}, 4, head=True)
    pictures = replace(text, task="images")
    assert PFedPt().refuses(text) == PFedPt(form="added").refuses(text) == ""
    assert PFedPt(form="frame").refuses(pictures) == PFedPt(form="behind").refuses(pictures) == ""
    assert "Set strategy.form=front" in PFedPt(form="frame").refuses(text)
    assert "Set strategy.form=frame" in PFedPt().refuses(pictures)
    assert "another than prompt" in PFedPt().refuses(replace(text, adapter=Prompt()))
    ranks = {"a": Seat(Cut(1), rank=2), "b": Seat(Cut(1))}
    assert "Remove plan.ranks" in PFedPt().refuses(replace(text, seats=ranks))


@pytest.mark.parametrize(("form", "tokens"), [("added", 2), ("front", 2), ("behind", 3)])
def test_a_round_of_pfedpt_costs_what_the_formula_says(form: Any, tokens: int) -> None:
    # The model each way, never the prompt. Both phases are steps of 4 S, in the first one although
    # nothing of the front trains; prompts that are not added make a text longer.
    method = PFedPt(form=form, tokens=tokens)
    arrivals = play(method, SEATS, rounds=2, training=SGD, body=body()).arrivals
    begun = body().initial(Lora(3, 6.0), Dice(0)("initial"))
    length = LENGTH + (0 if form == "added" else tokens)
    s, mask = 4 * length * H * 4, 4 * length * 8
    for arrival in arrivals:
        assert arrival.failure is None
        seat = SEATS[int(arrival.client[1])]
        near, steps = sizer(begun, seat)(NEAR), 0 if seat == whole(4) else 2 * STEPS
        assert (arrival.ledger.sent, arrival.ledger.received) == (
            steps * (2 * s + mask) + near,
            steps * 2 * s + near,
        ), arrival.client
