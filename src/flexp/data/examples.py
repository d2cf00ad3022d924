"""What tasks produce: encoded examples, batches of them, and the shard of a client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flexp.errors import DataError

Example = tuple[int, ...] | bytes  # token ids, a label per token, or the numbers of an image
Side = Literal["right", "left"]
Split = Literal["train", "val", "test"]

IGNORED = -100  # a label that no loss and no metric counts


@dataclass(frozen=True)
class Batch:
    """Inputs of a model by name; labels int64 [B], or [B, T] with ``IGNORED``.

    Ids and masks are int64 [B, T], ``pixel_values`` of images float32 [B, channels, height, width].
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor

    @property
    def rows(self) -> int:
        """The number of examples."""
        return self.labels.shape[0]

    @property
    def counted(self) -> int:
        """What a mean over this batch counts: rows, or the tokens that are to be predicted."""
        tokens = self.labels.dim() > 1
        return int((self.labels[:, 1:] != IGNORED).sum()) if tokens else self.rows

    def parts(self, count: int) -> list[Batch]:
        """The batch in at most so many parts of as many rows, the last maybe of fewer."""
        size = -(-self.rows // count)
        cuts = [slice(at, at + size) for at in range(0, self.rows, size)]
        return [Batch({k: v[c] for k, v in self.inputs.items()}, self.labels[c]) for c in cuts]


@dataclass(frozen=True)
class Examples:
    """Rows encoded once, in plain integers; labels are one per example, or one per token."""

    ids: tuple[Example, ...] = ()
    labels: tuple[int, ...] | tuple[Example, ...] = ()
    origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.ids) == len(self.labels) == len(self.origins):
            raise DataError(
                f"{len(self.ids)} examples with {len(self.labels)} labels and "
                f"{len(self.origins)} origins. Give one of each per example."
            )

    def __len__(self) -> int:
        return len(self.ids)

    def pick(self, indices: Sequence[int]) -> Examples:
        """The examples at these places, in this order."""
        return Examples(
            tuple(self.ids[at] for at in indices),
            tuple(self.labels[at] for at in indices),  # pyright: ignore[reportArgumentType]
            tuple(self.origins[at] for at in indices),
        )


@dataclass(frozen=True)
class Shard:
    """What one client learns from, chooses by and is tested on."""

    train: Examples
    val: Examples = Examples()
    test: Examples = Examples()

    def split(self, name: Split) -> Examples:
        """The examples of one split."""
        if name == "train":
            return self.train
        return self.val if name == "val" else self.test

    @property
    def rows(self) -> int:
        """The number of training examples, which is this client's weight."""
        return len(self.train)


def pad(ids: Sequence[Example], filler: int, side: Side) -> dict[str, Tensor]:
    """``input_ids`` padded to the longest, and the ``attention_mask`` that tells padding apart."""
    longest = max((len(row) for row in ids), default=0)
    tokens = torch.full((len(ids), longest), filler, dtype=torch.int64)
    mask = torch.zeros((len(ids), longest), dtype=torch.int64)
    for at, row in enumerate(ids):
        here = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        tokens[at, here] = torch.tensor(row, dtype=torch.int64)
        mask[at, here] = 1
    return {"input_ids": tokens, "attention_mask": mask}
