"""Ditto (Li et al., 2021, arXiv 2012.04221): a shared model and, held near it, a personal one.

Round, with w the shared adapter as received:
    v_i <- E local epochs on  F_i(v_i) + lambda/2 |v_i - w|^2      personal, never leaves
    w_i <- E local epochs from w on F_i;  w <- sum_i p_i w_i       FedAvg
Twice the work of FedAvg. lambda = 0: v_i is local, w is FedAvg's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flexp.client.desk import Desk, Drag
from flexp.parcel import Parcel
from flexp.strategies.shared_beside import SharedBeside


@dataclass(frozen=True)
class Ditto(SharedBeside):
    """A shared adapter by FedAvg, and a personal one that is pulled towards it.

    ``lam`` is lambda, the weight of the pull; the paper's are 0.05 to 2.
    """

    lam: float = 0.1

    name: ClassVar[str] = "ditto"
    paper: ClassVar[str] = "Li et al. 2021, arXiv 2012.04221"

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        facts = desk.fit(pull=[Drag("shared", self.lam)])
        desk.fit(wear="shared")
        return desk.reply("shared", facts=facts)
