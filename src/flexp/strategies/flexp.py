"""FlexP-SFL: flexible cuts, personal near parts, a trunk learned together, and alignment.

Yuan, Geng et al. 2025, arXiv 2508.10349 (v2: FlexP-SFT). Reconstruction: the abstracts fix the
U-shape, a cut per client, no upload of client weights and an alignment that works layer by layer;
the formulas here are ours.

    min  sum_i p_i F_i(u_i, phi)  +  lambda/2 sum_i p_i sum_l |dW_i,l - dW_ref,l|_F^2

u_i: adapters of client i's near blocks and head; phi: adapters of far blocks. Round: every client
trains u_i and a copy of phi (server mode "parallel"); per tensor, phi <- weighted mean over the
clients that host it far. dW_ref,l is phi where somebody hosts block l far, else the pretrained 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from flexp.client.desk import Desk, Drag
from flexp.model.ops import SlotSpec
from flexp.parcel import Parcel
from flexp.strategies.base import ClientId, MethodKind, Scene, Strategy, Turn
from flexp.tensors import FAR, HEAD, NEAR, Tensors, Where, mean_by_name


@dataclass(frozen=True)
class FlexP(Strategy[Tensors]):
    """Near parts stay personal and never leave; far parts are merged per block over their hosts.

    ``align`` is lambda of form A (products), 0 switches it off; ``align_head`` pulls the head
    towards its start, for clients with the same labels.
    """

    align: float = 0.1
    align_head: bool = True
    form: Literal["product", "factors"] = "product"

    name: ClassVar[str] = "flexp"
    paper: ClassVar[str] = "Yuan, Geng et al. 2025, arXiv 2508.10349"
    kind: ClassVar[MethodKind] = "split"
    own: ClassVar[Where] = NEAR
    reconstruction: ClassVar[str] = "alignment, server merge and split choice are our reading"
    slots: ClassVar[Mapping[str, SlotSpec]] = {
        "personal": SlotSpec(lasts="run", moments="keep"),
        "reference": SlotSpec(),
    }

    def start(self, scene: Scene) -> Tensors:
        return {}

    def offer(self, state: Tensors, client: ClientId, turn: Turn) -> Parcel:
        adapters = {"personal": turn.select(client, state, FAR)}
        if self.align:
            adapters["reference"] = turn.select(client, state, NEAR)
        return Parcel(adapters)

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        near = NEAR if self.align_head else NEAR & ~HEAD
        pull = [Drag("reference", self.align, near, self.form)] if self.align else []
        facts = desk.fit(pull=pull)
        return desk.reply("personal", where=FAR, facts=facts)

    def merge(self, state: Tensors, replies: Mapping[ClientId, Parcel], turn: Turn) -> Tensors:
        trained = [reply.adapters["personal"] for reply in replies.values()]
        return {**state, **mean_by_name(trained, turn.weights(list(replies)))}
