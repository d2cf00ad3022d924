"""FlexLoRA (Bai et al., 2024, arXiv 2402.11505): products are averaged, and cut to each rank.

Round: (B_i, A_i) of rank r_i <- E local epochs;  dW = sum_i p_i s_i B_i A_i,  s_i = alpha / r_i;
client i gets the best pair of its rank for dW, from the SVD: s_i B_i A_i = U S V^T, cut after r_i,
with the square root of S in either factor, and signs fixed by A. Where r_i is full this is exact.
Before the first merge everybody is as it began.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from flexp.client.desk import Desk
from flexp.model.ops import SlotSpec
from flexp.parcel import Parcel
from flexp.privacy.egress import Leave
from flexp.strategies.base import ClientId, MethodKind, Scene, Setting, Strategy, Turn
from flexp.strategies.ranks import Ranked, first, no_product, rank_of, stacked, truncated
from flexp.tensors import Tensors


@dataclass(frozen=True)
class FlexLora(Strategy[Ranked]):
    """The mean of products, by SVD at the rank of each client; ranks may differ."""

    name: ClassVar[str] = "flexlora"
    paper: ClassVar[str] = "Bai et al. 2024, arXiv 2402.11505"
    kind: ClassVar[MethodKind] = "federated LoRA"
    slots: ClassVar[Mapping[str, SlotSpec]] = {"personal": SlotSpec()}
    leaves: ClassVar[tuple[Leave, ...]] = (Leave("personal", why="products are averaged"),)

    def refuses(self, setting: Setting) -> str:
        return self.without_lora(setting) or no_product(setting) or self.unequal_heads(setting)

    def start(self, scene: Scene) -> Ranked:
        return Ranked(rank_of(scene.initial(self.slots["personal"])), {})

    def offer(self, state: Ranked, client: ClientId, turn: Turn) -> Parcel:
        rank = state.of(client, turn)
        if rank_of(state.adapter) < rank:  # nothing is merged yet, or nothing of that rank
            return Parcel()
        return Parcel({"personal": self.sized(state.adapter, rank)})

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        facts = desk.fit()
        return desk.reply("personal", facts=facts)

    def merge(self, state: Ranked, replies: Mapping[ClientId, Parcel], turn: Turn) -> Ranked:
        trained = [reply.adapters["personal"] for reply in replies.values()]
        if not trained:
            return state
        merged = stacked(trained, turn.weights(list(replies)))
        return Ranked(state.rank, truncated(merged, state.widest(turn, trained)))

    def sized(self, adapter: Tensors, rank: int) -> Tensors:
        """The best of that rank: what was cut to the largest one begins with it."""
        return first(adapter, rank, balanced=True)
