"""FedMosaic (Seo et al., 2025, arXiv 2506.11024): each client gets a mean of who has rows like it.

Every linear map wears an adapter G of others, frozen, beside one's own L, with its gate g:
    y = W_0 x + g(x) G(x) + (1 - g(x)) L(x)           Co-LoRA and gates: `model/colora.py`
Turn: L and w_g train on the own loss; every ``every`` steps the gradient of the probe at the
current batch is looked at (`client/signature.py`), first rows alone, with noise. Their mean M gives
    h_i <- (M + h_i) / 2,  at first M                  which goes up with L
Server (`rela.py`), w_ij = softmax over j != i of S_ij / tau, S the likeness of h_i and h_j:
    P, Q of G_i <- sum_j w_ij (P, Q)_j   over all models, k-th Co-LoRA block with k-th
    A, B of G_i <- sum_j w'_ij (A, B)_j  elsewhere, over clients of the same model
Where there is nobody, and in a client's first turn, G_i is L_i as the turn begins. Frozen A and B
of Co-LoRA blocks, gates and heads never leave.

Frozen A and B of unlike models agree by `flexp align` (`model/aligned.py`), or are as drawn. The
probe is the smallest model of the run, whole at every client; plans do not count it.

From the official code. The gate's noise has the deviation that it has there, where its weights
never learn. Not as there: P, Q and gates step at the rate of all else; the gradient is exact where
the code's has the diagonal of the norm's Jacobian; heads of classifiers train, and are one's own.
Left out: models with unlike tokenizers, tasks that follow each other, runs over a network.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from flexp.client.desk import Desk
from flexp.client.signature import signature
from flexp.data.examples import Batch
from flexp.errors import StrategyError
from flexp.model.colora import CoLora, nth
from flexp.model.ops import SlotSpec
from flexp.parcel import Parcel
from flexp.privacy.egress import Leave
from flexp.selection import Where
from flexp.strategies.base import ClientId, MethodKind, Scene, Served, Setting, Strategy, Turn
from flexp.strategies.rela import likeness, shares
from flexp.tensors import Stacked, Tensors, Term, Wear, lerp, mean, mean_by_name

PLAIN, MATCHED = Where(names="*.lora_*"), Where(names="*.colora_[PQ]")
FROZEN, GATE = Where(names="*.colora_[AB]"), Where(names="*.colora_gate")
SIGNATURE = "signature"


@dataclass(frozen=True)
class Mosaic:
    """What everybody gave last: its adapter, and the signature of its rows."""

    models: Mapping[ClientId, Tensors] = field(default_factory=dict[ClientId, Tensors])
    signatures: Tensors = field(default_factory=dict[ClientId, Tensor])


@dataclass(frozen=True)
class FedMosaic(Strategy[Mosaic]):
    """Each client wears, by a gate, a mean of the adapters of those whose rows are like its own.

    ``every`` so many steps a signature is taken, of which a share ``kept`` of rows stays, with
    ``noise`` of that deviation. ``gate`` "local" is one's own adapter alone. ``gate_noise`` is the
    deviation of the gate's, in training.
    """

    tau: PositiveFloat = 0.5
    every: PositiveInt = 10
    kept: Annotated[float, Field(gt=0, le=1)] = 0.4
    noise: NonNegativeFloat = 1e-4
    gate: Literal["learned", "local"] = "learned"
    gate_noise: NonNegativeFloat = 0.69316

    name: ClassVar[str] = "fedmosaic"
    paper: ClassVar[str] = "Seo et al. 2025, arXiv 2506.11024"
    kind: ClassVar[MethodKind] = "personalised"
    own: ClassVar[Where] = ~FROZEN
    reconstruction: ClassVar[str] = "one rate for all that trains, and heads of classifiers"
    gates: ClassVar[bool] = True
    probes: ClassVar[bool] = True
    models: ClassVar[bool] = True
    slots: ClassVar[Mapping[str, SlotSpec]] = {
        "personal": SlotSpec(lasts="run", moments="keep"),
        "others": SlotSpec(),
    }
    leaves: ClassVar[tuple[Leave, ...]] = (
        Leave("personal", PLAIN | MATCHED, why="others get a mean of it"),
        Leave("tensor/signature", why="a noisy gradient of a frozen model, to find who is alike"),
    )

    def refuses(self, setting: Setting) -> str:
        if not isinstance(setting.adapter, CoLora):
            return "what clients exchange are parts of Co-LoRA. Set adapter.kind=colora."
        return super().refuses(setting)

    def moving(self) -> Where:
        return ~(FROZEN | GATE)

    def start(self, scene: Scene) -> Mosaic:
        return Mosaic()

    def offer(self, state: Mosaic, client: ClientId, turn: Turn) -> Parcel:
        if self.gate == "local" or client not in state.models:
            return Parcel(facts={"matched": False, "plain": False})
        others = [c for c in state.models if c != client]
        kin = [c for c in others if self.alike(turn, client, c)]
        mine = nth(state.models[client], turn.blocks(client)[0])
        matched = self.mixed(state, client, {c: self.canonical(state, c, turn) for c in others})
        plain = self.mixed(state, client, {c: turn.select(c, state.models[c], PLAIN) for c in kin})
        given = {k: matched[name] for k, name in mine.items() if name in matched}
        facts = {"matched": bool(given), "plain": bool(plain)}
        return Parcel({"others": {**given, **plain}} if given or plain else {}, facts=facts)

    def alike(self, turn: Turn, one: ClientId, other: ClientId) -> bool:
        """Whether two clients have the same model."""
        return turn.seats[one].model == turn.seats[other].model

    def canonical(self, state: Mosaic, client: ClientId, turn: Turn) -> Tensors:
        """A client's P and Q by names that all models have."""
        held = state.models[client]
        return {name: held[k] for k, name in nth(held, turn.blocks(client)[0]).items()}

    def mixed(self, state: Mosaic, client: ClientId, given: Mapping[ClientId, Tensors]) -> Tensors:
        """The mean of what others gave, by how alike their signatures are."""
        if not given:
            return {}
        found = likeness([state.signatures[c] for c in (client, *given)])[0, 1:]
        return mean_by_name([*given.values()], shares([float(x) for x in found], self.tau))

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        seen = list[Tensor]()
        moves = self.moving() if self.gate == "local" else ~FROZEN
        wear, batches = self.worn(desk, offer), self.watched(desk, seen)
        facts = desk.fit(wear=wear, train={"personal": moves}, batches=batches)
        tensors = {SIGNATURE: self.faded(desk, seen)}
        return desk.reply("personal", where=PLAIN | MATCHED, tensors=tensors, facts=facts)

    def worn(self, desk: Desk, offer: Parcel) -> Wear:
        """Both adapters by the gate, or one's own; what is not offered is as the own one is now."""
        if self.gate == "local":
            return "personal"
        given = [
            part for part, name in ((PLAIN, "plain"), (MATCHED, "matched")) if offer.facts[name]
        ]
        desk.assign("others", (Term("personal"),), where=~Where(join="or", of=tuple(given)))
        return Stacked((Term("others"), Term("personal")), gated=True, noise=self.gate_noise)

    def watched(self, desk: Desk, seen: list[Tensor]) -> Iterator[Batch]:
        """The turn's batches; signatures of some of them are added to ``seen``."""
        if desk.probe is None:
            raise StrategyError(f'Method "{self.name}" needs a probe, and there is none here.')
        for n, batch in enumerate(desk.batches()):
            if n % self.every == 0:
                found = signature(desk.probe, desk.task, batch)
                found = found[: math.ceil(len(found) * self.kept - 1e-9)]
                stream = desk.dice("signature", n=n).generator()
                seen.append(found + self.noise * torch.randn(found.shape, generator=stream))
            yield batch

    def faded(self, desk: Desk, seen: list[Tensor]) -> Tensor:
        """h_i after a turn, which the client remembers."""
        now = mean([{SIGNATURE: one} for one in seen], [1.0] * len(seen))
        before = desk.memory.get(SIGNATURE)
        now = now if before is None else lerp(before, now, 0.5)
        desk.memory.put(SIGNATURE, now)
        return now[SIGNATURE]

    def merge(self, state: Mosaic, replies: Mapping[ClientId, Parcel], turn: Turn) -> Mosaic:
        signatures, models = dict(state.signatures), dict(state.models)
        for c, reply in replies.items():
            found = reply.tensors.get(SIGNATURE)
            known = next(iter(signatures.values()), found)
            if found is not None and known is not None and found.shape == known.shape:
                signatures[c], models[c] = found, reply.adapters["personal"]
        return Mosaic(models, signatures)

    def personal(self, desk: Desk, offer: Parcel) -> Served:
        wear = self.worn(desk, offer)
        return Served(lambda batch: desk.model.logits(batch, wear), None)
