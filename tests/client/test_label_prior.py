"""Training relative to a client's own label frequencies (logit adjustment)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from flexp import assets, evaluate, recipe_file, run, stage
from flexp.data.examples import Examples
from flexp.data.tasks import Balanced, log_prior
from flexp.engine.base import Assignment
from flexp.engine.look import measure
from flexp.errors import RecipeError
from flexp.events import Stream
from flexp.export import card_of
from flexp.link.metered import Ledger

Recipe = Callable[..., Path]


def test_frequencies_by_hand() -> None:
    """Labels 0, 0, 2 of three, each counted once more: 3/6, 1/6, 2/6."""
    train = Examples(((1,), (2,), (3,)), (0, 0, 2), ("a", "b", "c"))
    assert log_prior(3, train).exp().tolist() == pytest.approx([0.5, 1 / 6, 1 / 3])


def test_the_loss_sees_adjusted_logits() -> None:
    logits, labels = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), [0, 2, 1, 1]
    prior = torch.tensor([0.7, 0.2, 0.1]).log()

    class Plain:
        def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return functional.cross_entropy(logits, labels)

    found = Balanced(Plain(), prior).loss(logits, torch.tensor(labels))  # pyright: ignore[reportArgumentType]
    chances = torch.softmax(logits, -1) * prior.exp()
    chances = chances / chances.sum(-1, keepdim=True)
    expected = -sum(float(chances[n, y].log()) for n, y in enumerate(labels)) / 4
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_own_rows_are_scored_with_the_prior_and_others_without(
    recipe_of: Recipe, tmp_path: Path
) -> None:
    found = recipe_file.read(recipe_of(train__label_prior=True, rounds=2), [])
    ready = stage.prepare(found, assets.Cache(tmp_path / "none"))
    result = run.run(ready, Stream())
    scores = {(s.client, s.cell, s.metric): s.value for s in result.scores}
    offer = ready.strategy.offer(result.state, "anna", result.turn)
    work = Assignment("anna", ready.seats["anna"], offer)
    mine = ready.federation.shards["anna"]
    with ready.engine.visit(ready.strategy, work, result.turn, Ledger()) as (desk, got):
        served, task = ready.strategy.personal(desk, got), ready.federation.task
        assert desk.prior is not None
        assert torch.equal(desk.prior, log_prior(2, mine.train))
        with_prior = measure(served, task, mine.test, prior=desk.prior)
        everybody = evaluate.pooled(ready.federation.shards, None)
        without = measure(served, task, everybody)
        assert measure(served, task, mine.test)["loss"] != with_prior["loss"]
    assert scores["anna", "personal/own/after", "loss"] == with_prior["loss"]
    assert scores["anna", "personal/global/after", "loss"] == without["loss"]
    folder = run.save_adapters(result, tmp_path / "adapters")[0]
    ready.engine.close()
    assert card_of(folder).prior == pytest.approx(log_prior(2, mine.train).tolist())


def test_it_needs_labels_and_a_loss_at_the_client(recipe_of: Recipe, tmp_path: Path) -> None:
    cache = assets.Cache(tmp_path / "none")
    for changes in ({"plan__labels": "loss", "plan__cut": [1, 0]}, {"task__kind": "causal-lm"}):
        found = recipe_file.read(recipe_of(train__label_prior=True, **changes), [])
        with pytest.raises(RecipeError, match="label_prior"):
            stage.prepare(found, cache)
