"""Ditto (Li et al., 2021, arXiv 2012.04221): a shared model and, held near it, a personal one.

Round, with w the shared adapter as received:
    v_i <- E local epochs on  F_i(v_i) + lambda/2 |v_i - w|^2      personal, never leaves
    w_i <- E local epochs from w on F_i;  w <- sum_i p_i w_i       FedAvg
Twice the work of FedAvg. lambda = 0: v_i is local, w is FedAvg's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from flexp.client.desk import Desk, Drag
from flexp.model.ops import SlotSpec
from flexp.parcel import Parcel
from flexp.privacy.egress import Leave
from flexp.selection import ALL, Where
from flexp.strategies.base import ClientId, MethodKind, Scene, Strategy, Turn
from flexp.tensors import Tensors, mean


@dataclass(frozen=True)
class Ditto(Strategy[Tensors]):
    """A shared adapter by FedAvg, and a personal one that is pulled towards it.

    ``lam`` is lambda, the weight of the pull; the paper's are 0.05 to 2.
    """

    lam: float = 0.1

    name: ClassVar[str] = "ditto"
    paper: ClassVar[str] = "Li et al. 2021, arXiv 2012.04221"
    kind: ClassVar[MethodKind] = "personalised"
    own: ClassVar[Where] = ALL
    slots: ClassVar[Mapping[str, SlotSpec]] = {
        "personal": SlotSpec(lasts="run", moments="keep"),
        "shared": SlotSpec(),
    }
    leaves: ClassVar[tuple[Leave, ...]] = (Leave("shared", why="to be averaged"),)

    def start(self, scene: Scene) -> Tensors:
        return scene.initial(self.slots["shared"])

    def offer(self, state: Tensors, client: ClientId, turn: Turn) -> Parcel:
        return Parcel({"shared": state})

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        facts = desk.fit(pull=[Drag("shared", self.lam)])
        desk.fit(wear="shared")
        return desk.reply("shared", facts=facts)

    def merge(self, state: Tensors, replies: Mapping[ClientId, Parcel], turn: Turn) -> Tensors:
        trained = [reply.adapters["shared"] for reply in replies.values()]
        return mean(trained, turn.weights(list(replies))) if trained else state
