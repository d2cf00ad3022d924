"""FedProx (Li et al., 2020, arXiv 1812.06127): FedAvg whose clients are held near its model.

Round: w_i <- E local epochs from w on  F_i(w_i) + mu/2 |w_i - w|^2;  w <- sum_i p_i w_i.
mu = 0 is FedAvg. The pull covers what trains, factor by factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from flexp.client.desk import Desk, Drag
from flexp.model.ops import SlotSpec
from flexp.parcel import Parcel
from flexp.selection import NONE, Where
from flexp.strategies.fedavg import FedAvg
from flexp.tensors import Term


@dataclass(frozen=True)
class FedProx(FedAvg):
    """FedAvg whose clients are pulled back to the adapter they were given.

    ``mu`` is the weight of the pull; the paper tries 1, 0.1, 0.01 and 0.001.
    """

    mu: float = 0.1

    name: ClassVar[str] = "fedprox"
    paper: ClassVar[str] = "Li et al. 2020, arXiv 1812.06127"
    slots: ClassVar[Mapping[str, SlotSpec]] = {"personal": SlotSpec(), "given": SlotSpec()}

    def averages(self) -> Where:
        return NONE

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        desk.assign("given", (Term("personal"),))
        facts = desk.fit(pull=[Drag("given", self.mu)])
        return desk.reply("personal", facts=facts)
