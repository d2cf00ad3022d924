"""HSplitLoRA (Lin et al., 2025, arXiv 2505.02795): SplitLoRA for devices that are not alike.

Cuts and ranks are each client's own, as its device allows. One server adapter, of the recipe's
rank, is trained on the stream of all clients; after every I rounds client adapters of unequal rank
are put together without cross terms: per matrix the pairs of those who have it near are stacked, so
that the product is sum_i p_i s_i B_i A_i, and every client gets the best pair of its rank for that.

Reconstruction: the cut back to a client's rank by SVD, and the stream by turns as in `splitlora`.
Which matrices are adapted says the recipe, and which rank and cut the plan, not a measured
importance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from flexp.model.ops import SlotSpec
from flexp.parcel import Parcel
from flexp.strategies.base import ClientId, Scene, Setting, Turn
from flexp.strategies.ranks import first, no_product, padded, rank_of, stacked, truncated
from flexp.strategies.splitfed_v2 import Fronts
from flexp.strategies.splitlora import SplitLora


@dataclass(frozen=True)
class HSplitLora(SplitLora):
    """SplitLoRA with a rank per client: client LoRAs are stacked, and cut to each rank.

    ``every`` is I, in rounds.
    """

    name: ClassVar[str] = "hsplitlora"
    paper: ClassVar[str] = "Lin et al. 2025, arXiv 2505.02795"
    reconstruction: ClassVar[str] = "cut back by SVD; ranks and cuts are the plan's; by turns"
    slots: ClassVar[Mapping[str, SlotSpec]] = {
        "personal": replace(SplitLora.slots["personal"], any_rank=True)
    }

    def refuses(self, setting: Setting) -> str:
        return no_product(setting) or super().refuses(setting)

    def unequal_ranks(self, setting: Setting) -> str:
        return ""

    def start(self, scene: Scene) -> Fronts:
        rank = rank_of(super().start(scene).common)
        widest = max(seat.rank or rank for seat in scene.seats.values())
        return Fronts(scene.initial(self.slots["personal"], widest), rank=rank)

    def offer(self, state: Fronts, client: ClientId, turn: Turn) -> Parcel:
        near = super().offer(state, client, turn).adapters.get("personal", {})
        rank = turn.seats[client].rank or state.rank
        if not near or rank > rank_of(state.common):
            return Parcel()
        return Parcel({"personal": first(near, rank, balanced=True)})

    def averaged(self, state: Fronts) -> Fronts:
        fronts, rows = state.in_order()
        rank = max(map(rank_of, (state.common, *fronts)))
        merged = truncated(stacked(fronts, rows), rank)
        return state.renewed({**padded(state.common, rank), **merged})
