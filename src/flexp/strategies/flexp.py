"""FlexP-SFL: flexible cuts, personal near parts, a trunk learned together, and alignment.

Yuan, Geng et al. 2025, arXiv 2508.10349 (v2: FlexP-SFT). Reconstruction: the abstracts fix the
U-shape, a cut per client, no upload of client weights and an alignment that works layer by layer;
the formulas here are ours.

    min  sum_i p_i F_i(u_i, phi)  +  sum_i p_i R(u_i; ref)

u_i: adapters of client i's near blocks and head; phi: adapters of far blocks. Round: every client
trains u_i with a copy of phi (server "parallel"; per tensor, phi <- weighted mean over the clients
that host it far), or all clients train one phi, batch by batch as they come ("sequential").
ref_l is phi_l where somebody hosts block l far, else where everybody began. R, by ``form``:

    prox    lambda/2 sum_l |dW_i,l - dW_ref,l|^2, a term of every step
    mix     u_i,l <- (1 - beta) u_i,l + beta ref_l, at the start of a turn
    freeze  u_i,l <- ref_l, and it does not train

A head that nobody hosts has no learned reference. If it is "fixed", all clients keep the one that
they began with: then what is learned about labels must go into the blocks, and those are shared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat

from flexp.client.desk import Desk, Drag
from flexp.model.ops import SlotSpec
from flexp.parcel import Parcel
from flexp.selection import ALL, FAR, FRONT, HEAD, NEAR, NONE, Where
from flexp.strategies.alignment import aligned_loss, approach, ramped
from flexp.strategies.base import ClientId, MethodKind, Scene, Served, Setting, Strategy, Turn
from flexp.tensors import Tensors, agreed_mean, mean_by_name


@dataclass(frozen=True)
class FlexP(Strategy[Tensors]):
    """Near parts stay personal and never leave; far parts are merged per block over their hosts.

    ``trunk``: "shared" gives all tenants the merged blocks, "pulled" lets each keep a copy that is
    aligned like its near parts. ``align``: lambda or beta, reached after ``ramp`` rounds, on the
    ``nearest`` near blocks at each cut (None: all). ``head``: "free", "aligned" like the blocks, or
    "fixed". ``distil`` and ``feature`` weigh forms B and C, ``conflicts`` "project" is form D.
    """

    trunk: Literal["shared", "pulled"] = "shared"
    server: Literal["parallel", "sequential"] = "parallel"
    form: Literal["prox", "mix", "freeze"] = "mix"
    align: NonNegativeFloat = 0.5
    ramp: NonNegativeInt = 0
    nearest: NonNegativeInt | None = None
    head: Literal["free", "aligned", "fixed"] = "fixed"
    head_rows: PositiveFloat = 1.0
    front: Literal["personal", "frozen"] = "personal"
    compare: Literal["product", "factors"] = "product"
    distil: NonNegativeFloat = 0.0
    feature: NonNegativeFloat = 0.0
    conflicts: Literal["mean", "project"] = "mean"
    moments: Literal["fresh", "keep"] = "fresh"
    staleness: NonNegativeFloat = 0.5

    name: ClassVar[str] = "flexp"
    paper: ClassVar[str] = "Yuan, Geng et al. 2025, arXiv 2508.10349"
    kind: ClassVar[MethodKind] = "split"
    own: ClassVar[Where] = NEAR & ~HEAD
    reconstruction: ClassVar[str] = "alignment, server merge and split choice are our reading"
    slots: ClassVar[Mapping[str, SlotSpec]] = {
        "personal": SlotSpec(lasts="run"),
        "reference": SlotSpec(),
    }

    def refuses(self, setting: Setting) -> str:
        if self.trunk == "pulled" and self.server == "sequential":
            return 'with one phi for all there are no copies to pull. Set trunk to "shared".'
        if self.conflicts == "project" and self.server == "sequential":
            return 'with one phi for all no copies conflict. Set conflicts to "mean".'
        if self.form == "mix" and self.align > 1:
            return "mix goes part of the way to the reference. Set align to at most 1."
        return super().refuses(setting)

    def owns(self) -> Where:
        return self.moving() if self.trunk == "pulled" else NEAR & self.moving()

    def specs(self) -> Mapping[str, SlotSpec]:
        home = "server" if self.server == "sequential" else "tenant"
        policy = {"home": home, "moments": self.moments, "staleness": self.staleness}
        personal = replace(self.slots["personal"], **policy, eager=home == "server")
        rows = self.head_rows if self.head == "fixed" else None
        return {
            "personal": replace(personal, head_rows=rows),
            "reference": replace(self.slots["reference"], head_rows=rows),
        }

    @property
    def barrier(self) -> bool:
        return self.server == "parallel"

    def start(self, scene: Scene) -> Tensors:
        return {}

    def offer(self, state: Tensors, client: ClientId, turn: Turn) -> Parcel:
        adapters = {"reference": dict(state)} if self.looks_back() else {}
        if self.trunk == "shared" and self.server == "parallel":
            adapters["personal"] = turn.select(client, state, FAR)
        return Parcel(adapters, facts={"strength": self.align * ramped(turn.round, self.ramp)})

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        strength, region = float(str(offer.facts["strength"])), self.aligned()
        self.restart(desk, strength)
        pull = [Drag("reference", strength, region, self.compare)] if self.form == "prox" else []
        facts = desk.fit(aligned_loss(self.distil, self.feature), pull=pull, train=self.moving())
        return desk.reply("personal", where=self.given(), facts=facts)

    def merge(self, state: Tensors, replies: Mapping[ClientId, Parcel], turn: Turn) -> Tensors:
        trained = [reply.adapters["personal"] for reply in replies.values()]
        if self.server == "sequential":
            return {**state, **(trained[-1] if trained else {})}
        weights, project = turn.weights(list(replies)), self.conflicts == "project"
        merged = agreed_mean(trained, weights, state) if project else mean_by_name(trained, weights)
        return {**state, **merged}

    def personal(self, desk: Desk, offer: Parcel) -> Served:
        if self.form == "freeze" and "strength" in offer.facts:  # none is offered to who is alone
            self.restart(desk, 1.0)
        return super().personal(desk, offer)

    # ---- what is merged, what is aligned, what trains, and how

    def given(self) -> Where:
        """What of a client's adapters is merged."""
        return FAR

    def averages(self) -> Where:
        plain = self.trunk == "shared" and self.server == "parallel" and self.conflicts == "mean"
        return FAR if plain else NONE

    def aligned(self) -> Where:
        """What is pulled to the reference."""
        blocks = NEAR & ~HEAD & ~FRONT if self.front == "frozen" else NEAR & ~HEAD
        if self.nearest is not None:
            blocks = blocks & Where(nearest=self.nearest)
        blocks = blocks | (NEAR & HEAD) if self.head == "aligned" else blocks
        return blocks | FAR if self.trunk == "pulled" else blocks

    def moving(self) -> Where:
        """What trains."""
        where = ~(NEAR & HEAD) if self.head == "fixed" else ALL
        where = where & ~FRONT if self.front == "frozen" else where
        return where & ~self.aligned() if self.form == "freeze" else where

    def restart(self, desk: Desk, strength: float) -> None:
        """Moves what is aligned to the reference, or part of the way."""
        share = {"prox": 0.0, "mix": strength, "freeze": 1.0}[self.form]
        if share:
            approach(desk, "reference", share, self.aligned())

    def looks_back(self) -> bool:
        """Whether the reference is used at all."""
        return bool(self.align or self.form == "freeze" or self.distil or self.feature)
