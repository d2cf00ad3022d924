"""What a client can say of how its turn bends: slopes and turns tried again, beside the turn.

All of it is made of a desk's verbs, so it is the same at any cut. Nothing of it counts: after
``beside`` the rows of the turn, its dropout and the hidden states that are kept are as before.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from itertools import islice

from flexp.client.desk import Desk
from flexp.data.examples import Batch
from flexp.selection import HEAD, Where
from flexp.tensors import Term, Wear

BEGUN, ENDED, SLOPE = "beside/begun", "beside/ended", "beside/slope"
AHEAD, BEHIND = "beside/ahead", "beside/behind"
SLOTS = (BEGUN, ENDED, SLOPE, AHEAD, BEHIND)


@contextmanager
def beside(desk: Desk) -> Generator[None]:
    """Within this what happens at a desk is no part of its turn, whose end is slot "personal"."""
    rows, counter, kept = desk.rows, desk.counter, desk.model.prefix
    desk.model.prefix = None
    desk.assign(ENDED, (Term("personal"),))
    try:
        yield
    finally:
        desk.rows, desk.counter, desk.model.prefix = rows, counter, kept
        desk.assign("personal", (Term(ENDED),))


def slope(desk: Desk, wear: Wear, batch: Batch, where: Where) -> None:
    """``SLOPE`` := the gradient of the client's loss with respect to slot ``BEGUN``."""
    with desk.model.training({BEGUN: where}, None):
        desk.grad(desk.model.loss(batch, wear), (BEGUN,), (SLOPE,))


def rates(desk: Desk) -> Iterator[tuple[Where, float]]:
    """The rate of a step, of blocks and of the head."""
    optim = desk.specs["personal"].optim or desk.training.optim
    yield ~HEAD, optim.lr
    yield HEAD, optim.lr if optim.head_lr is None else optim.head_lr


def turned(desk: Desk, shift: str, reach: float, again: Callable[[], object]) -> None:
    """``shift`` := the derivative of a whole turn along it.

    By central differences: the turn is taken ``again`` from ``reach`` times the shift ahead of
    where it began, and from behind, on the same batches. For SGD that is the product of its steps'
    I - eta H, each at its own place and on its own batch.
    """
    for sign, into in ((1.0, AHEAD), (-1.0, BEHIND)):
        desk.counter = 0
        desk.assign("personal", (Term(BEGUN), Term(shift, sign * reach)))
        again()
        desk.assign(into, (Term("personal"),))
    desk.assign(shift, (Term(AHEAD, 0.5 / reach), Term(BEHIND, -0.5 / reach)))


def turned_at_once(desk: Desk, shift: str, reach: float, steps: int, where: Where) -> None:
    """``shift`` := (I - steps eta H) of it, H of the turn's first pass over the rows at its start.

    H of the shift is the difference of two slopes, ``reach`` times the shift ahead and behind.
    """
    batches = list(islice(desk.batches(), -(-len(desk.shard.train) // desk.training.batch)))
    counted = sum(batch.counted for batch in batches)
    desk.assign(AHEAD, (Term(shift),))
    for part in (p for batch in batches for p in batch.parts(desk.seat.accumulate)):
        for sign in (1.0, -1.0):
            slope(desk, (Term(BEGUN), Term(shift, sign * reach)), part, where)
            share = sign * steps * part.counted / counted / (2 * reach)
            for place, rate in rates(desk):
                desk.assign(AHEAD, (Term(AHEAD), Term(SLOPE, -share * rate)), where=place)
    desk.assign(shift, (Term(AHEAD),))


def bent(desk: Desk, into: str, rows: int, where: Where) -> None:
    """``into`` := eta times the empirical Fisher diagonal, from slopes of so many rows each.

    A slope of m rows is the mean of theirs, and those of single rows point anywhere: so m^2 times
    its square counts as the squares of m rows.
    """
    counted = 0
    desk.assign(into, (Term(BEGUN, 0.0),))
    for batch in desk.batches(epochs=1, size=rows):
        slope(desk, BEGUN, batch, where)
        desk.assign(into, (Term(into), Term(SLOPE, float(batch.counted**2), times=SLOPE)))
        counted += batch.counted
    for place, rate in rates(desk):
        desk.assign(into, (Term(into, rate / counted),), where=place)
