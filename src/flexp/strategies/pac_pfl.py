"""PAC-PFL (Boroujeni et al., 2024, arXiv 2401.08351): clients learn a distribution over priors.

Each client is Bayesian: it has a prior xi of functions of frozen features, and its model is the
posterior given its rows; Z_i(xi) is their evidence. What is learned together is the hyper-posterior
    log Q(xi) = kappa log P(xi) + c sum_i (1/n_i) log Z_i(xi) + const,  c = h / (h + N)
with P a hyper-prior, N the clients and h the harmonic mean of their n_i; K particles stand for it.
Round: all xi_k are offered;  client i gives grad_k (1/n_i) log Z_i(xi_k) for each;  then
    xi <- an Adam step along phi(xi), SVGD's direction (`svgd.py`) of all K together
Served, also to ``newcomers``, who give nothing:  p(y | x) = sum_k w_ik p(y | x, rows of i, xi_k),
w_ik ~ exp(log Z_i(xi_k)). K = 1 is MAP; kappa = 0 with one client is maximum likelihood, type II.

Features are the mean over positions of what leaves the last block, made to mean 0 and variance 1:
they cross the cut forward only, once per row, and stay in the client's memory. No adapter trains.
With ``clip`` a client's gradient of each particle has at most that norm, and with ``epsilon`` it
gets Gaussian noise of variance 2 ln(1.25/delta) clip^2/epsilon^2 (`privacy/noise.py`): that shows
the price of such noise, and protects nobody. On own rows the recipe's calibration error was below
MAP's with one seed and above with another; on everybody's rows it was below with both.

Reconstruction: classification (codes by least squares, or softmax by Laplace), which features, the
linear head, numbers of P and kappa; with a part of the clients their sum counts N times its mean,
and N are those heard of so far. Left out: Laplace noise, early stopping, variational evidence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from flexp.client.desk import Desk
from flexp.client.features import features_of, kept
from flexp.model.backbone import Backbone
from flexp.model.ops import Optim, SlotSpec
from flexp.parcel import Parcel
from flexp.privacy.egress import Leave
from flexp.privacy.noise import Noise, noised
from flexp.strategies.base import ClientId, MethodKind, Scene, Served, Setting, Strategy, Turn
from flexp.strategies.priors import Family, mixture
from flexp.strategies.steps import stepped
from flexp.strategies.svgd import direction
from flexp.tensors import Tensors

AT, SLOPES = "particles", "slopes"


@dataclass(frozen=True)
class Cloud:
    """The particles [K, |xi|], the rows that clients told of, and what Adam remembers."""

    family: Family
    particles: Tensor
    rows: Mapping[ClientId, int] = field(default_factory=dict[ClientId, int])
    memory: Mapping[str, Tensors] = field(default_factory=dict[str, Tensors])


@dataclass(frozen=True)
class PacPfl(Strategy[Cloud]):
    """Clients learn a distribution over priors; each serves its own Bayesian posterior.

    ``particles`` is K, and Adam's step is ``rate``, times ``decay`` each round. ``prior`` is a GP,
    whose kernel has a network of ``hidden`` numbers (0: none), or a linear head; ``likelihood``
    says how labels are seen. ``clip``, ``epsilon`` and ``delta`` are of the noise.
    """

    particles: PositiveInt = 10
    prior: Literal["gp", "linear"] = "gp"
    likelihood: Literal["codes", "softmax"] = "codes"
    hidden: NonNegativeInt = 16
    kappa: NonNegativeFloat = 0.01
    rate: PositiveFloat = 1e-3
    decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    clip: PositiveFloat | None = None
    epsilon: PositiveFloat | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    newcomers: tuple[ClientId, ...] = ()

    name: ClassVar[str] = "pac_pfl"
    paper: ClassVar[str] = "Boroujeni et al. 2024, arXiv 2401.08351"
    kind: ClassVar[MethodKind] = "personalised"
    alone: ClassVar[bool] = False
    reconstruction: ClassVar[str] = "classification, the linear head, features, numbers"
    slots: ClassVar[Mapping[str, SlotSpec]] = {"personal": SlotSpec()}
    leaves: ClassVar[tuple[Leave, ...]] = (
        Leave("tensor/slopes", why="of the evidence of its rows, for each particle"),
    )

    def refuses(self, setting: Setting) -> str:
        if setting.task not in ("classification", "images"):
            return "it needs a label per row. Set task.kind=classification, or images."
        if setting.training.label_prior:
            return "its posterior knows label frequencies by itself. Remove train.label_prior."
        if self.epsilon is not None and self.clip is None:
            return "noise is as large as what is cut off allows. Set strategy.clip."
        if odd := sorted({*self.newcomers} - setting.seats.keys()):
            return f'its newcomer "{odd[0]}" is no client. Mend strategy.newcomers.'
        if not setting.seats.keys() - {*self.newcomers}:
            return "all clients are newcomers, who give nothing. Shorten strategy.newcomers."
        return self.unequal_heads(replace(setting, head=True))

    def start(self, scene: Scene) -> Cloud:
        family = self.family(scene)
        return Cloud(family, family.drawn(self.particles, scene.dice("particles")))

    def family(self, of: Scene | Backbone) -> Family:
        """The priors that xi may be."""
        return Family(self.prior, self.likelihood, *of.sizes, self.hidden)

    def offer(self, state: Cloud, client: ClientId, turn: Turn) -> Parcel:
        return Parcel(tensors={AT: state.particles})

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        (known, labels), family = kept(desk), self.family(desk.model.backbone)
        if desk.client in self.newcomers:
            return desk.reply()
        slopes, found = list[Tensor](), list[float]()
        noise = Noise(self.clip, self.epsilon, self.delta)
        for k, xi in enumerate(offer.tensors[AT].double()):
            at = xi.requires_grad_()
            mean = family.posterior(at, known, labels).log_z / len(known)
            (slope,) = torch.autograd.grad(mean, at)
            slopes.append(noised(slope, desk.dice("noise", particle=k), noise))
            found.append(float(mean.detach()))
        facts = {"loss": -sum(found) / len(found), "steps": 1, "rows": len(known)}
        return desk.reply(tensors={SLOPES: torch.stack(slopes).float()}, facts=facts)

    def merge(self, state: Cloud, replies: Mapping[ClientId, Parcel], turn: Turn) -> Cloud:
        at, told = state.particles.double(), {c: r.facts.get("rows") for c, r in replies.items()}
        given = [r.tensors[SLOPES].double() for r in replies.values() if SLOPES in r.tensors]
        given = [slopes for slopes in given if slopes.shape == at.shape]
        rows = {**state.rows, **{c: n for c, n in told.items() if isinstance(n, int) and n > 0}}
        if not given or not rows:
            return state
        harmonic = len(rows) / sum(1 / n for n in rows.values())
        share = harmonic / (harmonic + len(rows))
        evidence = len(rows) * torch.stack(given).mean(0)
        mean, std = state.family.moments()
        slopes = self.kappa * (mean - at) / std.square() + share * evidence
        optim = Optim("adamw", self.rate * self.decay**turn.round)
        moved, memory = stepped({AT: at}, {AT: -direction(at, slopes)}, state.memory, optim)
        return replace(state, particles=moved[AT], rows=rows, memory=memory)

    def personal(self, desk: Desk, offer: Parcel) -> Served:
        mixed = mixture(self.family(desk.model.backbone), offer.tensors[AT].double(), *kept(desk))
        return Served(lambda batch: mixed.predict(features_of(desk.model, batch)).float(), None)
