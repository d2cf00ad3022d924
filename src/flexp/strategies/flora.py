"""FLoRA (Wang et al., 2024, arXiv 2409.05976): pairs are stacked, which averages products exactly.

Round: every client trains a fresh pair of rank r_i on top of W;  A <- [A_1; ...; A_N] and
B <- [p_1 B_1 ... p_N B_N], only B weighted, so that B A = sum_i p_i B_i A_i;  W <- W + B A.
Ranks may differ. The head is averaged.

Reconstruction: the frozen weights are one copy for everybody, so the sum of all stacks is a slot
that is worn beside them. It grows by sum r_i a round, and is what everybody is offered. Beyond the
size of the matrices it is factored anew, which loses nothing; beyond ``most``, if that is less, it
is cut to the best of that rank. A fresh pair begins as everybody's did, every round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from pydantic import PositiveInt

from flexp.client.desk import Desk
from flexp.model.ops import SlotSpec
from flexp.parcel import Parcel
from flexp.privacy.egress import Leave
from flexp.products import lora_pairs, worn_sum
from flexp.strategies.base import ClientId, MethodKind, Scene, Served, Setting, Strategy, Turn
from flexp.strategies.ranks import LORA, no_product, rank_of, stacked, truncated
from flexp.tensors import Stacked, Tensors, Term

BOTH = Stacked((Term("merged"), Term("personal")))


@dataclass(frozen=True)
class Flora(Strategy[Tensors]):
    """Fresh LoRA each round, stacked and merged: the exact mean of products; ranks may differ.

    ``most`` is the largest rank of what is merged (None: that of the matrices, which is exact).
    """

    most: PositiveInt | None = None

    name: ClassVar[str] = "flora"
    paper: ClassVar[str] = "Wang et al. 2024, arXiv 2409.05976"
    kind: ClassVar[MethodKind] = "federated LoRA"
    alone: ClassVar[bool] = False
    reconstruction: ClassVar[str] = (
        "what is merged is worn beside the weights, all of it is offered"
    )
    slots: ClassVar[Mapping[str, SlotSpec]] = {
        "personal": SlotSpec(),
        "merged": SlotSpec(any_rank=True),
    }
    leaves: ClassVar[tuple[Leave, ...]] = (
        Leave("personal", LORA, why="to be stacked"),
        Leave("merged", ~LORA, why="heads are averaged"),
    )

    def refuses(self, setting: Setting) -> str:
        return self.without_lora(setting) or no_product(setting) or self.unequal_heads(setting)

    def start(self, scene: Scene) -> Tensors:
        return {}

    def offer(self, state: Tensors, client: ClientId, turn: Turn) -> Parcel:
        return Parcel({"merged": state})

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        desk.assign("personal", (Term("personal", 0.0),), where=~LORA)  # there is one head
        moving = {"personal": LORA, "merged": ~LORA}
        facts = desk.fit(wear=BOTH, train=moving)
        return desk.reply(where=moving, facts=facts)

    def merge(self, state: Tensors, replies: Mapping[ClientId, Parcel], turn: Turn) -> Tensors:
        if not replies:
            return state
        trained = [{**r.adapters["personal"], **r.adapters["merged"]} for r in replies.values()]
        merged = stacked(trained, turn.weights(list(replies)))
        pairs = lora_pairs(merged).values()
        full = max((min(merged[a].shape[1], len(merged[b])) for a, b in pairs), default=0)
        for a, b in pairs if state else ():
            merged[a], merged[b] = worn_sum([(x[a], x[b], 1.0) for x in (state, merged)])
        most = min(full, self.most or full)
        return truncated(merged, most) if rank_of(merged) > most else merged

    def personal(self, desk: Desk, offer: Parcel) -> Served:
        return Served(lambda batch: desk.model.logits(batch, "merged"), "merged")
