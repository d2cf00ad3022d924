"""Slopes from losses alone: asked what the loss is near a code, a model is never differentiated.

Along u, the loss f of a row with code c changes by
    one side:   (f(c + rho u) - f(c)) / rho                     error O(rho), n + 1 queries
    two sides:  (f(c + rho u) - f(c - rho u)) / (2 rho)         error O(rho^2), 2 n queries
The slope is the sum of that times u over the coordinates (CGE), or its mean over n random u: signs
(SPSA, Spall 1992), or normal numbers as in MeZO (Malladi et al. 2023, arXiv 2305.17333), there in
the space of weights, here in that of codes. Every row has its own u.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flexp.client.desk import Desk
from flexp.client.parts import LossFn
from flexp.data.examples import Batch
from flexp.model.dress import dress
from flexp.model.personal import PersonalModel
from flexp.model.surgery import NAMES, NUDGE, At, coded, decoded, middle
from flexp.tensors import Tensors, Wear

Ask = Callable[[Tensor], Tensor]  # nudges [queries, rows, numbers] to losses [queries, rows]


@dataclass(frozen=True)
class Queries:
    """How slopes are estimated: along what, on how many sides, how far off, how many at once.

    ``directions`` are of random ones; ``at_once`` queries share a forward (None: all do).
    """

    along: Literal["coordinates", "signs", "normal"] = "coordinates"
    sides: Literal["one", "two"] = "one"
    rho: float = 5e-3
    directions: int = 8
    at_once: int | None = None

    def count(self, size: int) -> int:
        """Forwards of a row for one slope by a code of so many numbers."""
        lines = size if self.along == "coordinates" else self.directions
        return lines + 1 if self.sides == "one" else 2 * lines

    def lines(self, like: Tensor, stream: torch.Generator) -> Tensor:
        """The u's, [lines, rows, numbers], for codes like these."""
        rows, size = like.shape
        if self.along == "coordinates":
            return torch.eye(size, dtype=like.dtype)[:, None].expand(-1, rows, -1).to(like.device)
        u = torch.empty(self.directions, rows, size, dtype=like.dtype)
        u = u.normal_(generator=stream)
        return (u.sign() if self.along == "signs" else u).to(like.device)

    def slope(self, ask: Ask, like: Tensor, stream: torch.Generator) -> tuple[Tensor, Tensor]:
        """The losses [rows], with two sides in the middle between them, and slopes [rows, numbers].

        ``like`` is of a code's shape and type.
        """
        u = self.lines(like, stream)
        lines, step = len(u), self.rho * u
        nudges = torch.cat([step, torch.zeros_like(step[:1]) if self.sides == "one" else -step])
        most = self.at_once or len(nudges)
        found = torch.cat([ask(nudges[at : at + most]) for at in range(0, len(nudges), most)])
        ahead, behind = found[:lines], found[lines:]
        width = self.rho if self.sides == "one" else 2 * self.rho
        change = (ahead - behind) / width
        slope = (change[..., None] * u).sum(0)
        value = behind[0] if self.sides == "one" else found.mean(0)
        return value, slope if self.along == "coordinates" else slope / lines


def asked(desk: Desk, wear: Wear, at: At, how: Queries) -> LossFn:
    """The loss of a wear with surgery. Its gradient is estimated at the code, exact before it.

    No forward but the encoder's is kept for a backward, here or at the server.
    """

    def loss(model: PersonalModel, batch: Batch) -> Tensor:
        code = coded(mean_of(model, batch, wear, at), worn_by(model, wear), at)

        def ask(nudges: Tensor) -> Tensor:
            logits = model.logits(batch, wear, near={NUDGE: nudges.flatten(0, 1)})
            labels = torch.cat([batch.labels] * len(nudges))
            each = [slice(n, n + 1) for n in range(len(labels))]
            losses = torch.stack([model.task.loss(logits[n], labels[n]) for n in each])
            return losses.view(len(nudges), -1)

        stream = desk.dice("directions", step=desk.counter).generator()
        with torch.no_grad():
            value, slope = how.slope(ask, code, stream)
        # 0 with a gradient; NaN if the estimate is no number, and then there is no step.
        return value.mean() + ((code - code.detach()) * slope).sum() / len(code)

    return loss


def rebuilt(desk: Desk, wear: Wear, at: At, spread: float) -> LossFn:
    """How far what the auto-encoder makes of means is from them, whosever rows they are.

    Rows' own codes are normal numbers of that ``spread``. Nothing is asked of the server.
    """

    def loss(model: PersonalModel, batch: Batch) -> Tensor:
        worn, mean = worn_by(model, wear), mean_of(model, batch, wear, at)
        drawn = torch.empty(len(mean), len(worn[NAMES[at]["own"]]))
        stream = desk.dice("codes", step=desk.counter).generator()
        own = drawn.normal_(generator=stream).to(mean) * spread
        return (decoded(coded(mean, worn, at, own), worn, at) - mean).square().mean()

    return loss


def worn_by(model: PersonalModel, wear: Wear) -> Tensors:
    """What of a wear is at the input, as leaves of the present graph."""
    return dress(model.past or model.near, wear, (), model.train, model.leaves).inputs


def mean_of(model: PersonalModel, batch: Batch, wear: Wear, at: At) -> Tensor:
    """The means of hidden states before surgery; nothing below it trains."""
    with torch.no_grad():
        if at == "cut":
            hidden = model.hidden(batch, wear, at="cut")
        else:
            hidden = model.backbone.run(batch.inputs, last=0)
        return middle(hidden, batch.inputs.get("attention_mask"))
