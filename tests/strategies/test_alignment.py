"""Alignment on a toy whose clients see few labels each: what it brings, and where it looks to.

algorithms.md 1.8 (7): six blocks of width 32, pretrained on a task; eight clients with labels from
a Dirichlet distribution (0.3) and words of their own; cuts so that somebody hosts most blocks far.
"""

from __future__ import annotations

import functools
import statistics
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor
from torch.nn import functional
from toys import ToyTask, play

from flexp.client.desk import Training
from flexp.data.examples import Batch, Examples, Shard
from flexp.model.adapter import Lora
from flexp.model.backbone import Backbone
from flexp.model.cut import Cut, Seat
from flexp.model.ops import Optim
from flexp.model.worn import read
from flexp.parcel import Parcel
from flexp.strategies.base import ClientId, Turn
from flexp.strategies.flexp import FlexP
from flexp.tensors import Tensors

VOCABULARY, LENGTH, CLASSES, WIDTH, CLIENTS = 48, 12, 8, 32, 8
FRONTS, BACKS = (1, 1, 2, 2, 3, 3, 1, 2), (1, 1, 1, 2, 1, 2, 1, 1)
SEATS = [Seat(Cut(a, b)) for a, b in zip(FRONTS, BACKS, strict=True)]
KIND = Lora(rank=4, alpha=8.0, targets=("query", "key", "value", "dense"))


@dataclass(frozen=True)
class Full(ToyTask):
    """Rows without padding."""

    def collate(self, examples: Examples, indices: Any) -> Batch:
        ids = torch.tensor([examples.ids[i] for i in indices])
        labels: Any = [examples.labels[i] for i in indices]
        return Batch(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.tensor(labels)
        )


@dataclass
class World:
    """The pretrained model, every client's rows, and rows of all labels in every client's words."""

    body: Backbone
    shards: dict[str, Shard]
    everybody: list[Examples]


@functools.cache
def world(seed: int) -> World:
    stream = torch.Generator().manual_seed(seed)

    def drawn(labels: Tensor, meaning: Tensor) -> Tensor:
        chances = functional.softmax(meaning[labels], -1)
        return 3 + torch.multinomial(chances, LENGTH, replacement=True, generator=stream)

    def rows(n: int, mix: Tensor, meaning: Tensor, name: str) -> Examples:
        labels = torch.multinomial(mix, n, replacement=True, generator=stream)
        ids = tuple(tuple(row) for row in drawn(labels, meaning).tolist())
        return Examples(ids, tuple(labels.tolist()), tuple(f"{name}:{i}" for i in range(n)))

    source = 1.2 * torch.randn(CLASSES, VOCABULARY, generator=stream)
    net = pretrained(seed, lambda labels: drawn(labels, source), stream)
    shift = 1.6 * torch.randn(CLASSES, VOCABULARY, generator=stream)
    words = [
        source + shift + 0.9 * torch.randn(CLASSES, VOCABULARY, generator=stream)
        for _ in range(CLIENTS)
    ]
    mixes = torch.tensor(np.random.default_rng(seed).dirichlet([0.3] * CLASSES, size=CLIENTS))
    shards = {
        f"c{i}": Shard(*(rows(n, mixes[i], words[i], f"c{i}-{n}") for n in (96, 8, 300)))
        for i in range(CLIENTS)
    }
    even = torch.ones(CLASSES) / CLASSES
    everybody = [rows(100, even, words[i], f"all-{i}") for i in range(CLIENTS)]
    return World(Backbone(net, task="classification"), shards, everybody)


def pretrained(seed: int, drawn: Any, stream: torch.Generator) -> Any:
    kinds: dict[str, Any] = {"num_labels": CLASSES}
    config = hf.BertConfig(
        vocab_size=VOCABULARY + 3,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_attention_heads=2,
        num_hidden_layers=6,
        max_position_embeddings=32,
        pad_token_id=0,
        **kinds,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(seed)
        net: Any = hf.BertForSequenceClassification(config)
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
    for _ in range(300):
        labels = torch.randint(CLASSES, (128,), generator=stream)
        loss = functional.cross_entropy(net(input_ids=drawn(labels)).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


def accuracies(strategy: FlexP, seed: int) -> tuple[float, float]:
    """Mean accuracy of personal models on their client's test rows, and on everybody's."""
    here = world(seed)
    played = play(
        strategy,
        SEATS,
        rounds=25,
        kind=KIND,
        training=Training(Optim(lr=3e-3), batch=32, steps=6),
        shards=here.shards,
        body=here.body,
        task=Full(),
    )

    def right(adapter: Tensors, data: Examples) -> float:
        batch = Full().collate(data, range(len(data)))
        with torch.no_grad():
            logits = here.body.run(dict(batch.inputs), read(adapter, KIND.alpha))
        return float((logits.argmax(-1) == batch.labels).float().mean())

    mine = [right(a, here.shards[c].test) for c, a in played.adapters.items()]
    pooled = [right(a, data) for a in played.adapters.values() for data in here.everybody]
    return statistics.fmean(mine), statistics.fmean(pooled)


@dataclass(frozen=True)
class ToPretrained(FlexP):
    """Pulled to where everybody began, whoever hosts a block (L2-SP, Li et al. 2018)."""

    def offer(self, state: Tensors, client: ClientId, turn: Turn) -> Parcel:
        offer = super().offer(state, client, turn)
        return replace(offer, adapters={**offer.adapters, "reference": {}})


@pytest.mark.slow
def test_alignment_lifts_everybodys_accuracy_and_hosted_blocks_are_the_better_reference() -> None:
    """By how much depends on the last bits, so it is a mean over seeds."""
    pull: dict[str, Any] = {"form": "prox", "align": 0.1, "head": "aligned"}
    lifts: list[float] = []
    for seed in (0, 1):
        own, pooled = accuracies(FlexP(align=0.0, head="free"), seed)
        aligned_own, aligned = accuracies(FlexP(**pull), seed)
        _, to_pretrained = accuracies(ToPretrained(**pull), seed)
        assert aligned_own >= own - 0.02
        assert aligned >= to_pretrained
        lifts.append(aligned - pooled)
    assert statistics.fmean(lifts) >= 0.12
