"""Rows of pictures for toy runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from toys import ToyTask

from flexp.data.examples import Batch, Examples
from flexp.dice import Dice
from flexp.model.adapter import Kind, Lora


class Pictures(ToyTask):
    """A row's ids draw its pixels."""

    def collate(self, examples: Examples, indices: Sequence[int]) -> Batch:
        drawn = [Dice(sum(examples.ids[i]))("pixels").generator() for i in indices]
        pixels = torch.stack([torch.randn(3, 16, 16, generator=g) for g in drawn])
        return Batch({"pixel_values": pixels}, super().collate(examples, indices).labels)


def seen(family: str, kind: Kind | None = None) -> dict[str, Any]:
    """A family of models, and rows for it."""
    task = {} if family == "bert-cls" else {"task": Pictures()}
    return {"family": family, "kind": kind or Lora(3, 6.0), **task}
