"""Experts that a gate chooses among: what they say and learn together, and their means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional

from flexp.client.parts import LossFn
from flexp.data.examples import Batch
from flexp.data.loss import wide
from flexp.model.personal import PersonalModel
from flexp.parcel import Parcel
from flexp.strategies.base import ClientId, Turn
from flexp.strategies.gating import Gate, Lesson
from flexp.tensors import PerRow, Tensors, mean, mean_by_name

SHARES = "shares"  # a fact of a reply: what part of the client's rows each expert is for


@dataclass(frozen=True)
class Experts:
    """The experts and their gate, which is drawn by ``seed`` until somebody has trained it.

    ``names`` are those of the tensors that a gate may have.
    """

    seed: int
    held: tuple[Tensors, ...]
    names: tuple[str, ...]
    gate: Tensors = field(default_factory=dict[str, Tensor])

    def offered(self) -> dict[str, Tensors]:
        """The experts by slot."""
        return {expert(k): held for k, held in enumerate(self.held)}

    def averaged(self, replies: Mapping[ClientId, Parcel], turn: Turn) -> Experts:
        """Each as the mean of those who trained it, by rows times what they tell of it, if they do.

        An expert that nobody trained, or for which nobody counts, is what it was.
        """
        each = [*zip(replies.values(), turn.weights([*replies]), strict=True)]
        found = list[Tensors]()
        for k, (slot, before) in enumerate(self.offered().items()):
            by = [(r.adapters[slot], n * share(r, k)) for r, n in each if slot in r.adapters]
            found.append(middle(by, before))
        gate = mean_by_name(self.fitting([r.tensors for r, _ in each]), [n for _, n in each])
        return replace(self, held=tuple(found), gate={**self.gate, **gate})

    def fitting(self, gates: Sequence[Tensors]) -> list[Tensors]:
        """Of each gate the tensors that are like those here, or like the first of that name."""
        shapes: dict[str, torch.Size] = {}
        for name, value in ((k, v) for gate in (self.gate, *gates) for k, v in gate.items()):
            shapes.setdefault(name, value.shape)
        known = {name: shapes[name] for name in self.names if name in shapes}
        return [{k: v for k, v in gate.items() if v.shape == known.get(k)} for gate in gates]


def middle(each: Sequence[tuple[Tensors, float]], before: Tensors) -> Tensors:
    """The weighted mean of what counts; what there was before if nothing does."""
    counted = [(value, weight) for value, weight in each if weight > 0]
    values, weights = [value for value, _ in counted], [weight for _, weight in counted]
    return mean(values, weights) if counted else before


def expert(k: int) -> str:
    """The slot of an expert."""
    return f"expert/{k}"


def share(reply: Parcel, k: int) -> float:
    """What part of a client's rows an expert is for, as it tells; 1 if it tells nothing sound."""
    told = reply.facts.get(SHARES)
    if not isinstance(told, Sequence) or isinstance(told, str) or len(told) <= k:
        return 1.0
    part = told[k]
    return float(part) if isinstance(part, float | int) and 0 <= part <= 1 else 1.0


def joint_loss(chosen: Sequence[int], lesson: Lesson, own: int | None, pull: float) -> LossFn:
    """-log p(y|x) of some experts, in nats; of one, its own loss.

    With ``own``, ``pull`` times the cross-entropy of what the gate says with that expert is added.
    """
    gate = lesson.gate
    pulled = own if pull and gate.experts > 1 else None

    def loss(model: PersonalModel, batch: Batch) -> Tensor:
        leaves = lesson.leaves()
        if len(chosen) == 1:
            value = model.loss(batch, expert(chosen[0]))
        else:
            value = model.task.loss(joint(model, batch, gate, chosen, leaves), batch.labels)
        if pulled is None:
            return value
        wanted = torch.full((batch.rows,), pulled)
        return value + pull * functional.cross_entropy(gate.says(model, batch, leaves), wanted)

    return loss


def joint(
    model: PersonalModel,
    batch: Batch,
    gate: Gate,
    chosen: Sequence[int],
    leaves: Tensors | None = None,
) -> Tensor:
    """log p(y|x) of some experts, which are logits as well; of one, its own logits.

    The gate is asked after their forwards. So in the backward it has all its slopes before any of
    these waits for the server, and its step never lacks one.
    """
    logits = [model.logits(batch, expert(k)) for k in chosen]
    if len(chosen) == 1:
        return logits[0]
    return mixture(logits, gate.says(model, batch, leaves)[:, list(chosen)])


def mixture(logits: Sequence[Tensor], says: Tensor) -> Tensor:
    """log p(y|x) = log sum_k pi_k(x) p_k(y|x), from logits and what a gate says [rows, K].

    Of a text each token is a mixture, by its row's shares.
    """
    each = torch.stack([torch.log_softmax(wide(one), -1) for one in logits])
    logs = torch.log_softmax(says, 1).T
    return (each + logs.reshape(*logs.shape, *[1] * (each.dim() - 2))).logsumexp(0)


def by_row(model: PersonalModel, batch: Batch, gate: Gate) -> Tensor:
    """Logits of the expert that each row is for, all in one forward."""
    best = [int(k) for k in gate.says(model, batch).argmax(1)]
    used = sorted({*best})
    wear = PerRow(tuple(expert(k) for k in used), tuple(used.index(k) for k in best))
    return model.logits(batch, wear)
