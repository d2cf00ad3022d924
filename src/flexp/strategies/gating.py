"""A gate: a small network that says which of some experts a row is for, by frozen features.

Features of a row are the mean of the last hidden states of the model without any adapter, with mean
0 and variance 1 over their width: the same at every client, in every round. Most of that is what
all rows have in common. So the first who train a gate tell the mean of their rows, and from then on
the mean of these is taken off, and what is left has variance 1 again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from flexp.client.desk import Desk
from flexp.client.features import features_of
from flexp.data.examples import Batch
from flexp.dice import Dice
from flexp.model.ops import Optim, Step
from flexp.model.personal import PersonalModel
from flexp.model.prefix import READ, Key, keys_of
from flexp.model.slots import Slots
from flexp.selection import Place
from flexp.strategies.generator import drawn
from flexp.tensors import Tensors, finite

CENTRE = "gate/centre"
SMALL = 0.1  # of the last layer, so that a gate begins with about equal shares


def names_of(hidden: int) -> tuple[str, ...]:
    """Of the tensors of a gate."""
    layers = range(2 if hidden else 1)
    return (CENTRE, *(f"gate/{n}/{what}" for n in layers for what in ("weight", "bias")))


@dataclass
class Gate:
    """A gate at a client: as it was sent, or drawn when it first sees features.

    There are ``hidden`` numbers in between; with 0 it is linear. One expert needs no gate: it has
    no tensors then, and looks at nothing. ``seen`` are features of this turn's rows.
    """

    tensors: Tensors
    dice: Dice
    hidden: int
    experts: int
    seen: dict[Key, Tensor] = field(default_factory=dict[Key, Tensor])

    def says(self, model: PersonalModel, batch: Batch, by: Tensors | None = None) -> Tensor:
        """A number per row and expert, before the softmax; ``by`` are layers for its own."""
        return self.scored(self.features(model, batch), by)

    def scored(self, features: Tensor, by: Tensors | None = None) -> Tensor:
        """The same of features."""
        self.tensors = self.tensors or self.begun(features.shape[1])
        if CENTRE in self.tensors:
            features = normal(features - self.tensors[CENTRE])
        out, layers = features, by or self.layers
        for n in range(len(layers) // 2):
            weight, bias = layers[f"gate/{n}/weight"], layers[f"gate/{n}/bias"]
            out = functional.linear(out.relu() if n else out, weight, bias)
        return out

    @property
    def layers(self) -> Tensors:
        """What of it learns."""
        return {k: v for k, v in self.tensors.items() if k != CENTRE}

    def shares(self, desk: Desk) -> tuple[Tensor, Tensors]:
        """What part of the client's training rows each expert is for; and the rows' centre."""
        if self.experts == 1:
            return torch.ones(1), {}
        features = torch.cat([self.features(desk.model, b) for b in desk.batches(epochs=1)])
        shares = self.scored(features).softmax(1).mean(0)
        return shares, {CENTRE: features.mean(0)}

    def begun(self, width: int) -> Tensors:
        """Where it begins."""
        sizes = [width, *([self.hidden] if self.hidden else []), self.experts]
        out = Tensors()
        for n, (below, above) in enumerate(pairwise(sizes)):
            size = SMALL if n == len(sizes) - 2 else 1.0
            out[f"gate/{n}/weight"] = size * drawn(self.dice("layer", n=n), above, below)
            out[f"gate/{n}/bias"] = torch.zeros(above)
        return out

    def features(self, model: PersonalModel, batch: Batch) -> Tensor:
        """Of a batch's rows [rows, width]; computed for all of them if one is new."""
        keys = keys_of(batch.inputs) if set(batch.inputs) in READ else []
        if not keys or any(key not in self.seen for key in keys):
            found = features_of(model, batch, ())
            self.seen.update(zip(keys, found, strict=False))
            return found
        return torch.stack([self.seen[key] for key in keys])


def normal(rows: Tensor) -> Tensor:
    """Rows with mean 0 and variance 1."""
    return functional.layer_norm(rows, rows.shape[1:])


class Lesson:
    """A gate that learns beside adapters: a step per batch, along the slopes of all its parts.

    A step without finite slopes is left out. Each graph has leaves of its own, and their slopes are
    added in the order in which graphs began: on whatever thread, it is the same sum.
    """

    def __init__(self, gate: Gate, optim: Optim) -> None:
        self.gate, self.graphs = gate, list[Tensors]()
        self.slots = Slots(lambda name: Place("near", "head", 0, 0), 0, optims={"gate": optim})
        self.slots.put("gate", gate.layers)

    def leaves(self) -> Tensors:
        """The gate's tensors for the graph that begins now."""
        self.graphs.append({k: v.clone().requires_grad_() for k, v in self.slots["gate"].items()})
        return self.graphs[-1]

    def paced(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, with a step after each."""
        for batch in batches:
            yield batch
            self.step()

    def step(self) -> None:
        """One step along what has been gathered."""
        slopes = Tensors()
        for leaves in self.graphs:
            for k, leaf in leaves.items():
                if leaf.grad is not None:
                    slopes[k] = slopes[k] + leaf.grad if k in slopes else leaf.grad
        self.graphs.clear()
        if slopes and finite(slopes):
            self.slots.put("gate@g", slopes)
            self.slots.do([Step("gate", "gate@g")])
            self.gate.tensors = {**self.gate.tensors, **self.slots["gate"]}
