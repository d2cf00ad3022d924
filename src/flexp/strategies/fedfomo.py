"""FedFomo (Zhang et al., 2021, arXiv 2012.08565): each client mixes the models that help it.

Round, with b_i the client's model before its last training, and theta_n, some of others' newest
and its own: on the client's validation rows
    w_n = (L_i(b_i) - L_i(theta_n)) / |theta_n - b_i|,   of which those above 0 stay
    theta_i <- b_i + sum_n (w_n / sum w) (theta_n - b_i);   where none is above 0, b_i
    theta_i <- E local epochs from there
Shares add up to 1, so that is a mean of the theta_n, and one alone comes out to the last bit. The
server adds w_n / |sum w| to row i of an affinity matrix, and offers the M that are highest there,
or with chance epsilon any, of those that have uploaded. Peers see each other's near adapters.
Reconstruction: each of the M is drawn for itself; M = 0 is local training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, cast

from pydantic import Field, NonNegativeFloat, NonNegativeInt

from flexp.client.desk import Desk
from flexp.model.ops import SlotSpec
from flexp.parcel import Parcel
from flexp.privacy.egress import Leave
from flexp.selection import ALL, Where
from flexp.strategies.affinity import Affinity
from flexp.strategies.base import ClientId, MethodKind, Scene, Setting, Strategy, Turn
from flexp.strategies.distances import Distance, distance
from flexp.tensors import Tensors, Term

A = Where(names="*.lora_A.*")


@dataclass(frozen=True)
class Pool:
    """Everybody's newest model, and how much each has helped each."""

    affinity: Affinity
    models: Mapping[ClientId, Tensors]


@dataclass(frozen=True)
class FedFomo(Strategy[Pool]):
    """Each client mixes in the models that lower its own validation loss, by how much per distance.

    ``candidates`` is M, the own one among them. ``explore`` is epsilon, less by ``decay`` a round.
    The official code's distance is "l1". With ``share_a`` LoRA's A never moves; B alone is mixed.
    """

    candidates: NonNegativeInt = 5
    explore: Annotated[float, Field(ge=0, le=1)] = 0.3
    decay: NonNegativeFloat = 0.05
    own_affinity: float = 0.1
    distance: Distance = "l2"
    share_a: bool = False

    name: ClassVar[str] = "fedfomo"
    paper: ClassVar[str] = "Zhang et al. 2021, arXiv 2012.08565"
    kind: ClassVar[MethodKind] = "personalised"
    own: ClassVar[Where] = ALL
    reconstruction: ClassVar[str] = "how exploration draws, and that M = 0 is local"
    slots: ClassVar[Mapping[str, SlotSpec]] = {"personal": SlotSpec(lasts="run")}
    leaves: ClassVar[tuple[Leave, ...]] = (Leave("personal", why="peers get it, to mix it in"),)

    def refuses(self, setting: Setting) -> str:
        pairs = self.share_a or self.distance == "product"
        return (pairs and self.without_lora(setting)) or super().refuses(setting)

    def specs(self) -> Mapping[str, SlotSpec]:
        peers = {f"peer/{n}": SlotSpec() for n in range(self.candidates)}
        return {**self.slots, **({"before": SlotSpec(lasts="run"), **peers} if peers else {})}

    def moving(self) -> Where:
        return ~A if self.share_a else ALL

    def start(self, scene: Scene) -> Pool:
        return Pool(Affinity(scene.dice.seed64(), self.own_affinity), {})

    def offer(self, state: Pool, client: ClientId, turn: Turn) -> Parcel:
        chosen = self.chosen(state, client, turn)
        adapters = {f"peer/{n}": state.models[c] for n, c in enumerate(chosen) if c != client}
        return Parcel(adapters, facts={"peers": list(adapters), "own": client in chosen})

    def chosen(self, state: Pool, client: ClientId, turn: Turn) -> list[ClientId]:
        """A client's candidates in a turn, its own model last."""
        how = {"round": turn.round, "count": self.candidates}
        chance = self.explore - self.decay * turn.round
        return state.affinity.chosen(client, [*state.models], **how, chance=chance)

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        facts = cast("Any", offer.facts)
        models = [*facts["peers"], *(["personal"] if facts["own"] else [])]
        helped = self.mix_in(desk, models) if models else []
        if self.candidates:
            desk.assign("before", (Term("personal"),))
        return desk.reply("personal", facts={**desk.fit(train=self.moving()), "helped": helped})

    def mix_in(self, desk: Desk, models: Sequence[str]) -> list[float]:
        """The client's model from what helps it; how much each of them did."""
        before = desk.loss("before")
        helped = [self.helped(desk, model, before) for model in models]
        good = {m: w for m, w in zip(models, helped, strict=True) if w > 0}
        mix = tuple(Term(m, w / sum(good.values())) for m, w in good.items())
        desk.assign("personal", mix or (Term("before"),), where=self.moving())
        return helped

    def helped(self, desk: Desk, model: str, before: float) -> float:
        """w_n; 0 of a model that is where the client was, or has no finite loss."""
        far = distance(desk, model, "before", self.distance)
        weight = (before - desk.loss(model)) / far if far else 0.0
        return weight if math.isfinite(weight) else 0.0

    def merge(self, state: Pool, replies: Mapping[ClientId, Parcel], turn: Turn) -> Pool:
        affinity = state.affinity
        for c, reply in replies.items():
            affinity = affinity.added(c, self.chosen(state, c, turn), reply.facts.get("helped"))
        newest = {c: r.adapters["personal"] for c, r in replies.items()}
        return Pool(affinity, {**state.models, **newest})
