"""Per-FedAvg (Fallah et al., 2020, arXiv 2002.07948): a common start that one step adapts.

Round: from w, K times, on batches D1, D2, D3 without common rows:
    g <- grad f(w - alpha grad f(w; D1); D2)
    w <- w - beta g                                                        first order
    w <- w - beta (g - alpha H g),  H g ~ (grad f(w + delta g; D3)
                                           - grad f(w - delta g; D3)) / (2 delta)   Hessian-free
then the mean over clients, rows as weights. A client serves w - alpha grad f(w), one step on the
first batch of its own rows. beta is the recipe's optimizer; alpha = 0 is FedAvg on the batches D2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import NonNegativeFloat, PositiveFloat

from flexp.client.desk import Desk
from flexp.client.fit import together
from flexp.data.examples import Batch
from flexp.model.ops import Optim, SlotSpec
from flexp.parcel import Facts, Parcel
from flexp.selection import ALL, NONE, Where
from flexp.strategies.base import Served
from flexp.strategies.fedavg import FedAvg
from flexp.tensors import Mix, Term

DOWN = SlotSpec(optim=Optim("sgd", lr=1.0))  # from 0, one step of it is minus the gradient
HERE = (Term("personal"),)


@dataclass(frozen=True)
class PerFedAvg(FedAvg):
    """FedAvg of a common start that is good after one step of each client's own.

    ``alpha`` is that step's rate. ``form``: "first-order", or "hessian-free" with the second
    derivative by differences of width ``delta``, for twice the work.
    """

    alpha: NonNegativeFloat = 0.01
    form: Literal["first-order", "hessian-free"] = "first-order"
    delta: PositiveFloat = 0.001

    name: ClassVar[str] = "per_fedavg"
    paper: ClassVar[str] = "Fallah et al. 2020, arXiv 2002.07948"
    kind: ClassVar = "personalised"
    own: ClassVar[Where] = ALL
    slots: ClassVar[Mapping[str, SlotSpec]] = {
        "personal": SlotSpec(),
        **dict.fromkeys(("inner", "outer", "ahead", "behind"), DOWN),
    }

    def averages(self) -> Where:
        return NONE

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        count, done = (2 if self.form == "first-order" else 3), list[Facts]()
        for batch in desk.batches(size=count * desk.training.batch):
            parts = batch.parts(count)
            draws = [parts[n % len(parts)] for n in range(count)]  # a client may have one row
            self.descend(desk, HERE, draws[0], "inner")
            done.append(self.descend(desk, self.adapted(), draws[1], "outer"))
            slope: Mix = (Term("outer", -1.0),)
            if self.form == "hessian-free":
                slope += self.curved(desk, draws[2])
            desk.assign("personal@g", slope)
            desk.step("personal")
        return desk.reply("personal", facts=together(done))

    def adapted(self) -> Mix:
        """One step further; "inner" is minus the slope."""
        return (*HERE, Term("inner", self.alpha))

    def curved(self, desk: Desk, batch: Batch) -> Mix:
        """Minus alpha H g, by the slopes ahead and behind in the direction of g."""
        self.descend(desk, (*HERE, Term("outer", -self.delta)), batch, "ahead")
        self.descend(desk, (*HERE, Term("outer", self.delta)), batch, "behind")
        part = self.alpha / (2 * self.delta)
        return Term("ahead", part), Term("behind", -part)

    def descend(self, desk: Desk, at: Mix, batch: Batch, into: str) -> Facts:
        """``into`` := minus the gradient there."""
        desk.assign(into, (Term(into, 0.0),))
        return desk.fit(wear=(*at, Term(into)), train={into: ALL}, batches=iter([batch]))

    def personal(self, desk: Desk, offer: Parcel) -> Served:
        rows, wear = desk.shard.train, self.adapted()
        first = desk.task.collate(rows, range(min(desk.training.batch, len(rows))))
        self.descend(desk, HERE, first, "inner")
        return Served(lambda batch: desk.model.logits(batch, wear), wear)
