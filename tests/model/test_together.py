"""Rows of several members in one forward: what each gets is what it gets alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from toys import FAMILIES, backbone, batches_for

from flexp.dice import Dice
from flexp.model.adapter import Lora
from flexp.model.backbone import Backbone
from flexp.model.dress import dropping
from flexp.model.joint import Member
from flexp.model.together import Together
from flexp.model.worn import Worn, read

CUTS = ((1, 3), (2, 4), (0, 2), (3, 4))
SHORT = 4  # tokens of every other member


def adapter(body: Backbone, seed: int, rank: int) -> dict[str, Tensor]:
    """Random everywhere."""
    stream = Dice(seed)("adapter")
    start = body.initial(Lora(rank=rank), Dice(0))
    return {
        k: (v + 0.2 * torch.randn(v.shape, generator=stream("tensor", name=k).generator())).to(
            body.dtype
        )
        for k, v in start.items()
    }


def fed(body: Backbone, n: int) -> tuple[dict[str, tuple[int, ...]], Tensor | None, Tensor]:
    """Shapes, mask and a hidden state of one member; they differ in rows and length."""
    inputs = dict(batches_for(body, 1)[0].inputs)
    rows = 1 + n % 2
    inputs = {k: v[:rows] for k, v in inputs.items()}
    if n % 2 and "attention_mask" in inputs:
        inputs = {k: v[:, :SHORT] for k, v in inputs.items()}
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    with torch.no_grad():
        hidden = body.run(inputs, last=0)
    generator = Dice(n)("feed").generator()
    hidden = torch.randn(hidden.shape, generator=generator).to(hidden)
    return {k: tuple(v.shape) for k, v in inputs.items()}, inputs.get("attention_mask"), hidden


def results(
    outs: list[Tensor], feeds: list[Tensor], worn: Sequence[Mapping[str, Tensor]]
) -> list[Tensor]:
    """What comes out, and the gradients of its squares by what went in."""
    leaves = [*feeds, *(v for one in worn for v in one.values())]
    total = torch.stack([out.square().sum() for out in outs]).sum()
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    both = zip(leaves, cast("tuple[Tensor | None, ...]", grads), strict=True)
    return [
        *(out.detach() for out in outs),
        *(torch.zeros_like(v) if g is None else g for v, g in both),
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_joint_rows_get_what_each_gets_alone(family: str) -> None:
    """Other cuts, lengths, ranks and dropout for each; hidden states and all gradients."""
    body = backbone(family)
    body.model.double()  # so that an order of sums does not hide anything
    body.dtype = torch.float64
    together = Together(body)
    assert together.possible
    shapes, masks, feeds = zip(*(fed(body, n) for n in range(len(CUTS))), strict=True)
    feeds = [feed.requires_grad_() for feed in feeds]
    adapters = [adapter(body, n, rank=2 + n % 3) for n in range(len(CUTS))]
    for held in adapters:
        for value in held.values():
            value.requires_grad_()
    worn = [
        dropping(read(held, 8.0), 0.2 if n == 1 else 0.0, Dice(n)("drop"))
        for n, held in enumerate(adapters)
    ]
    members = [Member(*cut, feed, one) for cut, feed, one in zip(CUTS, feeds, worn, strict=True)]
    joint = together.run(members, shapes, masks)
    alone = [
        body.run(body.blanks(shape, mask), m.worn, first=m.first, last=m.last, feed=m.feed)
        for m, shape, mask in zip(members, shapes, masks, strict=True)
    ]
    found, wanted = results(joint, feeds, adapters), results(alone, feeds, adapters)
    largest = max(float(each.detach().abs().max()) for each in wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert float((one - other).abs().max()) <= 1e-12 * largest


def test_who_wears_nothing_rides_along() -> None:
    body = backbone()
    together = Together(body)
    shapes, masks, feeds = zip(*(fed(body, n) for n in range(2)), strict=True)
    worn = [Worn(), read(adapter(body, 1, 3), 8.0)]
    members = [Member(1, 3, feed, one) for feed, one in zip(feeds, worn, strict=True)]
    with torch.no_grad():
        joint = together.run(members, shapes, masks)
        for n, member in enumerate(members):
            blanks = body.blanks(shapes[n], masks[n])
            alone = body.run(blanks, member.worn, first=1, last=3, feed=member.feed)
            assert torch.allclose(joint[n], alone, atol=1e-5)
            plain = body.run(blanks, first=1, last=3, feed=member.feed)
            assert torch.allclose(joint[n], plain, atol=1e-5) == (n == 0)


def test_a_model_that_lets_rows_meet_is_not_run_jointly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof at first use finds out, and nothing is computed together."""
    body = backbone()
    station: Any = body.model.get_submodule(f"{body.blocks_path}.1").forward
    plain = station.forward

    def meets(hidden: Tensor, *args: object, **kwargs: object) -> object:
        return plain(hidden + hidden.mean(dim=0, keepdim=True), *args, **kwargs)

    monkeypatch.setattr(station, "forward", meets)
    assert not Together(body).possible
    monkeypatch.undo()
    assert Together(body).possible
