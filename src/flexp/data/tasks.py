"""Tasks: rows to batches, losses and metrics; the only place that knows a tokenizer or pixels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from flexp.data.calibration import ece, gaps, others
from flexp.data.columns import file_of, is_integer, label_names, label_of, text_of
from flexp.data.examples import IGNORED, Batch, Example, Examples, Shard, Side, Split, pad
from flexp.data.images import Pixels
from flexp.data.loss import Sums, chunked_loss, counted, hits, macro, means, wide
from flexp.data.sources import Row
from flexp.data.tokens import begin_of, filler_of, ids_of, only
from flexp.errors import DataError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "IGNORED",
    "Balanced",
    "Batch",
    "CausalLM",
    "Classification",
    "Examples",
    "Shard",
    "Side",
    "Split",
    "Sums",
    "Task",
    "label_entropy",
    "label_names",
    "log_prior",
    "shifted",
]


class Task(Protocol):
    """What a model is fine-tuned for: encoding, loss and metrics of one kind of row.

    ``encode`` raises DataError with the origin of a bad row; ``collate`` pads the examples at these
    places to the longest of them; ``loss`` is a mean in nats; ``measure`` gives sum and count of
    every metric in a batch, and ``finish`` the metrics of added sums: what was never counted is
    absent, not 0. Whoever only measures takes ``rows_at_once``, so that logits stay small.
    """

    @property
    def name(self) -> str: ...
    @property
    def metric(self) -> str: ...
    @property
    def higher_is_better(self) -> bool: ...
    @property
    def rows_at_once(self) -> int: ...
    def encode(self, rows: Sequence[Row]) -> Examples: ...
    def collate(self, examples: Examples, indices: Sequence[int]) -> Batch: ...
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor: ...
    def measure(self, logits: Tensor, labels: Tensor) -> dict[str, tuple[float, float]]: ...
    def finish(self, sums: Sums) -> dict[str, float]: ...


class Loss(Protocol):
    """A mean loss in nats: a task's own, or what a client minimises instead."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Classification:
    """One of a few labels for a text or, read by ``Pixels``, an image; the logits are [B, labels].

    ``text`` is the column of either.
    """

    labels: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase | Pixels
    text: str = "text"
    label: str = "label"
    max_length: int = 128
    side: Side = "right"
    metric: Literal["accuracy"] = field(default="accuracy", init=False)
    higher_is_better: Literal[True] = field(default=True, init=False)
    rows_at_once: Literal[64] = field(default=64, init=False)

    def __post_init__(self) -> None:
        _positive(self.max_length)
        if len(set(self.labels)) < max(2, len(self.labels)):
            raise DataError(
                f"{len(self.labels)} labels, {len(set(self.labels))} of them different: a "
                "classification needs two or more, each once. Name them in task.labels."
            )

    @property
    def name(self) -> Literal["classification", "images"]:
        """The kind of task, which is another for images, as their models are."""
        return "images" if isinstance(self.tokenizer, Pixels) else "classification"

    def encode(self, rows: Sequence[Row]) -> Examples:
        """Label names, or places 0 to n-1 unless the names are numbers themselves."""
        labels, origins = tuple(self._index(row) for row in rows), tuple(row.origin for row in rows)
        if isinstance(self.tokenizer, Pixels):
            cells = ((file_of(row, self.text), row) for row in rows)
            images = (self.tokenizer.fitted(cell, r.origin, r.base) for cell, r in cells)
            return Examples(tuple(images), labels, origins)
        texts = [text_of(row, self.text) for row in rows]
        ids = ids_of(self.tokenizer, texts, whole=True, max_length=self.max_length)
        for row, held in zip(rows, ids, strict=True):
            if not held:
                raise DataError(
                    f'{row.origin}: column "{self.text}" has no token that this model knows. '
                    "Write other text, or remove the row."
                )
        return Examples(ids, labels, origins)

    def collate(self, examples: Examples, indices: Sequence[int]) -> Batch:
        picked = examples.pick(indices)
        labels = torch.tensor(picked.labels, dtype=torch.int64)
        if isinstance(self.tokenizer, Pixels):
            return Batch(self.tokenizer.batch(picked.ids), labels)
        return Batch(pad(picked.ids, filler_of(self.tokenizer), self.side), labels)

    def asked(self, said: Sequence[str]) -> Batch:
        """Texts, or images at these paths, without labels."""
        if isinstance(self.tokenizer, Pixels):
            images = [self.tokenizer.fitted(path, path, "") for path in said]
            return Batch(self.tokenizer.batch(images), torch.zeros(len(said)))
        ids = ids_of(self.tokenizer, said, whole=True, max_length=self.max_length)
        return Batch(pad(ids, filler_of(self.tokenizer), self.side), torch.zeros(len(said)))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(wide(logits), labels)

    def measure(self, logits: Tensor, labels: Tensor) -> dict[str, tuple[float, float]]:
        return counted(wide(logits), labels) | hits(logits, labels) | gaps(logits, labels)

    def finish(self, sums: Sums) -> dict[str, float]:
        return macro(others(sums)) | ece(sums)

    def _index(self, row: Row) -> int:
        value = label_of(row, self.label)
        if value in self.labels:
            return self.labels.index(value)
        named = not any(is_integer(label) for label in self.labels)
        if named and is_integer(value):
            if 0 <= int(value) < len(self.labels):
                return int(value)
            places = ", ".join(f"{at} {label}" for at, label in enumerate(self.labels))
            raise DataError(
                f'{row.origin}: label out of range in column "{self.label}". There are '
                f"{len(self.labels)} labels ({places}): correct the row."
            )
        raise DataError(
            f'{row.origin}: column "{self.label}" does not hold one of the {len(self.labels)} '
            f"labels. {nearest(value, self.labels)} "
            "Correct the row, or name the label in the recipe."
        )


