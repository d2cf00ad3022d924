"""DDOME (2025; first FedJETs, Dun et al., 2023, arXiv 2306.08586): experts that learn with a gate.

Server: M experts E_k and a gate R. F_c is the frozen model without adapters; R(F_c(x)) has a number
per expert. Round of client i:
    s_i <- mean over its rows of softmax(R(F_c(x)))
    C_i <- the K experts with the largest s_i, for anchor m with expert m first; these are fetched
    E_k of C_i and R <- E local epochs of  -log p(y|x) + l CE(R(F_c(x)), m)   the latter for anchors
        p(y|x) = sum_k pi_k(x) p_k(y|x),  pi(x) = softmax over C_i of R(F_c(x))
Then  E_k <- the mean over who trained it, by rows n_i or n_i s_ik; an expert of nobody stays to the
bit;  R <- sum_i p_i R_i.  Served is, row by row, the expert with the largest share, to those who
never train (``newcomers``) as to all. Far parts of experts never travel.
M = K = 1 is FedAvg. With K = 1 the likelihood teaches R nothing, and anchors must. An expert of C_i
with less than 1/1000 of the client's rows is left alone: it might not move, which fails a turn.

Reconstruction, from abstracts and reviews: numbers, the anchors' loss, features (`gating.py`), how
R begins and steps. Left out: a fixed ratio of anchors per round; a sum of losses for the mixture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor

from flexp.client.desk import Desk
from flexp.client.fit import together
from flexp.dice import Dice
from flexp.model.adapter import Prompt
from flexp.model.ops import Optim, SlotSpec
from flexp.parcel import Parcel
from flexp.privacy.egress import Leave
from flexp.selection import ALL, NONE, Where
from flexp.strategies.base import ClientId, MethodKind, Scene, Served, Setting, Strategy, Turn
from flexp.strategies.bases import noised, numbers
from flexp.strategies.experts import SHARES, Experts, by_row, expert, joint, joint_loss
from flexp.strategies.gating import CENTRE, Gate, Lesson, names_of

LEAST = 1e-3


@dataclass(frozen=True)
class Ddome(Strategy[Experts]):
    """Each client trains the few experts that a shared gate picks for it, and the gate with them.

    ``experts`` is M, ``top`` K. Client m of ``anchors`` is expert m's; ``pull`` is l. The gate has
    ``hidden`` numbers in between (0: none) and steps by ``optimizer`` at ``rate``; ``centre``: the
    mean of features is taken off, of which clients then tell. Experts ``differ`` at first by noise
    of that part of each tensor's size; ``explore`` is the standard deviation of noise on log s_i
    when C_i is picked. ``weights`` "shares" are n_i s_ik. ``serve`` "mixture" is p(y|x), and
    "client" the one expert that is first in C_i.
    """

    experts: PositiveInt = 5
    top: PositiveInt = 2
    anchors: tuple[ClientId, ...] = ()
    pull: NonNegativeFloat = 1.0
    hidden: NonNegativeInt = 64
    optimizer: Literal["adamw", "sgd"] = "adamw"
    rate: NonNegativeFloat = 1e-2
    centre: bool = True
    differ: NonNegativeFloat = 0.0
    explore: NonNegativeFloat = 0.0
    weights: Literal["rows", "shares"] = "rows"
    serve: Literal["row", "mixture", "client"] = "row"
    newcomers: tuple[ClientId, ...] = ()

    name: ClassVar[str] = "ddome"
    paper: ClassVar[str] = "Dun et al. 2023, arXiv 2306.08586"
    kind: ClassVar[MethodKind] = "personalised"
    alone: ClassVar[bool] = False
    reconstruction: ClassVar[str] = "numbers, the anchors' loss, features, how the gate begins"
    slots: ClassVar[Mapping[str, SlotSpec]] = {"expert/0": SlotSpec()}
    leaves: ClassVar[tuple[Leave, ...]] = (
        Leave("expert/*", why="to be averaged with others of the same expert"),
        Leave("tensor/gate/*/*", why="to be averaged"),
        Leave("tensor/gate/centre", ALL, "in its first turn", "features of all have it taken off"),
    )

    def refuses(self, setting: Setting) -> str:
        clients, new, anchors = setting.seats.keys(), {*self.newcomers}, {*self.anchors}
        if odd := sorted((new | anchors) - clients):
            return f'its "{odd[0]}" is no client. Mend strategy.newcomers and strategy.anchors.'
        if not clients - new or new & anchors:
            return "newcomers train nothing, but anchors and some others must. Name fewer of them."
        if len(self.anchors) > self.experts:
            return "each anchor has an expert. Raise strategy.experts, or name fewer anchors."
        if self.serve == "row" and self.experts > 1 and isinstance(setting.adapter, Prompt):
            return "rows of a batch cannot wear other prompts. Set strategy.serve=client."
        return super().refuses(setting)

    def specs(self) -> Mapping[str, SlotSpec]:
        return {expert(k): SlotSpec() for k in range(self.experts)}

    def owns(self) -> Where:
        return NONE if self.serve == "row" or self.experts == 1 else ALL

    def start(self, scene: Scene) -> Experts:
        begun, dice = scene.initial(self.slots["expert/0"]), scene.dice
        others = (noised(begun, self.differ, dice("expert", n=k)) for k in range(1, self.experts))
        return Experts(dice.seed64(), (begun, *others), names_of(self.hidden))

    def offer(self, state: Experts, client: ClientId, turn: Turn) -> Parcel:
        return Parcel(state.offered(), state.gate, {"seed": state.seed})

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        if desk.client in self.newcomers:
            return desk.reply(facts=together([]))
        gate = self.gate(offer)
        shares, centre = gate.shares(desk)
        chosen = self.chosen(desk, shares, self.explore)
        own = self.anchors.index(desk.client) if desk.client in self.anchors else None
        lesson = Lesson(gate, Optim(self.optimizer, self.rate))
        loss, slots = joint_loss(chosen, lesson, own, self.pull), [expert(k) for k in chosen]
        facts = desk.fit(
            loss, train=dict.fromkeys(slots, ALL), batches=lesson.paced(desk.batches())
        )
        told = {SHARES: numbers(shares)} if self.weights == "shares" else {}
        first = self.centre and CENTRE not in gate.tensors
        loose = {**(centre if first else {}), **gate.layers}
        return desk.reply(*slots, tensors=loose, facts={**facts, **told})

    def gate(self, offer: Parcel) -> Gate:
        """R."""
        dice = Dice(cast("Any", offer.facts)["seed"])("gate")
        return Gate(dict(offer.tensors), dice, self.hidden, self.experts)

    def chosen(self, desk: Desk, shares: Tensor, noise: float = 0.0) -> list[int]:
        """C_i, the first one first."""
        dice = desk.dice("explore").generator()
        liked = shares.log() + noise * torch.randn(len(shares), generator=dice)
        if desk.client in self.anchors:
            liked[self.anchors.index(desk.client)] = torch.inf
        ranked = [int(k) for k in liked.argsort(descending=True, stable=True)[: self.top]]
        return [k for k in ranked if k == ranked[0] or shares[k] >= LEAST]

    def merge(self, state: Experts, replies: Mapping[ClientId, Parcel], turn: Turn) -> Experts:
        return state.averaged(replies, turn)

    def personal(self, desk: Desk, offer: Parcel) -> Served:
        gate, model = self.gate(offer), desk.model
        if self.serve == "row" and self.experts > 1:
            return Served(lambda batch: by_row(model, batch, gate), None)
        chosen = self.chosen(desk, gate.shares(desk)[0])
        chosen = chosen[:1] if self.serve == "client" else chosen
        alone = expert(chosen[0]) if len(chosen) == 1 else None
        return Served(lambda batch: joint(model, batch, gate, chosen), alone)
