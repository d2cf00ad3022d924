"""FedPPA (Prasetia, Saputra and Putra, 2025, arXiv 2510.14698): layers go step by step to a mean.

Layers are common to the clients that have them in the same shape at the same place: here pairs of
LoRA to those of one rank, all else to everybody. Round, with w_i where client i ended:
    P1  before each of E parts of the training: w_l <- (1 - beta_e) w_l + beta_e g_l, common l
    P2  E local epochs on  F_i(w) + mu_t/2 sum_l |w_l - g_l|^2,   mu_t = mu min(1, t / T_w)
    g_l <- sum_{j in C_l} e_j w_j,l / sum_{j in C_l} e_j,  C_l those who have l and took part
FedPPA has e_j = 1, FedPPA+ the entropy of j's labels; where all are 0, they count alike. P1 with
E = 1 is the mix of `flexp`; beta = 0 is local, beta = 1 at the start alone is FedAvg.

Reconstruction: both schedules, for the paper's formula could not be read; e_j within C_l.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor

from flexp.client.desk import Desk, Drag
from flexp.data.tasks import label_entropy
from flexp.model.ops import SlotSpec
from flexp.parcel import Parcel
from flexp.privacy.egress import Leave
from flexp.selection import ALL, FAR, HEAD, Where
from flexp.strategies.alignment import approaching, ramped
from flexp.strategies.base import ClientId, MethodKind, Scene, Setting, Strategy, Turn
from flexp.strategies.layers import begun, filed, private, taken
from flexp.strategies.ranks import Ranked
from flexp.tensors import mean_by_name


@dataclass(frozen=True)
class FedPpa(Strategy[Ranked]):
    """Everybody keeps an own model, whose common layers approach their mean while it trains.

    ``form``: P1 is "mix", P2 "prox". P1: ``beta`` is reached in E = ``parts`` parts of a turn
    ("rising": beta e/E), or it is 1/E in each ("even"), or beta in the first alone ("start"). P2:
    ``mu`` is reached after ``ramp`` rounds, T_w. ``weigh`` "entropy" is FedPPA+. ``upload`` "far":
    near layers never go up, g_l is of those who have l at the server. ``head``: whether the head
    is common.
    """

    form: Literal["mix", "prox"] = "mix"
    beta: Annotated[float, Field(ge=0, le=1)] = 0.5
    schedule: Literal["rising", "even", "start"] = "rising"
    parts: PositiveInt = 5
    mu: NonNegativeFloat = 0.1
    ramp: NonNegativeInt = 10
    weigh: Literal["uniform", "entropy"] = "uniform"
    upload: Literal["all", "far"] = "all"
    head: Literal["common", "private"] = "common"

    name: ClassVar[str] = "fedppa"
    paper: ClassVar[str] = "Prasetia et al. 2025, arXiv 2510.14698"
    kind: ClassVar[MethodKind] = "personalised"
    own: ClassVar[Where] = ALL
    reconstruction: ClassVar[str] = "both schedules of the alignment; entropies within a host set"
    slots: ClassVar[Mapping[str, SlotSpec]] = {
        "personal": SlotSpec(lasts="run"),
        "common": SlotSpec(),
    }
    leaves: ClassVar[tuple[Leave, ...]] = (
        Leave("personal", why="common layers are averaged"),
        Leave("tensor/entropy", why="FedPPA+ weighs by how mixed a client's labels are"),
    )

    def refuses(self, setting: Setting) -> str:
        kinds = {setting.task, *(space[0] for space in setting.heads.values() if space)}
        if self.weigh == "entropy" and "causal-lm" in kinds:
            return 'the rows of a language model have no label. Set strategy.weigh to "uniform".'
        return "" if self.head == "private" else self.unequal_heads(setting)

    def start(self, scene: Scene) -> Ranked:
        return begun(scene, self.slots["common"])

    def offer(self, state: Ranked, client: ClientId, turn: Turn) -> Parcel:
        kept = private(state, client, turn, hosted=self.upload == "far")
        kept = kept if self.head == "common" else kept | HEAD
        common = turn.select(client, taken(state.adapter, state.of(client, turn)), ~kept)
        facts = {"private": kept.to_json(), "mu": self.mu * ramped(turn.round, self.ramp)}
        return Parcel({"common": common}, facts=facts)

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        told = cast("Any", offer.facts)
        common = ~Where.from_json(told["private"])
        if self.form == "mix":
            shares = self.shares(min(self.parts, desk.steps))
            facts = approaching(desk, "common", shares, common)
        else:
            facts = desk.fit(pull=[Drag("common", told["mu"], common)])
        given = common & FAR if self.upload == "far" else common
        loose = {"entropy": label_entropy(desk.shard.train)} if self.weigh == "entropy" else {}
        return desk.reply("personal", where=given, tensors=loose, facts=facts)

    def shares(self, count: int) -> list[float]:
        """beta_e, of e from 1 to E."""
        if self.schedule == "even":
            return [1 / count] * count
        if self.schedule == "start":
            return [self.beta] + [0.0] * (count - 1)
        return [self.beta * (n + 1) / count for n in range(count)]

    def merge(self, state: Ranked, replies: Mapping[ClientId, Parcel], turn: Turn) -> Ranked:
        layers = [filed(r.adapters["personal"], state.of(c, turn)) for c, r in replies.items()]
        even = mean_by_name(layers, [1.0] * len(layers))
        told = [number(reply.tensors.get("entropy")) for reply in replies.values()]
        most = max(told, default=0.0)  # equal ones become 1, to the bit
        weighed = mean_by_name(layers, [x / most for x in told]) if most else {}
        return Ranked(state.rank, {**state.adapter, **even, **weighed})


def number(told: Tensor | None) -> float:
    """An entropy that a client told; 0 for what can be none."""
    return max(0.0, float(told)) if told is not None and told.numel() == 1 else 0.0
