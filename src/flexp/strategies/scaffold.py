"""SCAFFOLD (Karimireddy et al., 2020, arXiv 1910.06378): FedAvg corrected for how clients drift.

Round, with w and c as received:
    y <- y - eta (g(y) - c_i + c)                K local steps from y = w
    c_i+ <- c_i - c + (w - y) / (K eta)          option II
    w <- w + eta_s mean(y - w);  c <- c + |S|/N mean(c_i+ - c_i)
Means are over clients, each as one, as in the paper. K eta is the sum of step sizes, so clients
take plain SGD steps, at most with weight decay. The server keeps sum c_i, of which c is the N-th
part. Twice the traffic of FedAvg. With no controls yet the first round is FedAvg's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from pydantic import PositiveFloat

from flexp.client.desk import Desk
from flexp.model.ops import SlotSpec
from flexp.parcel import Facts, Parcel
from flexp.privacy.egress import Leave
from flexp.selection import HEAD, Where
from flexp.strategies.base import ClientId, MethodKind, Scene, Setting, Strategy, Turn
from flexp.tensors import Tensors, Term, add, lerp, mean, scale


@dataclass(frozen=True)
class Controlled:
    """The shared adapter, and the sum of all clients' controls."""

    adapter: Tensors
    controls: Tensors


@dataclass(frozen=True)
class Scaffold(Strategy[Controlled]):
    """FedAvg, each step corrected by how the client's gradients differ from everybody's.

    ``server_lr`` is eta_s, how much of the mean move the server makes; the paper's is 1.
    """

    server_lr: PositiveFloat = 1.0

    name: ClassVar[str] = "scaffold"
    paper: ClassVar[str] = "Karimireddy et al. 2020, arXiv 1910.06378"
    kind: ClassVar[MethodKind] = "federated"
    slots: ClassVar[Mapping[str, SlotSpec]] = {
        "personal": SlotSpec(),
        "given": SlotSpec(),
        "common": SlotSpec(),
        "control": SlotSpec(lasts="run"),
        "change": SlotSpec(),
    }
    leaves: ClassVar[tuple[Leave, ...]] = (
        Leave("personal", why="to be averaged"),
        Leave("change", why="the common control is the mean of the clients'"),
    )

    def refuses(self, setting: Setting) -> str:
        how = setting.training
        if how.optim.name != "sgd" or how.optim.momentum or how.clip_norm is not None:
            return super().refuses(setting) or (
                "controls are a client's moves divided by the sum of its step sizes, which only "
                "plain SGD has. Set train.optimizer=sgd, without train.momentum and clip_norm."
            )
        return super().refuses(setting)

    def start(self, scene: Scene) -> Controlled:
        begun = scene.initial(self.slots["personal"])
        return Controlled(begun, scale(begun, 0.0))

    def offer(self, state: Controlled, client: ClientId, turn: Turn) -> Parcel:
        common = scale(state.controls, 1 / len(turn.seats))
        return Parcel({"personal": state.adapter, "common": common})

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        if "controlled" not in desk.memory.facts:
            desk.memory.facts["controlled"] = True
            desk.assign("control", (Term("control", 0.0),))
        desk.assign("given", (Term("personal"),))
        facts = desk.fit(add=(Term("control", -1.0), Term("common")))
        desk.assign("change", (Term("control", 0.0),))
        desk.assign("given", (Term("given"), Term("personal", -1.0)))
        for where, length in self.lengths(desk, facts):
            desk.assign("change", (Term("given", 1 / length), Term("common", -1.0)), where=where)
        desk.assign("control", (Term("control"), Term("change")))
        return desk.reply("personal", "change", facts=facts)

    def lengths(self, desk: Desk, facts: Facts) -> Iterator[tuple[Where, float]]:
        """K eta, of blocks and of the head; nothing if no step was taken."""
        optim, told = desk.training.optim, cast("Any", facts)
        if steps := told["steps"] - told["skipped"]:
            yield ~HEAD, steps * optim.lr
            yield HEAD, steps * (optim.lr if optim.head_lr is None else optim.head_lr)

    def merge(
        self, state: Controlled, replies: Mapping[ClientId, Parcel], turn: Turn
    ) -> Controlled:
        if not replies:
            return state
        middle = mean([r.adapters["personal"] for r in replies.values()], [1.0] * len(replies))
        controls = state.controls
        for reply in replies.values():
            controls = add(controls, reply.adapters["change"])
        return Controlled(lerp(state.adapter, middle, self.server_lr), controls)
