"""FlexP-SFL read after its first version (Yuan, Geng et al. 2025, arXiv 2508.10349 v1).

Its abstract does not say that client weights stay. Our reading: near parts are handed in as well,
and per tensor the reference is the mean over all clients; personal near parts are aligned to it,
never replaced, so alignment to *global* weights. With ``until`` rounds of this, and nothing merged
and no trunk trained from then on, a frozen front and align 1, it is `pfsl` where that method trains
the whole trunk.
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

    def averages(self) -> Where:
        return NONE

    def over(self, turn: Turn) -> bool:
        """Whether the phase has begun in which nothing is merged."""
        return self.until is not None and turn.round >= self.until

    def offer(self, state: Tensors, client: ClientId, turn: Turn) -> Parcel:
        parcel = super().offer(state, client, turn)
        if not self.over(turn):
            return parcel
        if turn.round == self.until:  # what was merged last is aligned to for the last time
            return Parcel(parcel.adapters, facts={**parcel.facts, "over": True})
        # The trunk is as it was, and near parts go on from where they are.
        adapters = {s: v for s, v in parcel.adapters.items() if s == "personal"}
        return Parcel(adapters, facts={"over": True})

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        if "over" not in offer.facts:
            return super().train(desk, offer)
        if "strength" in offer.facts:
            self.restart(desk, float(str(offer.facts["strength"])))
        facts = desk.fit(train=self.moving() & NEAR)
        return desk.reply("personal", where=NONE, facts=facts)

    def merge(self, state: Tensors, replies: Mapping[ClientId, Parcel], turn: Turn) -> Tensors:
        return state if self.over(turn) else super().merge(state, replies, turn)