@dataclass(frozen=True)
class Balanced:
    """A classification learned relative to a client's own label frequencies.

    Logit adjustment (Menon et al. 2021, arXiv 2007.07314, eq. 10): the loss sees logits + log p(y),
    so the model itself need not learn which labels this client has often. On the client's own rows
    it is served with log p(y) added, anywhere else without. ``log_prior``: [labels], add-one.
    """

    task: Loss
    log_prior: Tensor

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The task's loss of the adjusted logits, in nats."""
        return self.task.loss(logits + self.log_prior, labels)


def log_prior(labels: int, train: Examples) -> Tensor:
    """Log frequencies of the labels in training rows, each counted once more than it occurs."""
    counts = torch.ones(labels)
    for label in train.labels:
        if isinstance(label, int):
            counts[label] += 1
    return (counts / counts.sum()).log()


def label_entropy(train: Examples) -> Tensor:
    """The entropy of the labels of training rows, in nats."""
    counts = sorted(Counter(label for label in train.labels if isinstance(label, int)).values())
    shares = [count / sum(counts) for count in counts]
    return torch.tensor(-sum(share * math.log(share) for share in shares))


@dataclass(frozen=True)
class CausalLM:
    """The next token of a text, after a prompt that is not learned; the logits are [B, T, V]."""

    tokenizer: PreTrainedTokenizerBase
    text: str = "text"
    prompt: str | None = None  # column
    max_length: int = 128
    side: Side = "right"
    name: Literal["causal-lm"] = field(default="causal-lm", init=False)
    metric: Literal["perplexity"] = field(default="perplexity", init=False)
    higher_is_better: Literal[False] = field(default=False, init=False)
    rows_at_once: Literal[8] = field(default=8, init=False)  # of logits as wide as the vocabulary

    def __post_init__(self) -> None:
        _positive(self.max_length)

    def encode(self, rows: Sequence[Row]) -> Examples:
        """Prompt, text and end of text; too long an example loses the start of its prompt first."""
        texts = ids_of(self.tokenizer, [text_of(row, self.text) for row in rows])
        column = self.prompt
        before = [text_of(row, column, empty=True) if column else "" for row in rows]
        prompts = ids_of(self.tokenizer, before)
        pairs: list[tuple[Example, Example]] = []
        begin, end = begin_of(self.tokenizer), only(self.tokenizer.eos_token_id)
        for row, prompt, text in zip(rows, prompts, texts, strict=True):
            ids, labels = self._joined(begin, prompt, (*text, *end))
            if all(label == IGNORED for label in labels[1:]):
                raise DataError(
                    f'{row.origin}: column "{self.text}" has no token to predict from another. '
                    "Lengthen the text, or remove the row."
                )
            pairs.append((ids, labels))
        origins = tuple(row.origin for row in rows)
        return Examples(tuple(ids for ids, _ in pairs), tuple(of for _, of in pairs), origins)

    def collate(self, examples: Examples, indices: Sequence[int]) -> Batch:
        picked = examples.pick(indices)
        labels = pad(cast("tuple[Example, ...]", picked.labels), IGNORED, self.side)["input_ids"]
        return Batch(pad(picked.ids, filler_of(self.tokenizer), self.side), labels)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        flat, targets = shifted(logits, labels)
        return functional.cross_entropy(wide(flat), targets, ignore_index=IGNORED)

    def fused(self, hidden: Tensor, output: nn.Linear, labels: Tensor) -> Tensor:
        """The same loss from what the output embedding reads, [B, T, d], a few tokens at a time.

        Logits of all tokens are never there at once, and of a prompt or padding never at all.
        """
        flat, targets = shifted(hidden, labels)
        wanted = targets != IGNORED
        return chunked_loss(flat[wanted], output, targets[wanted])

    def measure(self, logits: Tensor, labels: Tensor) -> dict[str, tuple[float, float]]:
        flat, targets = shifted(logits, labels)
        wanted = targets != IGNORED
        return counted(wide(flat[wanted]), targets[wanted])

    def finish(self, sums: Sums) -> dict[str, float]:
        found = means(sums)
        if "loss" in found:
            loss = found["loss"]
            found["perplexity"] = math.exp(loss) if loss < 700 else math.inf
        return found

    def _joined(self, begin: Example, prompt: Example, text: Example) -> tuple[Example, Example]:
        room = self.max_length - len(begin)
        # The text keeps half of the room, so that a long prompt cannot leave nothing to learn.
        kept = text[: max(room - len(prompt), (room + 1) // 2)]
        before = (*begin, *prompt[max(0, len(prompt) - (room - len(kept))) :])
        labels = (*(IGNORED for _ in before), *kept)
        return (*before, *kept), labels


def _positive(max_length: int) -> None:
    if max_length < 4:
        raise DataError(f"max_length is {max_length}. Set it to 4 or more.")


def shifted(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [BT, V] against the token after each; moving the logits would copy them."""
    targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return logits.flatten(0, 1), targets.flatten()
