"""What a client's frozen model makes of its rows: features, computed once and kept."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from flexp.client.desk import Desk
from flexp.data.examples import Batch
from flexp.data.loss import places
from flexp.model.personal import PersonalModel
from flexp.tensors import Wear

KEPT = "features"  # in a client's memory


def features_of(model: PersonalModel, batch: Batch, wear: Wear = "personal") -> Tensor:
    """The mean over positions of what leaves the last block, with mean 0 and variance 1, [B, d].

    Nothing of it can be differentiated.
    """
    with torch.no_grad():
        hidden = places(model.hidden(batch, wear)).double()
        mask = batch.inputs.get("attention_mask")
        counts = torch.ones(hidden.shape[:2]).to(hidden) if mask is None else mask.to(hidden)
        middle = (hidden * counts[..., None]).sum(1) / counts.sum(1, keepdim=True).clamp_min(1)
        return functional.layer_norm(middle, middle.shape[1:]).float()


def kept(desk: Desk) -> tuple[Tensor, Tensor]:
    """Features and labels of the training rows; as the model does not change, they last."""
    data, size = desk.shard.train, desk.training.batch
    held = (desk.memory.get(KEPT) or {}).get("train")
    if held is None or len(held) != len(data):
        parts = [range(at, min(at + size, len(data))) for at in range(0, len(data), size)]
        batches = (desk.task.collate(data, list(part)) for part in parts)
        held = torch.cat([features_of(desk.model, batch) for batch in batches])
        desk.memory.put(KEPT, {"train": held})
    return held, torch.tensor(data.labels)
