"""What a single client minimises, where it is not the plain loss of its task."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from flexp.data.examples import IGNORED, Examples
from flexp.data.loss import wide
from flexp.data.tasks import Classification, Task, log_prior, shifted
from flexp.errors import DataError
from flexp.recipe_clients import ObjectiveRecipe


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy with label smoothing and class weights [labels]; a mean in nats."""

    task: Task
    smoothing: float = 0.0
    weights: Tensor | None = None

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean over rows, or over tokens that count; weighted, it is over their weights."""
        flat, targets = counting(self.task, logits, labels)
        weights = None if self.weights is None else self.weights.to(flat.device)
        return functional.cross_entropy(flat, targets, weights, label_smoothing=self.smoothing)


@dataclass(frozen=True)
class Focal:
    """Focal loss (Lin et al. 2017, arXiv 1708.02002, eq. 4-5): -w_y (1 - p_y)^gamma log p_y.

    What is already right counts less; gamma = 0 is cross-entropy. ``weights`` are [labels].
    """

    task: Task
    gamma: float = 2.0
    weights: Tensor | None = None

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean over rows, or over tokens that count; weighted, it is over their weights."""
        flat, targets = counting(self.task, logits, labels)
        log_p = flat.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        held = self.weights
        weight = torch.ones_like(log_p) if held is None else held.to(log_p.device)[targets]
        return -(weight * (1 - log_p.exp()) ** self.gamma * log_p).sum() / weight.sum()


Objective = CrossEntropy | Focal


def counting(task: Task, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [N, classes] and targets [N] of the rows or tokens that count."""
    if task.name == "causal-lm":
        logits, labels = shifted(logits, labels)
        logits, labels = logits[labels != IGNORED], labels[labels != IGNORED]
    return wide(logits), labels


def objective_of(recipe: ObjectiveRecipe, task: Task, train: Examples, client: str) -> Objective:
    """The objective of a recipe for a client; DataError for weights of a task without labels."""
    weights = None
    if recipe.weights == "balanced":
        if not isinstance(task, Classification):
            raise DataError(
                f'clients.{client}.objective: weights "balanced" needs a classification. Leave '
                "weights out, or choose another task."
            )
        count = len(task.labels)
        weights = (-log_prior(count, train)).exp() / count
    if recipe.kind == "focal":
        return Focal(task, recipe.gamma, weights)
    return CrossEntropy(task, recipe.smoothing, weights)
