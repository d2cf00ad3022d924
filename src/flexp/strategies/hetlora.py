"""HetLoRA (Cho et al., 2024, arXiv 2401.06432): pairs of other ranks, padded with zeros.

Round: client i gets the first r_i rows of A and columns of B, and trains them;
    A <- sum_i w_i pad(A_i),  B <- sum_i w_i pad(B_i),  w_i ~ |B_i A_i|_F  for each matrix ("norm"),
or w_i = p_i ("rows"). Equal ranks and p_i: FedAvg. Rows that few clients have are diluted by the
zeros of the others; with ``owners`` row j is the mean over those clients that have it.

With ``decay`` g below 1 clients prune themselves: the rows after the first g r_i are held down by
lam / 2 (|A|^2 + |B|^2), and if |B| |A| of them, summed over matrices, is less after a turn than
before it, the rank is g r_i from then on. That costs a mask of LoRA's size down each turn.

Reconstruction: what is worn is alpha / r_i B_i A_i, so B is scaled where the rank changes, and the
norms are of what is worn. A row that nobody of a round has stays. The paper holds |B| |A| down.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from flexp.client.desk import Desk
from flexp.model.ops import SlotSpec
from flexp.parcel import Parcel
from flexp.products import lora_pairs, product_norm
from flexp.strategies.base import ClientId, Scene, Turn
from flexp.strategies.flexlora import FlexLora
from flexp.strategies.ranks import LORA, Ranked, after, first, norm_after, padded, rank_of
from flexp.tensors import Tensors, Term, mean


@dataclass(frozen=True)
class HetLora(FlexLora):
    """Factors padded with zeros and averaged, and cut to the first rows of each client's rank.

    ``weigh`` by the norm of what a client wears, or by its rows; ``owners``: a row is averaged over
    the clients that have it. Clients prune their ranks by ``decay``.
    """

    weigh: Literal["norm", "rows"] = "norm"
    owners: bool = False
    decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    lam: NonNegativeFloat = 0.005

    name: ClassVar[str] = "hetlora"
    paper: ClassVar[str] = "Cho et al. 2024, arXiv 2401.06432"
    reconstruction: ClassVar[str] = "B is scaled where the rank changes; what holds rows down"

    def specs(self) -> Mapping[str, SlotSpec]:
        pruned = {"personal": SlotSpec(any_rank=True), "last": SlotSpec(any_rank=True)}
        return pruned if self.decay < 1 else self.slots

    def start(self, scene: Scene) -> Ranked:
        rank = super().start(scene).rank
        widest = max(seat.rank or rank for seat in scene.seats.values())
        return Ranked(rank, scene.initial(self.slots["personal"], widest))

    def offer(self, state: Ranked, client: ClientId, turn: Turn) -> Parcel:
        parcel = super().offer(state, client, turn)
        if self.decay == 1 or not parcel.adapters:
            return parcel
        last = after(parcel.adapters["personal"], kept(state.of(client, turn), self.decay))
        return Parcel({**parcel.adapters, "last": last}, facts={"held down": True})

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        if not offer.facts.get("held down"):
            return super().train(desk, offer)
        desk.assign("last", (Term("last", 0.0),), where=~LORA)
        facts = desk.fit(add=(Term("personal", self.lam, times="last"),))
        return desk.reply("personal", facts=facts)

    def merge(self, state: Ranked, replies: Mapping[ClientId, Parcel], turn: Turn) -> Ranked:
        trained = [reply.adapters["personal"] for reply in replies.values()]
        if not trained:
            return state
        rows, rank = turn.weights(list(replies)), state.widest(turn, [*trained, state.adapter])
        ranks, wide = [rank_of(one) for one in trained], [padded(one, rank) for one in trained]
        merged, before = mean(wide, rows), padded(state.adapter, rank)
        for a, b in lora_pairs(merged).values():
            weights = self.weights([(one[a], one[b]) for one in wide], rows)
            merged |= mean([{a: one[a], b: one[b]} for one in wide], weights)
            share = owned(ranks, weights, rank).to(merged[a])
            by = share if self.owners else torch.ones_like(share)
            merged[a] = torch.where(share[:, None] == 0, before[a], merged[a] / by[:, None])
            merged[b] = torch.where(share == 0, before[b], merged[b] / by)
        pruned = dict(state.ranks)
        for client, one in zip(replies, trained, strict=True) if self.decay < 1 else ():
            less = kept(rank_of(one), self.decay)
            if norm_after(one, less) < norm_after(self.sized(state.adapter, rank_of(one)), less):
                pruned[client] = less
        return Ranked(state.rank, merged, pruned)

    def weights(self, pairs: Sequence[tuple[Tensor, Tensor]], rows: list[float]) -> list[float]:
        """How much each client counts for a matrix; by rows as long as nobody wears anything."""
        norms = [product_norm(a, b) for a, b in pairs] if self.weigh == "norm" else rows
        return norms if any(norms) else rows

    def sized(self, adapter: Tensors, rank: int) -> Tensors:
        return first(adapter, rank)


def owned(ranks: Sequence[int], weights: Sequence[float], rank: int) -> Tensor:
    """The share of the weights that is of clients which have a row, by row."""
    held = [sum(w for r, w in zip(ranks, weights, strict=True) if row < r) for row in range(rank)]
    return torch.tensor(held) / sum(weights)


def kept(rank: int, decay: float) -> int:
    """The rank that a client prunes itself to."""
    return max(1, int(decay * rank))
