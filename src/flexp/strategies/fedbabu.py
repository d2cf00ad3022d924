"""FedBABU (Oh, Kim and Yun, 2022, arXiv 2106.06042): the body learns while the head stands still.

Round: w_i <- E local epochs from w with the head as everybody began;  w <- sum_i p_i w_i.
At the end every client fine-tunes: here in the last rounds, in which nothing is averaged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import NonNegativeInt

from flexp.client.desk import Desk
from flexp.model.ops import SlotSpec
from flexp.parcel import Parcel
from flexp.selection import ALL, NONE, Where
from flexp.strategies.base import ClientId, Served, Turn
from flexp.strategies.fedper import FedPer
from flexp.tensors import Tensors, Term


@dataclass(frozen=True)
class FedBabu(FedPer):
    """FedAvg of the body under a fixed head; in the last rounds everybody fine-tunes alone.

    ``tune_rounds`` of the run's end are for fine-tuning ``tune``: "all" or the "head".
    ``blocks`` of the model's end belong to the head.
    """

    tune: Literal["all", "head"] = "all"
    tune_rounds: NonNegativeInt = 1

    name: ClassVar[str] = "fedbabu"
    paper: ClassVar[str] = "Oh et al. 2022, arXiv 2106.06042"
    own: ClassVar[Where] = ALL
    slots: ClassVar[Mapping[str, SlotSpec]] = {
        "personal": SlotSpec(lasts="run"),
        "tuned": SlotSpec(lasts="run"),
    }

    def owns(self) -> Where:
        tuned = ALL if self.tune == "all" else ~self.body
        return tuned if self.tune_rounds else NONE

    def moving(self) -> Where:
        return self.body

    def phases(self) -> Sequence[tuple[Where, int | None]]:
        return [(self.body, None)]

    def tuning(self, turn: Turn) -> bool:
        """Whether it is one of the last rounds."""
        return turn.round >= turn.rounds - self.tune_rounds

    def offer(self, state: Tensors, client: ClientId, turn: Turn) -> Parcel:
        parcel = super().offer(state, client, turn)
        return Parcel(parcel.adapters, facts={"tune": self.tuning(turn)})

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        if not offer.facts["tune"]:
            return super().train(desk, offer)
        if "tuned" not in desk.memory.facts:
            desk.memory.facts["tuned"] = True
            desk.assign("tuned", (Term("personal"),))
        facts = desk.fit(wear="tuned", train=self.owns())
        return desk.reply("personal", where=NONE, facts=facts)

    def merge(self, state: Tensors, replies: Mapping[ClientId, Parcel], turn: Turn) -> Tensors:
        return state if self.tuning(turn) else super().merge(state, replies, turn)

    def personal(self, desk: Desk, offer: Parcel) -> Served:
        slot = "tuned" if "tuned" in desk.memory.facts else "personal"
        return Served(lambda batch: desk.model.logits(batch, slot), slot)
