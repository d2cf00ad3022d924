"""A part of a batch on its way down: its loss, and the gradient in a model's leaves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flexp.client.lanes import Lane
from flexp.data.examples import Batch
from flexp.errors import GradientError
from flexp.model.personal import PersonalModel
from flexp.tensors import PerRow, Wear

LossFn = Callable[[PersonalModel, Batch], Tensor]


@dataclass(frozen=True)
class Part:
    """A batch or a part of one, which counts by its ``share``, and the model that computes it."""

    model: PersonalModel
    batch: Batch
    wear: Wear
    loss: LossFn | None
    share: float | None

    def descend(self, lane: Lane | None = None) -> Tensor:
        """The loss, with its gradient in the model's leaves. ``lane`` is its way to the server.

        NaN if the gradient is one that no server takes.
        """
        model = self.model
        model.far = model.far if lane is None else lane
        if self.loss is None:
            value = model.loss(self.batch, self.wear)
        else:
            value = self.loss(model, self.batch)
        if self.share is not None:
            value = value * self.share
        if lane is not None:
            lane.value = value.detach()
        try:
            if value.requires_grad:
                value.backward()  # pyright: ignore[reportUnknownMemberType]
        except GradientError:
            value = torch.full_like(value.detach(), math.nan)
            if lane is not None:
                lane.value = value
        return value.detach()


def rows_of(wear: Wear, first: int, count: int) -> Wear:
    """What some rows of a batch wear."""
    if not isinstance(wear, PerRow):
        return wear
    return replace(wear, row=wear.row[first : first + count])
