"""FedAvgM (Hsu, Qi and Brown, 2019, arXiv 1909.06335): FedAvg with momentum at the server.

Round: w_i <- E local epochs from w;  v <- beta v + sum_i p_i (w_i - w);  w <- w + v.
It is computed as  w' <- sum_i p_i w_i + beta v;  v <- w' - w,  which is the same, and for beta = 0
FedAvg bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from flexp.client.desk import Desk
from flexp.model.ops import SlotSpec
from flexp.parcel import Parcel
from flexp.privacy.egress import Leave
from flexp.strategies.base import ClientId, MethodKind, Scene, Strategy, Turn
from flexp.tensors import Tensors, add, mean, scale


@dataclass(frozen=True)
class Moving:
    """The shared adapter, and how far it moved in the last round."""

    adapter: Tensors
    velocity: Tensors


@dataclass(frozen=True)
class FedAvgM(Strategy[Moving]):
    """FedAvg whose server keeps moving the way that it moved before.

    ``beta`` is how much of the last move is made again; the paper's are 0 to 0.997.
    """

    beta: float = 0.9

    name: ClassVar[str] = "fedavgm"
    paper: ClassVar[str] = "Hsu et al. 2019, arXiv 1909.06335"
    kind: ClassVar[MethodKind] = "federated"
    slots: ClassVar[Mapping[str, SlotSpec]] = {"personal": SlotSpec()}
    leaves: ClassVar[tuple[Leave, ...]] = (Leave("personal", why="to be averaged"),)

    def start(self, scene: Scene) -> Moving:
        begun = scene.initial(self.slots["personal"])
        return Moving(begun, scale(begun, 0.0))

    def offer(self, state: Moving, client: ClientId, turn: Turn) -> Parcel:
        return Parcel({"personal": state.adapter})

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        facts = desk.fit()
        return desk.reply("personal", facts=facts)

    def merge(self, state: Moving, replies: Mapping[ClientId, Parcel], turn: Turn) -> Moving:
        if not replies:
            return state
        trained = [reply.adapters["personal"] for reply in replies.values()]
        average = mean(trained, turn.weights(list(replies)))
        moved = add(average, state.velocity, self.beta)
        return Moving(moved, add(moved, state.adapter, -1.0))
