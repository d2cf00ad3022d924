"""How the gate of DDOME learns beside experts, in parts and over any link."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from mail import posting
from strategies.test_ddome import KIND, opened, sure
from strategies.test_ddome_routes import EXTRA, ended
from torch import Tensor
from toys import H, at_desk, backbone, gap, same

from flexp.dice import Dice
from flexp.model.cut import Cut, Seat
from flexp.model.ops import Optim
from flexp.parcel import Parcel
from flexp.strategies.ddome import Ddome
from flexp.strategies.experts import joint_loss
from flexp.strategies.gating import Gate, Lesson
from flexp.tensors import Tensors


def test_a_gate_steps_along_all_parts_and_not_along_what_is_no_number() -> None:
    gate = sure(0, 2)
    begun = dict(gate.layers)
    lesson = Lesson(gate, Optim("sgd", lr=0.5))
    for slope in (1.0, 3.0):
        leaves = lesson.leaves()
        descend(*(slope * leaf.sum() for leaf in leaves.values()))
    lesson.leaves()  # nobody asked it
    lesson.step()
    assert all(torch.equal(v, begun[k] - 2.0) for k, v in gate.layers.items())
    descend((lesson.leaves()["gate/0/bias"] * math.nan).sum())
    lesson.step()
    assert all(torch.equal(v, begun[k] - 2.0) for k, v in gate.layers.items())


def descend(*losses: Tensor) -> None:
    torch.stack(losses).sum().backward()  # pyright: ignore[reportUnknownMemberType]


def test_batches_in_parts_teach_the_same_gate() -> None:
    states = [ended(EXTRA, 1, parts=parts).state for parts in (1, 2)]
    found = [state.gate["gate/0/weight"] for state in states]
    assert torch.allclose(*found, atol=1e-5)
    begun = Gate({}, Dice(states[0].seed)("gate"), 0, 2).begun(H)["gate/0/weight"]
    assert float((found[0] - begun).abs().max()) > 5e-3  # half of a step


@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "ahead"])
def test_a_gate_learns_the_same_over_a_link_that_posts(ahead: bool) -> None:
    one, other = (taught(ahead, posts=posts) for posts in (False, True))
    assert same(one, other)


def taught(ahead: bool, *, posts: bool) -> Tensors:
    """The gate and an expert after a turn in three parts, of which two may be under way."""
    slots, offer = opened(2)
    seat = Seat(Cut(1, 1), accumulate=3)
    with at_desk(backbone(), seat, kind=KIND, slots=slots, offer=offer) as (desk, _):
        desk.training = replace(desk.training, steps=3, ahead=ahead)
        with posting(desk) if posts else nullcontext():
            reply = Ddome(2, anchors=("me",)).train(desk, Parcel(facts={"seed": 0}))
        return {**reply.tensors, **desk.whole("expert/1")}


def test_tokens_of_a_text_are_learned_by_the_mixture() -> None:
    slots, offer = opened(2, "llama")
    gate, seat = Gate({}, Dice(0), 0, 2), Seat(Cut(1))
    there = at_desk(backbone("llama"), seat, kind=KIND, slots=slots, offer=offer)
    with there as (desk, _), torch.no_grad():
        batch = next(desk.batches(steps=1))
        shares = gate.says(desk.model, batch).softmax(1)
        found = joint_loss([0, 1], Lesson(gate, Optim("sgd")), None, 1.0)(desk.model, batch)
        parts = [desk.model.logits(batch, slot)[:, :-1].softmax(-1) for slot in slots]
    both = shares[:, 0, None, None] * parts[0] + shares[:, 1, None, None] * parts[1]
    wanted = batch.labels[:, 1:]
    told = both.gather(2, wanted.clamp(0)[..., None])[..., 0][wanted != -100]
    assert float(found) == pytest.approx(-float(told.log().mean()), abs=1e-5)
    assert gap({"": parts[0]}, {"": parts[1]}) > 1e-3
