"""Forms B and C of the alignment of FlexP-SFL, as terms of a client's own loss. Ours.

Both compare what the model does in two wears on the client's own rows: "personal", and
"reference", the slot of what everybody knows.
"""

from __future__ import annotations

from torch import Tensor

from flexp.client.parts import LossFn
from flexp.data.examples import Batch
from flexp.data.loss import apart, distillation
from flexp.model.personal import PersonalModel


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
