"""What a round of the personalised methods costs on the link, by the meter and by the formula."""

from __future__ import annotations

from typing import Any

import pytest
from strategies.pairs import SGD
from toys import LENGTH, H, backbone, play, whole

from flexp.dice import Dice
from flexp.model.adapter import Lora
from flexp.model.cut import Cut, Seat
from flexp.selection import ALL, NEAR, Where
from flexp.strategies.apfl import Apfl
from flexp.strategies.base import Strategy
from flexp.strategies.fedala import FedAla
from flexp.strategies.fedbabu import FedBabu
from flexp.strategies.fedrep import FedRep
from flexp.strategies.per_fedavg import PerFedAvg
from flexp.strategies.pfedhn import PFedHn
from flexp.strategies.pfedme import PFedMe
from flexp.strategies.scaffold import Scaffold

S = 4 * LENGTH * H * 4  # a hidden state of four rows, fp32
MASK = 4 * LENGTH * 8
COEF = (4 + 2) * 4  # a number per block, and before and after them
BODY = ~Where(part="head")
# A pass from front to front, and one in which only what is behind the trunk trains.
PASS, TAIL = (2 * S + MASK, 2 * S), (S + MASK, S)
# method: passes and tail passes of a step, learned weights, adapters each way, and which part
COSTS: dict[str, tuple[Strategy[Any], int, int, int, int, Where]] = {
    "fedrep": (FedRep(), 1, 1, 0, 1, BODY),
    "fedbabu": (FedBabu(tune_rounds=0), 1, 0, 0, 1, BODY),
    "scaffold": (Scaffold(), 1, 0, 0, 2, ALL),
    "apfl": (Apfl(), 2, 0, 2, 1, ALL),
    "apfl, alpha stays": (Apfl(rate=0.0), 2, 0, 0, 1, ALL),
    "pfedme": (PFedMe(inner=3), 3, 0, 0, 1, ALL),
    "per_fedavg": (PerFedAvg(), 2, 0, 0, 1, ALL),
    "per_fedavg, hessian-free": (PerFedAvg(form="hessian-free"), 4, 0, 0, 1, ALL),
    "fedala": (FedAla(blocks=0, passes=1), 1, 1, 0, 1, ALL),  # two of three batches are 80 %
    "pfedhn": (PFedHn(), 1, 0, 0, 1, ALL),
}


@pytest.mark.parametrize("name", COSTS)
def test_a_round_costs_what_the_formula_says(name: str) -> None:
    method, passes, tails, learned, adapters, part = COSTS[name]
    seats, steps = (Seat(Cut(1, 1)), whole(4)), SGD.steps or 0
    played = play(method, seats, seeds=(1, 2), training=SGD)
    begun = backbone().initial(Lora(3, 6.0), Dice(0)("initial"))
    for seat, arrival in zip(seats, played.arrivals, strict=True):
        assert arrival.failure is None
        here = NEAR & part
        sent = [v for k, v in begun.items() if here.holds(k, backbone().place(k, seat))]
        near, cut = adapters * sum(4 * v.numel() for v in sent), steps * (seat != whole(4))
        up, down = (
            passes * p + tails * t + learned * COEF for p, t in zip(PASS, TAIL, strict=True)
        )
        assert (arrival.ledger.sent, arrival.ledger.received) == (
            cut * up + near,
            cut * down + near,
        ), arrival.client
