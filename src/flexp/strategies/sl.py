"""Split learning with a relay of clients (Gupta and Raskar, 2018, arXiv 1810.06060).

Clients train strictly in turn: client k+1 first receives client k's front, and goes on with the one
server net. Whole, it is cyclic training of one model. Every turn begins with a fresh optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from flexp.dice import Dice
from flexp.parcel import Parcel
from flexp.privacy.egress import Leave
from flexp.selection import NONE, Where
from flexp.strategies.base import ClientId, MethodKind, Turn
from flexp.strategies.fedavg import FedAvg
from flexp.tensors import Tensors


@dataclass(frozen=True)
class Sl(FedAvg):
    """Clients in turn: each goes on with the front of the one before, on one server net.

    Early clients are forgotten where labels are skewed; a round takes as long as all its turns.
    """

    name: ClassVar[str] = "sl"
    paper: ClassVar[str] = "Gupta and Raskar 2018, arXiv 1810.06060"
    kind: ClassVar[MethodKind] = "split"
    leaves: ClassVar[tuple[Leave, ...]] = (Leave("personal", why="the next client goes on"),)

    def averages(self) -> Where:
        return NONE

    def waves(
        self, state: Tensors, chosen: Sequence[ClientId], dice: Dice
    ) -> Sequence[Sequence[ClientId]]:
        return [[client] for client in sorted(chosen)]

    def merge(self, state: Tensors, replies: Mapping[ClientId, Parcel], turn: Turn) -> Tensors:
        for reply in replies.values():
            state = reply.adapters["personal"]
        return state
