"""Two methods that only tests have: one with far dot products, one with learned coefficients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from flexp.client.desk import Desk
from flexp.model.ops import SlotSpec
from flexp.parcel import Parcel
from flexp.privacy.egress import Leave
from flexp.selection import ALL, Where
from flexp.strategies.base import ClientId, MethodKind, Scene, Served, Strategy, Turn
from flexp.tensors import Mix, Tensors, Term, mean, total

PEERS, BASES = 2, 3


@dataclass(frozen=True)
class Fomo(Strategy[Mapping[ClientId, Tensors]]):
    """Each client mixes in peers' adapters by the fall of its validation loss per distance."""

    name: ClassVar[str] = "test-fomo"
    paper: ClassVar[str] = "after Zhang et al. 2021, arXiv 2012.08565"
    kind: ClassVar[MethodKind] = "personalised"
    own: ClassVar[Where] = ALL
    leaves: ClassVar[tuple[Leave, ...]] = (Leave("personal", why="peers mix it in"),)
    slots: ClassVar[Mapping[str, SlotSpec]] = {
        "personal": SlotSpec(lasts="run", moments="keep"),
        **{f"peer/{n}": SlotSpec() for n in range(PEERS)},
    }

    def start(self, scene: Scene) -> Mapping[ClientId, Tensors]:
        return {}

    def offer(self, state: Mapping[ClientId, Tensors], client: ClientId, turn: Turn) -> Parcel:
        peers = [c for c in sorted(state) if c != client][:PEERS]
        adapters = {f"peer/{n}": state[c] for n, c in enumerate(peers)}
        return Parcel(adapters, facts={"peers": sorted(adapters)})

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        peers: Any = offer.facts["peers"]
        self.mix_in(desk, peers)
        facts = desk.fit()
        return desk.reply("personal", facts=facts)

    def mix_in(self, desk: Desk, peers: Sequence[str]) -> None:
        gains = dict[str, float]()
        batches = list(desk.batches(epochs=1, split="val"))
        with torch.no_grad():
            own = sum(float(desk.model.loss(b)) for b in batches)
            for peer in peers:
                desk.assign("difference", (Term(peer), Term("personal", -1.0)))
                distance = total(desk.dot("difference", "difference")) ** 0.5
                fall = own - sum(float(desk.model.loss(b, peer)) for b in batches)
                gains[peer] = max(0.0, fall / distance)
        if sum(gains.values()):
            shares = {peer: gain / sum(gains.values()) / 2 for peer, gain in gains.items()}
            mine = Term("personal", 1.0 - sum(shares.values()))
            desk.assign("personal", (mine, *(Term(p, share) for p, share in shares.items())))

    def merge(
        self, state: Mapping[ClientId, Tensors], replies: Mapping[ClientId, Parcel], turn: Turn
    ) -> Mapping[ClientId, Tensors]:
        return {**state, **{c: reply.adapters["personal"] for c, reply in replies.items()}}


@dataclass(frozen=True)
class Basis(Strategy[tuple[Tensors, ...]]):
    """A client's model is its own learned blend of a few bases that everybody trains."""

    rate: float = 0.5

    name: ClassVar[str] = "test-basis"
    paper: ClassVar[str] = "after Chen et al. 2023, arXiv 2304.07882"
    kind: ClassVar[MethodKind] = "personalised"
    own: ClassVar[Where] = ALL
    leaves: ClassVar[tuple[Leave, ...]] = (Leave("base/*", why="bases are averaged"),)
    slots: ClassVar[Mapping[str, SlotSpec]] = {f"base/{k}": SlotSpec() for k in range(BASES)}

    def start(self, scene: Scene) -> tuple[Tensors, ...]:
        begun = scene.initial(SlotSpec())
        return tuple({k: v * (1 + n / BASES) for k, v in begun.items()} for n in range(BASES))

    def offer(self, state: tuple[Tensors, ...], client: ClientId, turn: Turn) -> Parcel:
        return Parcel(dict(zip(self.slots, state, strict=True)))

    def mix(self, logits: Tensor) -> Mix:
        blend = logits.softmax(0)
        return tuple(Term(base, blend[k]) for k, base in enumerate(self.slots))

    def blend(self, desk: Desk) -> Tensor:
        kept: Any = desk.memory.facts.get("blend", [0.0] * BASES)
        return torch.tensor(kept)

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        psi, bases = self.blend(desk).requires_grad_(), list(self.slots)
        for batch in desk.batches():
            psi.grad = None
            desk.grad(desk.model.loss(batch, self.mix(psi)), bases, [f"{b}@g" for b in bases])
            for base in bases:
                desk.step(base)
            with torch.no_grad():
                psi -= self.rate * (0 if psi.grad is None else psi.grad)
        desk.memory.facts["blend"] = psi.tolist()
        return desk.reply(*bases)

    def merge(
        self, state: tuple[Tensors, ...], replies: Mapping[ClientId, Parcel], turn: Turn
    ) -> tuple[Tensors, ...]:
        weights, trained = turn.weights(list(replies)), list(replies.values())
        return tuple(mean([t.adapters[b] for t in trained], weights) for b in self.slots)

    def personal(self, desk: Desk, offer: Parcel) -> Served:
        wear = self.mix(self.blend(desk))
        return Served(lambda batch: desk.model.logits(batch, wear), wear)
