"""Split = monolith for one model and seat: outputs, gradients, and parameters after ten steps."""

from __future__ import annotations

import torch
from torch import Tensor
from toys import at_desk, batches_for, same, toy_task, whole

from flexp.data.examples import Batch
from flexp.model.adapter import Kind
from flexp.model.backbone import Backbone
from flexp.model.cut import Seat
from flexp.tensors import Tensors

Known = dict[str, tuple[Tensor, Tensors, Tensors]]


def trained(
    body: Backbone,
    seat: Seat,
    *,
    side: str = "right",
    kind: Kind | None = None,
    batches: list[Batch] | None = None,
) -> tuple[Tensor, Tensors, Tensors]:
    """Logits before, the gradient of the first step, and the adapter after ten clipped steps."""
    task, batches = toy_task(body, side), batches or batches_for(body, 10, side)
    with at_desk(body, seat, kind=kind, task=task) as (desk, _):
        with torch.no_grad():
            logits = desk.model.logits(batches[0])
        desk.grad(desk.model.loss(batches[0]), ["personal"], ["first"])
        first = desk.whole("first")
        facts = desk.fit(batches=iter(batches), clip_norm=0.05)
        assert facts["skipped"] == 0
        return logits, first, desk.whole("personal")


def agree(
    body: Backbone,
    seat: Seat,
    side: str = "right",
    known: Known | None = None,
    batches: list[Batch] | None = None,
) -> None:
    logits, first, after = trained(body, seat, side=side, batches=batches)
    known = {} if known is None else known
    if side not in known:
        known[side] = trained(body, whole(body.depth), side=side, batches=batches)
    logits_w, first_w, after_w = known[side]
    assert torch.equal(logits, logits_w), "outputs"
    assert same(first, first_w), "gradients"
    assert same(after, after_w), "parameters"
    reached = [bool(g.any()) for k, g in first.items() if "lora_A" not in k]  # B is 0, so A waits
    assert sum(reached) >= 0.9 * len(reached), "gradients"
