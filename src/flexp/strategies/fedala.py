"""FedALA (Zhang et al., 2023, arXiv 2212.01197): what to keep of the own model is learned.

Round, with w_g as received and w_i where the client ended:
    w_i <- w_g + V (w_i - w_g)      V in [0, 1], elementwise; V = 0 below the last layers
    w_i <- E local epochs from there;  w_g <- sum_i p_i w_i
Before, V <- clip(V - eta grad f (w_i - w_g)) on a part of the client's rows: for one pass, but in
its first time until the loss has settled. V is 1 - W of the paper, so it begins at 0 and w_g comes
out to the last bit. Where nothing is learned it is FedAvg.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from statistics import pstdev
from typing import Annotated, Any, ClassVar, cast

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from flexp.client.desk import Desk
from flexp.model.ops import Optim, SlotSpec
from flexp.parcel import Parcel
from flexp.privacy.egress import Leave
from flexp.selection import ALL, Where
from flexp.strategies.base import ClientId, MethodKind, Scene, Setting, Strategy, Turn
from flexp.tensors import Mix, Tensors, Term, mean, total

MIX: Mix = (Term("shared"), Term("gap", times="kept"))
SETTLED = 10  # passes whose losses differ little


@dataclass(frozen=True)
class FedAla(Strategy[Tensors]):
    """FedAvg whose clients keep of their own last layers what they have learned to keep.

    ``blocks`` of the model's end and the head are the last layers. ``rate`` is eta, ``rows`` the
    part of a client's rows that V is learned on. The first time ends when the losses of 10 passes
    have a standard deviation below ``settled``, or after ``passes``.
    """

    blocks: NonNegativeInt = 1
    rate: NonNegativeFloat = 1.0
    rows: Annotated[float, Field(gt=0, le=1)] = 0.8
    settled: NonNegativeFloat = 0.1
    passes: PositiveInt = 30

    name: ClassVar[str] = "fedala"
    paper: ClassVar[str] = "Zhang et al. 2023, arXiv 2212.01197"
    kind: ClassVar[MethodKind] = "personalised"
    own: ClassVar[Where] = ALL
    reconstruction: ClassVar[str] = "the most passes of the first time"
    alone: ClassVar[bool] = False
    slots: ClassVar[Mapping[str, SlotSpec]] = {
        "personal": SlotSpec(lasts="run"),
        "shared": SlotSpec(),
        "gap": SlotSpec(),
        "kept": SlotSpec(lasts="run"),
    }
    leaves: ClassVar[tuple[Leave, ...]] = (Leave("personal", why="to be averaged"),)

    def refuses(self, setting: Setting) -> str:
        if not (setting.head or self.blocks):
            return "the head is its last layer and nobody trains one here. Set strategy.blocks."
        return super().refuses(setting)

    def specs(self) -> Mapping[str, SlotSpec]:
        plain = Optim("sgd", lr=self.rate)
        return {**self.slots, "kept": replace(self.slots["kept"], optim=plain)}

    def start(self, scene: Scene) -> Tensors:
        return scene.initial(self.slots["personal"])

    def offer(self, state: Tensors, client: ClientId, turn: Turn) -> Parcel:
        return Parcel({"shared": state})

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        if "learned" not in desk.memory.facts:
            desk.memory.facts["learned"] = False
            desk.assign("kept", (Term("kept", 0.0),))
        desk.assign("gap", (Term("personal"), Term("shared", -1.0)))
        last = Where(last=self.blocks)
        if self.rate and total(desk.dot("gap", "gap", where=last)):
            self.learn(desk, last)
        desk.assign("personal", MIX)
        facts = desk.fit()
        return desk.reply("personal", facts=facts)

    def learn(self, desk: Desk, last: Where) -> None:
        """V, for one pass, or in the client's first time until the loss has settled."""
        first, losses = not desk.memory.facts["learned"], list[float]()
        desk.memory.facts["learned"] = True
        for _ in range(self.passes if first else 1):
            losses += [self.passed(desk, last)]
            if len(losses) >= SETTLED and pstdev(losses[-SETTLED:]) < self.settled:
                return

    def passed(self, desk: Desk, last: Where) -> float:
        """The loss of the last batch of a pass; each batch moves V, which stays within 0 and 1."""
        size, loss = min(desk.training.batch, desk.shard.rows), 0.0
        count = max(1, round(self.rows * desk.shard.rows / size))
        for batch in islice(desk.batches(epochs=1), count):
            facts = desk.fit(wear=MIX, train={"kept": last}, batches=iter([batch]))
            desk.assign("kept", (Term("kept"),), clip=(0.0, 1.0))
            loss = float(cast("Any", facts["loss"]) or 0.0)
        return loss

    def merge(self, state: Tensors, replies: Mapping[ClientId, Parcel], turn: Turn) -> Tensors:
        trained = [reply.adapters["personal"] for reply in replies.values()]
        return mean(trained, turn.told(replies)) if trained else state
