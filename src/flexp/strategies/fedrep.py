"""FedRep (Collins et al., 2021, arXiv 2102.07078): a shared body, and a head that is fitted to it.

Round: h_i <- E_h local epochs with w fixed;  then w_i <- E local epochs from w with h_i fixed;
w <- sum_i p_i w_i. FedPer, in which the two move one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from pydantic import NonNegativeInt

from flexp.parcel import Parcel
from flexp.selection import HEAD, Where
from flexp.strategies.base import ClientId, Turn
from flexp.strategies.fedper import FedPer


@dataclass(frozen=True)
class FedRep(FedPer):
    """FedAvg of the body; in each turn first the personal head trains, then the body.

    ``head_steps`` are the head's (None: as many as the body takes, which is the recipe's number;
    0: it never trains). ``blocks`` of the model's end belong to the head.
    """

    head_steps: NonNegativeInt | None = None

    name: ClassVar[str] = "fedrep"
    paper: ClassVar[str] = "Collins et al. 2021, arXiv 2102.07078"
    own: ClassVar[Where] = HEAD

    def phases(self) -> Sequence[tuple[Where, int | None]]:
        return [(~self.body, self.head_steps), (self.body, None)]

    def weights(self, replies: Mapping[ClientId, Parcel], turn: Turn) -> list[float]:
        return turn.told(replies)  # of the body's steps
