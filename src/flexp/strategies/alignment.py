"""Alignment: part of the way to a shared adapter, and terms of a client's own loss.

Forms B and C of FlexP-SFL are ours. Both compare what the model does in two wears on the client's
own rows: "personal", and "reference", the slot of what everybody knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from torch import Tensor

from flexp.client.desk import Desk
from flexp.client.fit import together
from flexp.client.parts import LossFn
from flexp.data.examples import Batch
from flexp.data.loss import apart, distillation
from flexp.model.personal import PersonalModel
from flexp.parcel import Facts
from flexp.selection import Where
from flexp.tensors import Term


def approach(desk: Desk, to: str, share: float, where: Where) -> None:
    """Moves what is selected of slot "personal" part of the way to another; all of it for 1."""
    desk.assign("personal", (Term("personal", 1 - share), Term(to, share)), where=where)


def approaching(desk: Desk, to: str, shares: Sequence[float], where: Where) -> Facts:
    """Trains a turn's batches in equal parts; before each, so much of the way to a slot is gone."""
    batches, steps, count, done = desk.batches(), desk.steps, len(shares), list[Facts]()
    for n, share in enumerate(shares):
        if share:
            approach(desk, to, share, where)
        size = steps * (n + 1) // count - steps * n // count
        done.append(desk.fit(batches=islice(batches, size)))
    return together(done)


def ramped(round: int, ramp: int) -> float:
    """How much of a strength is reached in a round: all of it after ``ramp`` rounds."""
    return min(1.0, (round + 1) / ramp) if ramp else 1.0


def aligned_loss(distil: float, feature: float) -> LossFn | None:
    """The task's loss with form B by weight ``distil`` and form C by ``feature``; None if neither.

    B: the divergence of the personal model's answers from the reference's, in nats. It needs a
    second pass through the trunk. C: how far apart the two hidden states at the first cut are in
    direction. It needs one more front forward and no communication.
    """
    if not distil and not feature:
        return None

    def loss(model: PersonalModel, batch: Batch) -> Tensor:
        logits = model.logits(batch, "personal")
        out = model.task.loss(logits, batch.labels)
        if distil:
            teacher = model.logits(batch, "reference").detach()
            out = out + distil * distillation(logits, teacher, batch.labels)
        if feature:
            mine = model.hidden(batch, "personal", at="cut")
            theirs = model.hidden(batch, "reference", at="cut").detach()
            out = out + feature * apart(mine, theirs, batch.inputs.get("attention_mask"))
        return out

    return loss
