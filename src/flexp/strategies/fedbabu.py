"""FedBABU (Oh, Kim and Yun, 2022, arXiv 2106.06042): the body learns while the head stands still.

Round: w_i <- E local epochs from w with the head as everybody began;  w <- sum_i p_i w_i.
At the end every client fine-tunes: here in the last rounds, in which nothing is averaged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import NonNegativeInt, PositiveInt

from flexp.privacy.egress import Leave
from flexp.selection import ALL, HEAD, NONE, Where
from flexp.strategies.base import Setting, Turn
from flexp.strategies.fedper import no_head
from flexp.strategies.shared_until import SharedUntil


@dataclass(frozen=True)
class FedBabu(SharedUntil):
    """FedAvg of the body under a fixed head; in the last rounds everybody fine-tunes alone.

    ``tune_rounds`` of the run's end are for fine-tuning ``tune``: "all" or the "head", for
    ``tune_steps`` in each (None: the recipe's). ``blocks`` of the model's end belong to the head.
    """

    blocks: int = 0
    tune: Literal["all", "head"] = "all"
    tune_rounds: NonNegativeInt = 1
    tune_steps: PositiveInt | None = None

    name: ClassVar[str] = "fedbabu"
    paper: ClassVar[str] = "Oh et al. 2022, arXiv 2106.06042"
    own: ClassVar[Where] = ALL
    leaves: ClassVar[tuple[Leave, ...]] = (Leave("personal", ~HEAD, why="to be averaged"),)

    def refuses(self, setting: Setting) -> str:
        return no_head(self.blocks, setting) or self.unequal_ranks(setting)

    def owns(self) -> Where:
        return self.tuned()[0] if self.tune_rounds else NONE

    def moving(self) -> Where:
        return ~Where(last=self.blocks)

    def settled(self, turn: Turn) -> bool:
        return turn.round >= turn.rounds - self.tune_rounds

    def tuned(self) -> tuple[Where, int | None]:
        return (ALL if self.tune == "all" else ~self.moving()), self.tune_steps
