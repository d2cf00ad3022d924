"""pFedMe (Dinh, Tran and Nguyen, 2020, arXiv 2006.08848): personal models by Moreau envelopes.

Round, with w_i and theta beginning at w as received. For each batch:
    theta <- K steps on  f(theta) + lambda/2 |theta - w_i|^2        from where it is, on that batch
    w_i <- w_i - eta lambda (w_i - theta)
Then  w <- (1 - beta) w + beta sum_i p_i w_i.  A client serves theta. K times the work of FedAvg.
K = 1 and eta lambda = 1 is FedAvg.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import repeat
from typing import ClassVar

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from flexp.client.desk import Desk, Drag
from flexp.client.fit import together
from flexp.model.ops import SlotSpec
from flexp.parcel import Facts, Parcel
from flexp.strategies.base import ClientId, Turn
from flexp.strategies.shared_beside import SharedBeside
from flexp.tensors import Tensors, Term, lerp


@dataclass(frozen=True)
class PFedMe(SharedBeside):
    """Personal adapters held near a shared one, which moves towards them instead of training.

    ``lam`` is lambda, ``inner`` is K, whose steps are the recipe's optimizer's; ``rate`` is eta,
    with which w_i follows; ``beta`` is how much of the mean the server takes over.
    """

    lam: PositiveFloat = 15.0
    inner: PositiveInt = 5
    rate: PositiveFloat = 0.005
    beta: NonNegativeFloat = 1.0

    name: ClassVar[str] = "pfedme"
    paper: ClassVar[str] = "Dinh et al. 2020, arXiv 2006.08848"
    slots: ClassVar[Mapping[str, SlotSpec]] = {
        "personal": SlotSpec(lasts="run"),
        "shared": SlotSpec(),
    }

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        return desk.reply("shared", facts=followed(desk, self.lam, self.inner, self.rate))

    def merge(self, state: Tensors, replies: Mapping[ClientId, Parcel], turn: Turn) -> Tensors:
        return lerp(state, super().merge(state, replies, turn), self.beta)


def followed(desk: Desk, lam: float, inner: int, rate: float) -> Facts:
    """A turn: "personal" is trained near "shared", which follows it; both begin at w."""
    pull, part = [Drag("shared", lam)], rate * lam
    desk.assign("personal", (Term("shared"),))
    done = list[Facts]()
    for batch in desk.batches():
        done.append(desk.fit(pull=pull, batches=repeat(batch, inner)))
        desk.assign("shared", (Term("shared", 1 - part), Term("personal", part)))
    return together(done)
