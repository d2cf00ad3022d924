"""DyPFL (Ma et al., 2022, arXiv 2208.06192): each client decides whether it personalises.

Round, with w as received, v_i the client's personal model, and L_i on its validation rows:
    gap_i = L_i(w) - L_i(v_i)
    willing: yes if gap_i > delta, no if gap_i < -delta, else as before; at first no
    who is, or with chance epsilon_t = epsilon_0 decay^t who is not, personalises: a turn of pFedMe,
        v_i <- min f_i(v) + lambda_i/2 |v - w_i|^2,  and w_i follows it
    all others adopt, a turn of FedAvg:  v_i <- w;  w_i <- E local epochs from w
Then  w <- (1 - beta) w + beta sum_i q_i w_i,  with q_i the rows n_i, or the incentive
    q_i ~ n_i s(gap_i),  s(g) = 4 sigma(g/width) (1 - sigma(g/width)), which is 1 at 0 and falls
Who personalised last time divides lambda_i by ``adapt`` if gap_i > delta, and multiplies it if
gap_i < -delta, within 10 times lambda either way. Served is v_i or w, whichever has the lower L_i.
With ``rate`` the server chooses so many clients once for the run: they personalise and serve v_i,
the others adopt and serve w, lambda_i stays. Rate 0 is FedAvg (beta = 1), rate 1 is pFedMe.
Replies tell who personalised, offers what part of those who replied in the last round did.

With alike clients and few validation rows 0.6 or more of them still personalise after 40 rounds: a
model held near w is about as good as w. With ``adapt`` 1 and ``delta`` 0 their noise may make all
who adopt change their minds at once.

Reconstruction, from the abstract alone: all but that clients choose, the rate and the incentives.
Left out: a choice for each part of the model, and one around any other method.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from flexp.client.desk import Desk
from flexp.model.ops import SlotSpec
from flexp.parcel import JSON, Parcel
from flexp.privacy.egress import Leave
from flexp.selection import ALL, Where
from flexp.strategies.base import ClientId, MethodKind, Scene, Served, Strategy, Turn
from flexp.strategies.pfedme import PFedMe, followed
from flexp.tensors import Tensors, Term, lerp, mean

Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Crowd:
    """The shared model, on whom it is imposed to personalise, and what part did last."""

    shared: Tensors
    imposed: tuple[ClientId, ...] = ()
    rate: float | None = None


@dataclass(frozen=True)
class DyPfl(Strategy[Crowd]):
    """Each client trains a personal model or adopts the shared one, by its validation loss.

    ``lam``, ``inner``, ``eta`` and ``beta`` are pFedMe's. A gap above ``delta`` nats decides.
    ``explore`` is epsilon_0, times ``decay`` each round. ``adapt`` moves lambda_i (1: it stays).
    ``weights`` "incentive" counts clients more whose gap is within about ``width`` nats. ``rate``
    imposes the part that personalises (None: all decide), and needs no validation rows by itself.
    """

    lam: PositiveFloat = 15.0
    inner: PositiveInt = 5
    eta: PositiveFloat = 0.005
    beta: NonNegativeFloat = 1.0
    delta: NonNegativeFloat = 0.0
    explore: Share = 0.3
    decay: Share = 0.9
    adapt: Annotated[float, Field(ge=1)] = 1.5
    weights: Literal["rows", "incentive"] = "rows"
    width: PositiveFloat = 0.5
    rate: Share | None = None

    name: ClassVar[str] = "dypfl"
    paper: ClassVar[str] = "Ma et al. 2022, arXiv 2208.06192"
    kind: ClassVar[MethodKind] = "personalised"
    own: ClassVar[Where] = ALL
    reconstruction: ClassVar[str] = "all but the idea: only the abstract was read"
    alone: ClassVar[bool] = False
    slots: ClassVar[Mapping[str, SlotSpec]] = PFedMe.slots
    leaves: ClassVar[tuple[Leave, ...]] = PFedMe.leaves

    def start(self, scene: Scene) -> Crowd:
        names, count = sorted(scene.clients), int((self.rate or 0.0) * len(scene.clients) + 0.5)
        chosen = scene.dice("personalise").choose(len(names), count)
        return Crowd(scene.initial(self.slots["shared"]), tuple(names[n] for n in chosen))

    def offer(self, state: Crowd, client: ClientId, turn: Turn) -> Parcel:
        imposed = None if self.rate is None else client in state.imposed
        facts = {"imposed": imposed, "rate": state.rate}
        facts["explore"] = self.explore * self.decay**turn.round
        return Parcel({"shared": state.shared}, facts=facts)

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        told, looks = cast("Any", offer.facts), self.rate is None or self.weights == "incentive"
        gap = worth(desk, "shared") - worth(desk, "personal") if looks else math.nan
        acts, lam = told["imposed"], self.lam
        if acts is None:
            acts, lam = self.decided(desk, gap, told["explore"])
        if acts:
            facts = {**followed(desk, lam, self.inner, self.eta)}
            facts["rows"] = cast("Any", facts["rows"]) // self.inner  # each was seen K times
        else:
            desk.assign("personal", (Term("shared"),))
            facts = desk.fit(wear="shared")
        said = gap if math.isfinite(gap) else None
        return desk.reply("shared", facts={**facts, "personalised": acts, "gap": said, "lam": lam})

    def decided(self, desk: Desk, gap: float, chance: float) -> tuple[bool, float]:
        """Whether the client personalises now, and its lambda; eta lambda grows to at most 1."""
        kept = cast("dict[str, Any]", desk.memory.facts)
        lam, clear = kept.get("lam", self.lam), abs(gap) > self.delta
        if clear and kept.get("personalised"):
            most = min(10 * self.lam, max(self.lam, 1 / self.eta))
            lam = lam / self.adapt if gap > 0 else lam * self.adapt
            lam = min(most, max(self.lam / 10, lam))
        kept["willing"] = gap > 0 if clear else kept.get("willing", False)
        acts = kept["willing"] or desk.dice("explore").uniform() < chance
        kept["lam"], kept["personalised"] = lam, acts
        return acts, lam

    def merge(self, state: Crowd, replies: Mapping[ClientId, Parcel], turn: Turn) -> Crowd:
        if not replies:
            return state
        counts = turn.told(replies)
        bumps = [bump(r.facts.get("gap"), self.width) for r in replies.values()]
        pulls = [n * s for n, s in zip(counts, bumps, strict=True)]
        counts = pulls if self.weights == "incentive" and any(pulls) else counts
        middle = mean([r.adapters["shared"] for r in replies.values()], counts)
        acts = [r.facts.get("personalised") is True for r in replies.values()]
        return Crowd(lerp(state.shared, middle, self.beta), state.imposed, sum(acts) / len(acts))

    def personal(self, desk: Desk, offer: Parcel) -> Served:
        mine = offer.facts["imposed"]
        if mine is None and len(desk.shard.val):
            mine = worth(desk, "personal") < worth(desk, "shared")
        wear = "personal" if mine else "shared"
        return Served(lambda batch: desk.model.logits(batch, wear), wear)


def worth(desk: Desk, slot: str) -> float:
    """A model's loss on the validation rows; infinite if it is not a number."""
    return loss if math.isfinite(loss := desk.loss(slot)) else math.inf


def bump(gap: JSON, width: float) -> float:
    """s(gap); 0 of what is no number."""
    e = math.exp(-abs(gap) / width) if isinstance(gap, float) else 0.0
    return 4 * e / (1 + e) ** 2
