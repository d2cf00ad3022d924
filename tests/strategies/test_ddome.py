"""DDOME, once by hand and by the oracles of its specification."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from strategies.bowls import Bench, flat, numbers
from strategies.pairs import SGD, alike, ran
from strategies.prices import MASK, STEPS, S, body, sizer
from strategies.prices import SEATS as PRICED
from toys import at_desk, backbone, play, same, whole

from flexp.client.desk import Training
from flexp.dice import Dice
from flexp.model.adapter import Lora, Prompt
from flexp.model.cut import Cut, Seat
from flexp.model.ops import Optim, SlotSpec
from flexp.parcel import Parcel
from flexp.selection import ALL
from flexp.strategies import build
from flexp.strategies.base import Setting
from flexp.strategies.ddome import Ddome
from flexp.strategies.experts import joint_loss, mixture, share
from flexp.strategies.fedavg import FedAvg
from flexp.strategies.gating import Gate, Lesson
from flexp.tensors import Tensors, norm

KIND = Lora(rank=3, alpha=6.0)


# ---- by hand

PAIR: dict[str, Any] = {  # two numbers each, and those of c are a's; features are their signs
    "start": numbers(FRONT=0.0, TRUNK=0.0),
    "rows": {"a": [(8, -8)], "b": [(-8, 8)], "c": [(4, -4)]},
}
ANCHORED = {
    "experts": 2,
    "top": 1,
    "anchors": ("a", "b"),
    "newcomers": ("c",),
    "hidden": 0,
    "optimizer": "sgd",
    "rate": 2.0,
    "serve": "client",
}
ZERO = {"gate/0/weight": torch.zeros(2, 2), "gate/0/bias": torch.zeros(2)}


def test_ddome_trains_the_expert_of_an_anchor_and_routes_a_newcomer_to_it() -> None:
    bench = Bench(build("ddome", ANCHORED), **PAIR)
    bench.state = replace(bench.state, gate=ZERO)
    bench.round()
    # a goes half of the way to (8, -8) with the first expert, b to (-8, 8) with the second.
    assert [flat(held) for held in bench.state.held] == [(4, -4), (-4, 4)]
    # a's features are (1, -1), and its shares (1/2, 1/2) for (1, 0): the slope of the weights is
    # (-1/2, 1/2) times features, of the biases (-1/2, 1/2). A step of 2 is [[1, -1], [-1, 1]] and
    # (1, -1). b's is the same for weights, and (-1, 1) for biases. The mean is over rows alike.
    weight, bias = bench.state.gate["gate/0/weight"], bench.state.gate["gate/0/bias"]
    assert weight.flatten().tolist() == pytest.approx([1, -1, -1, 1], abs=1e-4)
    assert bias.tolist() == [0, 0]
    # c says (2, -2) to its own features (1, -1), so it gets a's expert; it has trained nothing.
    assert bench.serves("c") == (4, -4)
    assert bench.replies["c"].adapters == {}
    assert bench.replies["c"].facts["steps"] == 0


def test_a_mixture_is_the_log_of_the_mean_of_probabilities() -> None:
    # Of two classes: the first expert says 1/4, 3/4, the second 3/4, 1/4; shares are 1/3 and 2/3.
    # p = (1/12 + 6/12, 3/12 + 2/12) = (7/12, 5/12). The label is the first one, so responsibilities
    # are 1/7 and 6/7: slopes of what the gate says are 1/3 - 1/7 and 2/3 - 6/7, and of what the
    # first expert says 1/7 (1/4 - 1, 3/4).
    first = torch.tensor([[1.0, 3.0]]).log().requires_grad_()
    second = torch.tensor([[3.0, 1.0]]).log().requires_grad_()
    says = torch.tensor([[1.0, 2.0]]).log().requires_grad_()
    found = mixture([first, second], says)
    assert found.exp()[0].tolist() == pytest.approx([7 / 12, 5 / 12])
    torch.nn.functional.nll_loss(found, torch.tensor([0])).backward()
    assert says.grad is not None
    assert first.grad is not None
    assert says.grad[0].tolist() == pytest.approx([1 / 3 - 1 / 7, 2 / 3 - 6 / 7])
    assert first.grad[0].tolist() == pytest.approx([-3 / 28, 3 / 28])


def test_tokens_of_a_text_are_mixed_by_the_shares_of_their_row() -> None:
    logits = [torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    says = torch.tensor([[0.0, 0.0], [50.0, -50.0]])
    found = mixture(logits, says).exp()
    parts = [one.softmax(-1) for one in logits]
    assert torch.allclose(found[0], (parts[0][0] + parts[1][0]) / 2, atol=1e-6)
    assert torch.allclose(found[1], parts[0][1], atol=1e-6)
