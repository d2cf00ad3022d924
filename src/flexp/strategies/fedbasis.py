"""FedBasis (Chen et al., 2023, arXiv 2304.07882): clients blend a few bases that all of them train.

Client i wears  theta_i = sum_k a_i[k] V_k,  a_i = softmax(psi_i / tau); of LoRA bases it is the
products that are added up, sum_k a_i[k] B_k A_k. Round, with V as received and psi_i its own:
    psi_i <- psi_i - rate grad_psi f(theta_i),  some steps, V frozen
    V_k   <- V_k - eta a_i[k] grad f(theta_i),  E epochs, a_i = softmax(psi_i / sharp) frozen
Then  V_k <- sum_i w_ik V_k^(i),  with w_ik ~ n_i, or n_i a_i[k].
The slopes of all V_k point the same way, so alike bases stay alike. Against that: a warm start by
FedAvg, after which bases differ by whose replies they are the means of, or by noise; and a small
tau while bases train, so that each client trains few. ``newcomers`` fit psi alone, and upload
nothing. K = 1 is FedAvg; blends of one base each, weighted, are a FedAvg for each base.

Reconstruction, from abstracts: numbers; plain descent of psi; who is dealt to which base, and how
noise is drawn; a_i[k] scales steps of AdamW, which ignores it in slopes; bases below 1/1000 of a
model stay. Left out: one gradient as upload for all bases; training of a newcomer's whole model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from flexp.client.desk import Desk
from flexp.client.fit import together
from flexp.model.ops import SlotSpec
from flexp.parcel import Facts, Parcel
from flexp.privacy.egress import Leave
from flexp.products import lora_pairs
from flexp.selection import ALL, NONE, Where
from flexp.strategies.base import ClientId, MethodKind, Scene, Served, Setting, Strategy, Turn
from flexp.strategies.bases import BLEND, Bases, numbers
from flexp.strategies.ranks import no_product
from flexp.tensors import Stacked, Term, Wear

LEAST = 1e-3  # of a client's model; a base that is less of it does not move in its turn


@dataclass(frozen=True)
class FedBasis(Strategy[Bases]):
    """Clients learn how to blend a few bases, and train all of these together.

    ``bases`` is K. ``blend_steps`` of a turn are psi's, at ``rate``. ``sharp`` is tau while bases
    train, and goes to ``tau`` in ``relax`` rounds (0: stays). After ``warm`` rounds of FedAvg bases
    differ by other "clients", or by "noise" of that part of each tensor's size.
    """

    bases: PositiveInt = 4
    blend_steps: NonNegativeInt = 5
    rate: NonNegativeFloat = 1.0
    tau: PositiveFloat = 1.0
    sharp: PositiveFloat = 0.2
    relax: NonNegativeInt = 0
    warm: NonNegativeInt = 1
    differ: Literal["clients", "noise"] = "clients"
    noise: NonNegativeFloat = 0.1
    weights: Literal["rows", "blends"] = "rows"
    newcomers: tuple[ClientId, ...] = ()

    name: ClassVar[str] = "fedbasis"
    paper: ClassVar[str] = "Chen et al. 2023, arXiv 2304.07882"
    kind: ClassVar[MethodKind] = "personalised"
    alone: ClassVar[bool] = False
    reconstruction: ClassVar[str] = "numbers, how bases are made to differ, steps of AdamW"
    slots: ClassVar[Mapping[str, SlotSpec]] = {"base/0": SlotSpec()}
    leaves: ClassVar[tuple[Leave, ...]] = (Leave("base/*", why="to be averaged"),)

    def refuses(self, setting: Setting) -> str:
        if odd := sorted({*self.newcomers} - setting.seats.keys()):
            return f'its newcomer "{odd[0]}" is no client. Mend strategy.newcomers.'
        if not setting.seats.keys() - {*self.newcomers}:
            return "all clients are newcomers, who train no base. Shorten strategy.newcomers."
        if self.bases > 1 and self.differ == "clients" and not self.warm:
            return "no client has a base before a warm start. Set strategy.differ=noise."
        return no_product(setting) or super().refuses(setting)

    def specs(self) -> Mapping[str, SlotSpec]:
        return {f"base/{k}": SlotSpec() for k in range(self.bases)}

    def owns(self) -> Where:
        return ~Where(names="*.lora_A.*") if self.bases > 1 else NONE

    def start(self, scene: Scene) -> Bases:
        begun = Bases(scene.dice.seed64(), (scene.initial(self.slots["base/0"]),))
        return begun if self.warm or self.bases == 1 else begun.made(self.bases, [], self.noise)

    def offer(self, state: Bases, client: ClientId, turn: Turn) -> Parcel:
        way = min(1.0, max(0, turn.round - self.warm) / self.relax) if self.relax else 0.0
        sharp = self.sharp + (self.tau - self.sharp) * way
        facts = {"sharp": sharp, "products": bool(lora_pairs(state.held[0]))}
        return Parcel(state.offered(), facts={"bases": len(state.held), **facts})

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        facts = self.fit_blend(desk, offer)
        if desk.client in self.newcomers:
            return desk.reply(facts=facts)
        blend = numbers(self.blend(desk, offer, cast("Any", offer.facts)["sharp"]))
        moved = {f"base/{k}": a for k, a in enumerate(blend) if a >= LEAST}
        # The slope along V_k has a_k in it, but AdamW does not notice how long a slope is.
        counts = moved if desk.training.optim.name == "adamw" else {}
        wear = self.wear(offer, blend, every=False)
        facts = desk.fit(wear=wear, train=dict.fromkeys(moved, ALL), counts=counts)
        told = {BLEND: blend} if self.weights == "blends" else {}
        return desk.reply(*(f"base/{k}" for k in range(len(blend))), facts={**facts, **told})

    def fit_blend(self, desk: Desk, offer: Parcel) -> Facts:
        """Descent of psi with all bases frozen; a step without a finite slope is left out."""
        done, one = list[Facts](), cast("Any", offer.facts)["bases"] == 1
        for batch in desk.batches(steps=0 if one or not self.rate else self.blend_steps):
            blend = self.blend(desk, offer, self.tau).requires_grad_()
            wear = self.wear(offer, list(blend))
            done.append(desk.fit(wear=wear, train={}, batches=iter([batch])))
            a, slope = blend.detach(), blend.grad
            if slope is not None and slope.isfinite().all():
                psi = self.psi(desk, offer) - self.rate / self.tau * a * (slope - a @ slope)
                desk.memory.facts["psi"] = numbers(psi)
        return together(done)

    def psi(self, desk: Desk, offer: Parcel) -> Tensor:
        """The client's own numbers, one per base; 0 until it has fitted them."""
        begun: Any = [0.0] * cast("Any", offer.facts)["bases"]
        return torch.tensor(desk.memory.facts.get("psi", begun))

    def blend(self, desk: Desk, offer: Parcel, tau: float) -> Tensor:
        """a_i."""
        return (self.psi(desk, offer) / tau).softmax(0)

    def wear(self, offer: Parcel, blend: Sequence[Tensor | float], every: bool = True) -> Wear:
        """theta_i; if not ``every`` base is to be worn, without those that do not count."""
        mix = tuple(Term(f"base/{k}", a) for k, a in enumerate(blend) if every or a)
        if len(mix) == 1:
            return mix[0].slot
        return Stacked(mix) if offer.facts["products"] else mix

    def merge(self, state: Bases, replies: Mapping[ClientId, Parcel], turn: Turn) -> Bases:
        trained = {c: reply for c, reply in replies.items() if c not in self.newcomers}
        merged = state.averaged(trained, turn)
        if len(state.held) == self.bases or turn.round + 1 < self.warm:
            return merged
        own = state.dealt(self.bases, trained, turn) if self.differ == "clients" else []
        return merged.made(self.bases, own, self.noise)

    def personal(self, desk: Desk, offer: Parcel) -> Served:
        wear = self.wear(offer, numbers(self.blend(desk, offer, self.tau)))
        return Served(lambda batch: desk.model.logits(batch, wear), wear)
