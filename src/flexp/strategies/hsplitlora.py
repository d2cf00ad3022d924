"""HSplitLoRA (Lin et al., 2025, arXiv 2505.02795): SplitLoRA for devices that are not alike.

Cuts and ranks are each client's own, as its device allows. One server adapter, of the recipe's
rank, is trained on the stream of all clients; after every I rounds client adapters of unequal rank
are put together without cross terms: per matrix the pairs of those who have it near are stacked, so
that the product is sum_i p_i s_i B_i A_i, and every client gets the best pair for that. Of which
rank goes by how important the matrix is: a client's pairs together are as large as if all had the
rank of its seat, each has at least 1 and at most twice the widest.

Reconstruction: importance is how far averages have moved what a matrix wears, summed over them
(the paper adds up gradients times weights); the cut back to a rank by SVD; the stream by turns as
in `splitlora`. The recipe says which matrices are adapted, the plan ranks and cuts. A pair that
gets another rank begins with new moments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from flexp.model.ops import SlotSpec
from flexp.parcel import Parcel
from flexp.products import gram_distance, lora_pairs
from flexp.strategies.base import ClientId, Scene, Setting, Turn
from flexp.strategies.ranks import (
    allotted,
    first,
    no_product,
    padded,
    rank_of,
    stacked,
    truncated,
)
from flexp.strategies.splitfed_v2 import Fronts
from flexp.strategies.splitlora import SplitLora
from flexp.tensors import Tensors


@dataclass(frozen=True)
class HSplitLora(SplitLora):
    """SplitLoRA with a rank per client: client LoRAs are stacked, and cut to each rank.

    ``every`` is I, in rounds. ``ranks``: by importance, or all of a client's as its seat says.
    """

    ranks: Literal["importance", "seat"] = "importance"

    name: ClassVar[str] = "hsplitlora"
    paper: ClassVar[str] = "Lin et al. 2025, arXiv 2505.02795"
    reconstruction: ClassVar[str] = "importance by moves; cut back by SVD; by turns"
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
        return Parcel({"personal": first(near, self.of_pairs(state, near, rank), balanced=True)})

    def of_pairs(self, state: Fronts, near: Tensors, rank: int) -> int | dict[str, int]:
        """The ranks of a client's near pairs, whose seat says ``rank``."""
        if self.ranks == "seat":
            return rank
        sizes = {p: near[a].shape[1] + len(near[b]) for p, (a, b) in lora_pairs(near).items()}
        return allotted(state.worth, sizes, rank, rank_of(state.common))

    def averaged(self, state: Fronts) -> Fronts:
        fronts, rows = state.in_order()
        room = 2 if self.ranks == "importance" and not state.count else 1
        rank = max(room * rank_of(state.common), *map(rank_of, fronts))
        merged = truncated(stacked(fronts, rows), rank)
        moved = {p: apart(state.common, merged, p) for p in lora_pairs(merged)}
        worth = {p: state.worth.get(p, 0.0) + moved.get(p, 0.0) for p in {**state.worth, **moved}}
        return replace(state.renewed({**padded(state.common, rank), **merged}), worth=worth)


def apart(one: Tensors, other: Tensors, path: str) -> float:
    """How far apart what two adapters wear of a matrix is, but for alpha."""
    names = f"{path}.lora_A.weight", f"{path}.lora_B.weight"
    (a, b), (a2, b2) = ([x[n] for n in names] for x in (one, other))
    return float(gram_distance(a, b / len(a), a2, b2 / len(a2)).clamp(min=0).sqrt())
