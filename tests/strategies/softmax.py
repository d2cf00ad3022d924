"""Softmax regression on a bench, and the same in plain torch, trained without one client too."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from strategies.bowls import FRONT, HEAD, TRUNK, Bench, Wanted
from torch import Tensor
from torch.nn.functional import cross_entropy

from flexp.model.ops import Optim
from flexp.strategies.base import Strategy
from flexp.tensors import Tensors

CLASSES, WIDTH = 3, 5
ROWS = tuple[tuple[float, ...], ...]  # features, and the class last


class Softmax(Wanted):
    """Front, trunk and head are the weights of a class each."""

    def loss(self, point: Tensor, labels: Tensor) -> Tensor:
        """The cross-entropy."""
        return cross_entropy(labels[:, :-1] @ point.view(CLASSES, -1).T, labels[:, -1].long())


@dataclass(frozen=True)
class Toy:
    """Clients of other sizes and places, of which some label at random; and test rows of none."""

    rows: Mapping[str, Any]
    noisy: tuple[str, ...]
    test: Tensor
    rounds: int
    steps: int
    lr: float

    def bench(self, method: Strategy[Any]) -> Bench:
        """All rounds of a method."""
        start = {k: torch.zeros(1, WIDTH) for k in (FRONT, TRUNK, HEAD)}
        optim = Optim("sgd", lr=self.lr)
        how: dict[str, Any] = {"steps": self.steps, "batch": 99, "task": Softmax()}
        bench = Bench(method, rows=self.rows, start=start, optim=optim, **how)
        for _ in range(self.rounds):
            bench.round()
        return bench

    def trained(self, without: str = "") -> Tensor:
        """Gradient descent by its formula, in double precision."""
        held = {c: torch.tensor(r, dtype=torch.float64) for c, r in self.rows.items()}
        there = {c: r for c, r in held.items() if c != without}
        total, theta = sum(map(len, there.values())), torch.zeros(CLASSES, WIDTH).double()
        for _ in range(self.rounds):
            merged = torch.zeros_like(theta)
            for r in there.values():
                mine, one_hot = theta, torch.eye(CLASSES).double()[r[:, -1].long()]
                for _ in range(self.steps):
                    wrong = (r[:, :-1] @ mine.T).softmax(1) - one_hot
                    mine = mine - self.lr * wrong.T @ r[:, :-1] / len(r)
                merged = merged + len(r) / total * mine
            theta = merged
        return theta

    def loss(self, theta: Tensor) -> float:
        """On the test rows."""
        return float(cross_entropy(self.test[:, :-1].double() @ theta.T, self.test[:, -1].long()))


def toy(clients: int, noisy: Collection[int], rounds: int, steps: int, lr: float) -> Toy:
    """The same for the same arguments."""
    dice = torch.Generator().manual_seed(0)
    planes = 1.5 * torch.randn(CLASSES, WIDTH, generator=dice)

    def drawn(count: int, shift: Any, random: bool = False) -> Tensor:
        x = torch.randn(count, WIDTH, generator=dice) + shift
        x[:, -1] = 1.0
        scores = x @ planes.T + 0.5 * torch.randn(count, CLASSES, generator=dice)
        y = torch.randint(CLASSES, (count,), generator=dice) if random else scores.argmax(1)
        return torch.cat([x, y[:, None].float()], 1)

    rows: dict[str, Any] = {}
    for n in range(clients):
        count = 6 + 5 * n % 17
        found = drawn(count, 0.7 * torch.randn(WIDTH, generator=dice), n in noisy)
        rows[f"c{n:02}"] = [tuple(map(float, row)) for row in found.tolist()]
    names = tuple(f"c{n:02}" for n in noisy)
    return Toy(rows, names, drawn(300, 0.0), rounds, steps, lr)


def flat(held: Tensors) -> Tensor:
    """Weights of classes."""
    return torch.cat([held[k] for k in (FRONT, TRUNK, HEAD)]).double()
