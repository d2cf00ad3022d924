"""A chunked loss trains like the plain one, on every seat, and only where logits are a product."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from agreement import agree, trained
from toys import backbone, batches_for, cuts

from flexp.model.backbone import Backbone


def tapped(family: str) -> Backbone:
    made = backbone(family)
    return Backbone(made.model, task="causal-lm", fast=True)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_u_cut_is_the_whole_bit_for_bit(family: str) -> None:
    body = tapped(family)
    assert body.output is not None
    known = {}
    for seat in cuts(body.depth):
        agree(body, seat, known=known)


def test_its_gradient_is_the_plain_one() -> None:
    body = tapped("llama")
    seat = cuts(body.depth)[0]
    batches = batches_for(body, 10)
    _, mine, _ = trained(body, seat, batches=batches)
    body.output = None
    _, first, _ = trained(body, seat, batches=batches)
    for name, value in first.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=1e-7)


def test_logits_that_are_more_than_a_product_stay_plain() -> None:
    model: Any = backbone("llama").model
    output = model.get_output_embeddings()
    model.register_forward_hook(lambda _m, _a, out: type(out)(logits=out.logits / 2))
    before = output.forward
    body = Backbone(model, task="causal-lm", fast=True)
    assert body.output is None
    assert output.forward == before
