"""PFSL (Wadhwa et al., 2023, arXiv 2303.10624): thin clients between a frozen front and own backs.

Three parts of a model: front (client, frozen), centre (server, its last blocks train), back (client
with head, loss and labels; all of it trains). Each client has a copy of the centre and an optimizer
of its own for the run, so no gradient goes back to the front: 3 S a step. Round:
    before ``checkpoint``  (c_i, b_i) <- E local epochs from (c, b);  c, b <- mean of c_i, b_i
    from then on           b_i <- E local epochs on the constant outputs of c, beginning at b
Means are uniform: everybody does equal work. Public code averages backs once more in the round of
the checkpoint: a slip. With train.cache outputs of the centre cross once per row and turn then.
`flexp_sfl` with a frozen front, align 1 and the same ``until`` does the same where the whole centre
trains. Reconstruction: with cuts of several depths a tensor is averaged over those for whom it is
no front.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from pydantic import NonNegativeInt

from flexp.model.ops import SlotSpec
from flexp.parcel import Parcel
from flexp.privacy.egress import Leave
from flexp.selection import FRONT, NEAR, TRUNK, Where
from flexp.strategies.base import ClientId, MethodKind, Setting, Turn
from flexp.strategies.shared_until import SharedUntil

BACK = NEAR & ~FRONT


@dataclass(frozen=True)
class Pfsl(SharedUntil):
    """Frozen front, averaged centre and back; from a round on only backs train, each for itself.

    ``checkpoint`` is that round (None: after five sixths of the run, as the paper's 25 of 30; a
    run's length or more: never). ``centre`` is how many of the trunk's last blocks train.
    """

    checkpoint: NonNegativeInt | None = None
    centre: NonNegativeInt = 2

    name: ClassVar[str] = "pfsl"
    paper: ClassVar[str] = "Wadhwa et al. 2023, arXiv 2303.10624"
    kind: ClassVar[MethodKind] = "split"
    own: ClassVar[Where] = BACK
    alone: ClassVar[bool] = False
    reconstruction: ClassVar[str] = (
        "cuts of several depths: a mean over those who have no front there"
    )
    slots: ClassVar[Mapping[str, SlotSpec]] = {"personal": SlotSpec(lasts="run", moments="keep")}
    leaves: ClassVar[tuple[Leave, ...]] = (
        Leave("personal", BACK, when="every round before the checkpoint", why="backs are averaged"),
    )

    def refuses(self, setting: Setting) -> str:
        if any(seat.labels != "keep" for seat in setting.seats.values()):
            return 'its back, head and labels are at the client. Set plan.labels to "keep".'
        whole = [c for c, seat in setting.seats.items() if seat.near_only(setting.depth)]
        if whole:
            return f'a front is frozen, and "{whole[0]}" has the whole model. Give it a cut.'
        return super().refuses(setting)

    def moving(self) -> Where:
        return BACK | (TRUNK & Where(nearest=self.centre))

    def settled(self, turn: Turn) -> bool:
        last = turn.rounds * 5 // 6 if self.checkpoint is None else self.checkpoint
        return turn.round >= last

    def tuned(self) -> tuple[Where, int | None]:
        return BACK, None

    def weights(self, replies: Mapping[ClientId, Parcel], turn: Turn) -> list[float]:
        return [1.0] * len(replies)
