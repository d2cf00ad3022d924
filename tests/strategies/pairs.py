"""Two clients, one cut and one whole, for equalities between methods."""

from __future__ import annotations

from typing import Any

from toys import Played, play, same, whole

from flexp.client.desk import Training
from flexp.model.cut import Cut, Seat
from flexp.model.ops import Optim
from flexp.strategies.base import Strategy

MIXED = (Seat(Cut(1, 1)), whole(4))
SGD = Training(Optim("sgd", lr=0.5), batch=4, steps=2)


def ran(method: Strategy[Any], **more: Any) -> Played:
    """Two rounds of it."""
    options: dict[str, Any] = {"seeds": (1, 2), **more}
    return play(method, MIXED, **options)


def alike(a: Played, b: Played) -> bool:
    """Whether everybody ends with the same adapter, bit for bit."""
    return all(same(a.adapters[c], b.adapters[c]) for c in a.adapters)
