"""APFL (Deng et al., 2020, arXiv 2003.13461): a learned mix of an own and a shared model.

Round, with w as received. For each batch, at one and the same point:
    v_i <- v_i - eta grad_v f(m),   m = a_i v_i + (1 - a_i) w_i      so alpha times the slope at m
    w_i <- w_i - eta grad f(w_i)                                     FedAvg
    a_i <- a_i - eta_a <v_i - w_i, grad f(m)>, at least 0 and at most 1
Then  w <- sum_i p_i w_i.  What a client serves is the mix with w. Public code moves v by the slope
at v, and mixes at the end of a round: another method. a = 1 that stays is local, a = 0 is FedAvg.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, cast

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from flexp.client.desk import Desk
from flexp.client.fit import together
from flexp.parcel import Facts, Parcel
from flexp.selection import ALL, NONE
from flexp.strategies.base import Served
from flexp.strategies.shared_beside import SharedBeside
from flexp.tensors import Mix, Term


@dataclass(frozen=True)
class Apfl(SharedBeside):
    """A shared adapter by FedAvg, an own one, and how much of each a client serves is learned.

    ``alpha`` is the own adapter's share at the start. ``rate`` is eta_a (None: train.lr, as in the
    paper; 0: alpha stays).
    """

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    rate: NonNegativeFloat | None = None

    name: ClassVar[str] = "apfl"
    paper: ClassVar[str] = "Deng et al. 2020, arXiv 2003.13461"
    alone: ClassVar[bool] = False

    def mix(self, alpha: Tensor | float) -> Mix:
        """m."""
        return Term("personal", alpha), Term("shared", 1 - alpha)

    def share(self, desk: Desk) -> float:
        """The client's alpha."""
        return float(cast("Any", desk.memory.facts.get("alpha", self.alpha)))

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        share, done = self.share(desk), list[Facts]()
        rate = desk.training.optim.lr if self.rate is None else self.rate
        for batch in desk.batches():
            alpha = torch.tensor(share, requires_grad=True)
            wear = self.mix(alpha if rate else share)
            moves = {"personal": ALL if share else NONE}  # without a share there is no slope
            desk.fit(wear=wear, train=moves, batches=iter([batch]))
            done.append(desk.fit(wear="shared", batches=iter([batch])))
            if alpha.grad is not None and alpha.grad.isfinite():
                share = min(1.0, max(0.0, share - rate * float(alpha.grad)))
        desk.memory.facts["alpha"] = share
        return desk.reply("shared", facts=together(done))

    def personal(self, desk: Desk, offer: Parcel) -> Served:
        wear = self.mix(self.share(desk))
        return Served(lambda batch: desk.model.logits(batch, wear), wear)
