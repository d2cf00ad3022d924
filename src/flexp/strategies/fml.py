"""FML (Shen et al., 2020, arXiv 2006.16765): a private model, and a meme that travels.

Round, m_i <- w. Both learn from each batch, and from what the other said before the step:
    L_v = a CE(v(x), y) + (1 - a) KL(p_m || p_v)       v_i never leaves, and lasts
    L_m = b CE(m(x), y) + (1 - b) KL(p_v || p_m)       targets are constants; means over rows
Then w <- the mean of the m_i, each alike as in the paper, or by rows. Private and meme adapters
may be of other kinds, ranks and targets, and clients may have private ranks of their own. a = b = 1
is local training of v and FedAvg of m. Served is the private model.

Reconstruction: both models are adapters on one frozen backbone; that ``ramp`` is linear.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from flexp.client.desk import Desk
from flexp.client.parts import LossFn
from flexp.data.examples import Batch
from flexp.data.loss import distillation
from flexp.model.adapter import Dense, Head, Ia3, Kind, Lora, Prompt
from flexp.model.ops import SlotSpec
from flexp.model.personal import PersonalModel
from flexp.parcel import Parcel
from flexp.selection import ALL, HEAD, Where
from flexp.strategies.base import ClientId, Setting, Turn
from flexp.strategies.shared_beside import SharedBeside
from flexp.tensors import Tensors, mean

Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Fml(SharedBeside):
    """A private adapter and a meme that is averaged; each learns from labels and from the other.

    ``alpha`` and ``beta`` are the shares of the labels, reached from 1 in ``ramp`` rounds. ``meme``
    is the meme's kind ("same": the recipe's), with its own ``rank``, ``targets`` and ``tokens``.
    ``share`` "body" keeps the meme's head at home, so that clients may have labels of their own.
    """

    alpha: Share = 0.5
    beta: Share = 0.5
    ramp: NonNegativeInt = 0
    weights: Literal["equal", "rows"] = "equal"
    share: Literal["all", "body"] = "all"
    moments: Literal["fresh", "keep"] = "fresh"
    meme: Literal["same", "lora", "ia3", "prompt", "dense", "head"] = "same"
    rank: PositiveInt = 4
    targets: tuple[str, ...] = ()
    tokens: PositiveInt = 8

    name: ClassVar[str] = "fml"
    paper: ClassVar[str] = "Shen et al. 2020, arXiv 2006.16765"
    reconstruction: ClassVar[str] = "both models are adapters on one backbone"

    def refuses(self, setting: Setting) -> str:
        ranks = self.unequal_ranks(setting) if self.meme == "same" else ""
        return ranks or ("" if self.share == "body" else self.unequal_heads(setting))

    def specs(self) -> Mapping[str, SlotSpec]:
        lasts: Literal["run", "round"] = "run" if self.share == "body" else "round"
        meme = SlotSpec(self.kind_of_meme(), lasts=lasts, moments=self.moments)
        return {**self.slots, "shared": meme}

    def kind_of_meme(self) -> Kind | None:
        """What a meme is made of; None as the private one."""
        kinds: dict[str, Kind] = {
            "lora": Lora(self.rank, 2.0 * self.rank, targets=self.targets),
            "ia3": Ia3(self.targets),
            "prompt": Prompt(self.tokens),
            "dense": Dense(self.targets),
            "head": Head(),
        }
        return kinds.get(self.meme)

    def offer(self, state: Tensors, client: ClientId, turn: Turn) -> Parcel:
        way = min(1.0, turn.round / self.ramp) if self.ramp else 1.0
        return Parcel({"shared": turn.select(client, state, self.given())}, facts={"way": way})

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        way = float(cast("Any", offer.facts["way"]))
        loss = mutual(1 - (1 - self.alpha) * way, 1 - (1 - self.beta) * way)
        facts = desk.fit(loss, train={"personal": ALL, "shared": ALL}, apart=True)
        return desk.reply("shared", where=self.given(), facts=facts)

    def given(self) -> Where:
        """What of the meme travels."""
        return ~HEAD if self.share == "body" else ALL

    def merge(self, state: Tensors, replies: Mapping[ClientId, Parcel], turn: Turn) -> Tensors:
        memes = [reply.adapters["shared"] for reply in replies.values()]
        alike, rows = [1.0] * len(memes), turn.weights(list(replies))
        return mean(memes, rows if self.weights == "rows" else alike) if memes else state


def mutual(alpha: float, beta: float) -> LossFn:
    """L_v + L_m. A constant is no way for gradients, so each moves its own adapter only."""

    def loss(model: PersonalModel, batch: Batch) -> Tensor:
        if alpha == beta == 1:
            return model.loss(batch, "personal") + model.loss(batch, "shared")
        private, meme = (model.logits(batch, wear) for wear in ("personal", "shared"))
        return said(model, batch, private, meme, alpha) + said(model, batch, meme, private, beta)

    return loss


def said(model: PersonalModel, batch: Batch, mine: Tensor, other: Tensor, share: float) -> Tensor:
    """What the labels say of some logits, by their share, and what another model says."""
    labels = share * model.task.loss(mine, batch.labels)
    if share == 1:
        return labels
    peer = distillation(mine, other.detach(), batch.labels, temperature=1.0)
    return labels + (1 - share) * peer
