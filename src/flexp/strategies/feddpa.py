"""FedDPA (Yang et al., 2024, arXiv 2403.19211): a global and a local adapter, worn as a mix.

    w_i <- E local epochs from w on F_i;  w <- sum_i p_i w_i           global, FedAvg
    v_i <- E local epochs on F_i                                       local, never leaves
T: both in every round, one after the other. F: the last rounds are for v_i alone, from v_i <- w.
Served is the sum of (1 - c) of what w wears and c of what v_i does: products, and heads. c is
fixed ("static", as in the authors' code), or per input c times its mean cosine similarity with
rows that the client trained on ("instance"), where a row is the mean of its last hidden states.

Reconstruction: each adapter is trained without the other one on; how similarity enters c.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor
from torch.nn import functional

from flexp.client.desk import Desk
from flexp.data.examples import Batch
from flexp.data.loss import places
from flexp.parcel import Parcel
from flexp.selection import NONE
from flexp.strategies.base import ClientId, MethodKind, Served, Setting, Turn
from flexp.strategies.ranks import no_product
from flexp.strategies.shared_beside import SharedBeside
from flexp.tensors import Stacked, Tensors, Term

LOCAL = "local phase"  # a fact of an offer, and of the memory of whoever has begun it


@dataclass(frozen=True)
class FedDpa(SharedBeside):
    """A global adapter by FedAvg and a local one, worn together: alternately (T) or after (F).

    ``weight`` is c. ``after``: how many rounds at the end are local in F. ``sample``: how many rows
    an input is compared with.
    """

    form: Literal["T", "F"] = "T"
    weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    mixing: Literal["static", "instance"] = "static"
    after: PositiveInt = 1
    sample: PositiveInt = 16

    name: ClassVar[str] = "feddpa"
    paper: ClassVar[str] = "Yang et al. 2024, arXiv 2403.19211"
    kind: ClassVar[MethodKind] = "federated LoRA"
    reconstruction: ClassVar[str] = "adapters are trained apart; how similarity enters the mix"

    def refuses(self, setting: Setting) -> str:
        return self.without_lora(setting) or no_product(setting) or super().refuses(setting)

    def offer(self, state: Tensors, client: ClientId, turn: Turn) -> Parcel:
        return Parcel({"shared": state}, facts={LOCAL: turn.round >= turn.rounds - self.after})

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        if self.form == "T":
            facts = desk.fit(wear="shared")
            desk.fit()
            return desk.reply("shared", facts=facts)
        if not offer.facts[LOCAL]:
            return desk.reply("shared", facts=desk.fit(wear="shared"))
        if LOCAL not in desk.memory.facts:
            desk.assign("personal", (Term("shared"),))
            desk.memory.facts[LOCAL] = True
        return desk.reply("shared", where=NONE, facts=desk.fit())

    def personal(self, desk: Desk, offer: Parcel) -> Served:
        if self.form == "F" and LOCAL not in desk.memory.facts:
            return Served(lambda batch: desk.model.logits(batch, "shared"), "shared")
        wear = self.mix(self.weight)
        if self.mixing == "static":
            return Served(lambda batch: desk.model.logits(batch, wear), wear)
        rows = desk.shard.train
        chosen = desk.dice("sample").choose(len(rows), min(self.sample, len(rows)))
        known = summary(desk, desk.task.collate(rows, list(chosen)))

        def predict(batch: Batch) -> Tensor:
            alike = (summary(desk, batch) @ known.T).mean(1).clamp(0, 1) * self.weight
            each = zip(batch.parts(batch.rows), alike, strict=True)
            return torch.cat([desk.model.logits(one, self.mix(float(c))) for one, c in each])

        return Served(predict, None)

    def mix(self, weight: float) -> Stacked:
        """Both adapters on, the local one with this weight."""
        return Stacked((Term("shared", 1 - weight), Term("personal", weight)))


def summary(desk: Desk, batch: Batch) -> Tensor:
    """The mean of each row's last hidden states under the global adapter, of length 1."""
    with torch.no_grad():
        hidden = places(desk.model.hidden(batch, "shared"))
    mask = batch.inputs.get("attention_mask", torch.ones(hidden.shape[:2]))[..., None]
    return functional.normalize((hidden * mask).sum(1), dim=1)
