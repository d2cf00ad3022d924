"""The packaged models cut like the tiny ones: BERT-tiny here, MiniLM at all cuts with families.

SmolLM2, a causal language model with tied embeddings and 30 blocks, at three cuts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from agreement import Known, agree
from toys import cuts

from flexp.data.examples import Batch
from flexp.data.sources import Row
from flexp.data.tasks import CausalLM
from flexp.data.tokens import open_tokenizer, padding_of
from flexp.model.backbone import Backbone
from flexp.model.cut import Cut, Seat

TEXTS = ["a wonderful little film", "it broke", "the board met on tuesday and put off the vote"]


def real(folder: Path) -> tuple[Backbone, list[Batch]]:
    tokenizer: Any = open_tokenizer(folder)
    body = Backbone.open(folder, task="classification", classes=3, pad=padding_of(tokenizer))
    batches: list[Batch] = []
    for n in range(10):
        held = tokenizer(TEXTS[n % 3 :] + TEXTS[: n % 3], padding=True, return_tensors="pt")
        inputs = {"input_ids": held["input_ids"], "attention_mask": held["attention_mask"]}
        batches.append(Batch(inputs, torch.tensor([2, 0, 1])))
    return body, batches


def everywhere(folder: Path) -> int:
    body, batches = real(folder)
    known, count = Known(), 0
    for form in ("keep", "logits", "loss"):
        for seat in cuts(body.depth, form):
            agree(body, seat, known=known, batches=batches)
            count += 1
    return count


def test_bert_tiny_at_all_its_cuts(asset: Callable[[str], Path]) -> None:
    assert everywhere(asset("bert-tiny")) == 1 + 2 + 2


@pytest.mark.families
def test_minilm_at_all_its_cuts(asset: Callable[[str], Path]) -> None:
    assert everywhere(asset("minilm")) == 15 + 6 + 6


SPEECH = "Hamlet: To be, or not to be, that is the question.\nOphelia: Good my lord, how does he?"


@pytest.mark.slow
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("cut", [(1, 0), (10, 5), (29, 1)])
def test_smollm2_bit_for_bit(
    asset: Callable[[str], Path], cut: tuple[int, int], fast: bool
) -> None:
    folder = asset("smollm2-135m")
    tokenizer: Any = open_tokenizer(folder)
    task = CausalLM(tokenizer, max_length=32)
    rows = [Row({"text": text}, f"here:{n}") for n, text in enumerate(SPEECH.split("\n"))]
    held = task.encode(rows)
    batches = [task.collate(held, [n % 2, (n + 1) % 2]) for n in range(3)]
    filler = padding_of(tokenizer)
    body = Backbone.open(folder, task="causal-lm", pad=filler, fast=fast)
    assert (body.output is not None) == fast
    agree(body, Seat(Cut(*cut)), batches=batches)
