"""FlexP-SFL read after its first version (Yuan, Geng et al. 2025, arXiv 2508.10349 v1).

Its abstract does not say that client weights stay. Our reading: near parts are handed in as well,
and per tensor the reference is the mean over all clients; personal near parts are aligned to it,
never replaced, so alignment to *global* weights. With ``until`` rounds of this, and nothing merged
and no trunk trained from then on, a frozen front and align 1, it works like PFSL (Wadhwa et al.
2023, arXiv 2303.10624).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import NonNegativeInt

from flexp.client.desk import Desk
from flexp.parcel import Parcel
from flexp.privacy.egress import Leave
from flexp.selection import ALL, FRONT, NEAR, NONE, Where
from flexp.strategies.base import ClientId, Setting, Turn
from flexp.strategies.flexp import FlexP
from flexp.tensors import Tensors


@dataclass(frozen=True)
class FlexPSfl(FlexP):
    """FlexP-SFL read after its first version: near adapters go up, and their mean is aligned to.

    ``until``: the round from which nothing is merged and trunks stand still (None: never).
    The other options are those of flexp; only where they begin differs.
    """

    head: Literal["free", "aligned", "fixed"] = "aligned"
    until: NonNegativeInt | None = None

    name: ClassVar[str] = "flexp_sfl"
    own: ClassVar[Where] = NEAR
    leaves: ClassVar[tuple[Leave, ...]] = (Leave("personal", NEAR, why="the reference is a mean"),)

    def refuses(self, setting: Setting) -> str:
        if self.server == "sequential":
            return 'the mean of near parts needs a round. Set server to "parallel".'
        return super().refuses(setting)

    def given(self) -> Where:
        return ~FRONT if self.front == "frozen" else ALL

    def over(self, turn: Turn) -> bool:
        """Whether the phase has begun in which nothing is merged."""
        return self.until is not None and turn.round >= self.until

    def offer(self, state: Tensors, client: ClientId, turn: Turn) -> Parcel:
        parcel = super().offer(state, client, turn)
        if self.over(turn):  # the trunk is as it was, and near parts go on from where they are
            return Parcel({s: v for s, v in parcel.adapters.items() if s == "personal"})
        return parcel

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        if offer.facts:
            return super().train(desk, offer)
        facts = desk.fit(train=self.moving() & NEAR)
        return desk.reply("personal", where=NONE, facts=facts)

    def merge(self, state: Tensors, replies: Mapping[ClientId, Parcel], turn: Turn) -> Tensors:
        return state if self.over(turn) else super().merge(state, replies, turn)
