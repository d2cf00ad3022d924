"""A method that only tests have: one with learned coefficients."""

from __future__ import annotations

from collections.abc import Mapping
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
from flexp.tensors import Mix, Tensors, Term, mean

BASES = 3


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
