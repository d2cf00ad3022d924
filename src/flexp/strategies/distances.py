"""How far apart two slots are, near and far together, by the operations that both sides know."""

from __future__ import annotations

from typing import Literal

from flexp.client.desk import Desk
from flexp.tensors import Term, total

Distance = Literal["l2", "l1", "l2_squared", "product"]
STEEP = 1e30  # times this, and clipped, a number is its sign


def distance(desk: Desk, a: str, b: str, form: Distance = "l2") -> float:
    """The distance of slots ``a`` and ``b``; "product" is L2 of what LoRA's pairs wear.

    Slots "gap" and "sign" are overwritten.
    """
    if form == "product":
        found = (desk.dot(x, y, form="product") for x, y in ((a, a), (a, b), (b, b)))
        first, both, second = map(total, found)
        return max(0.0, first - 2 * both + second) ** 0.5
    desk.assign("gap", (Term(a), Term(b, -1.0)))
    if form == "l1":
        desk.assign("sign", (Term("gap", STEEP),), clip=(-1.0, 1.0))
        return total(desk.dot("gap", "sign"))
    squared = total(desk.dot("gap", "gap"))
    return squared if form == "l2_squared" else squared**0.5
