"""What a round of a method costs on the link: steps by the formula, and adapters that travel."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from toys import LENGTH, H, Played, backbone, play, whole

from flexp.client.desk import Training
from flexp.dice import Dice
from flexp.model.adapter import Lora
from flexp.model.cut import Cut, Seat
from flexp.model.ops import Optim
from flexp.selection import NEAR, Where
from flexp.strategies.base import Strategy
from flexp.tensors import Tensors

SEATS = (Seat(Cut(1, 1)), Seat(Cut(2, 0)), whole(4))
SGD = Training(Optim("sgd", lr=0.5), batch=4, steps=2)
STEPS = 2
S = 4 * LENGTH * H * 4  # a hidden state of four rows, fp32
MASK = 4 * LENGTH * 8

body = functools.cache(backbone)
Size = Callable[[Where], int]  # bytes of the near tensors that a selection takes


def check_round(method: Strategy[Any], fits: int, down: Where | Any, up: Where | Any) -> Played:
    """The second round: per fit 2 S + mask up and 2 S down a step, and near tensors each way.

    ``down`` and ``up`` are what travels of one slot, or say by a client's ``Size`` how much does.
    """
    played = play(method, SEATS, rounds=2, training=SGD, body=body())
    begun = body().initial(Lora(3, 6.0), Dice(0)("initial"))
    for arrival in played.arrivals:
        seat = SEATS[int(arrival.client[1])]
        size = sizer(begun, seat)
        steps = 0 if seat == whole(4) else fits * STEPS
        near = [size(way) if isinstance(way, Where) else way(size) for way in (up, down)]
        # In the order of clients: c0 gets what c2 left in a relay, like everybody.
        assert (arrival.ledger.sent, arrival.ledger.received) == (
            steps * (2 * S + MASK) + near[0],
            steps * 2 * S + near[1],
        ), arrival.client
    return played


def sizer(adapter: Mapping[str, Any] | Tensors, seat: Seat) -> Size:
    """How many bytes of an adapter are near and selected at a seat."""
    places = {k: body().place(k, seat) for k in adapter}
    return lambda where: sum(
        v.numel() * 4 for k, v in adapter.items() if (NEAR & where).holds(k, places[k])
    )
