"""What the compute thread computes: forwards of the trunk and their gradients, alone or together.

Together, the frozen products are made once for the rows of several tenants; each row enters and
leaves at its own cut and wears its own adapters, so the numbers are those of each alone but for the
order of sums. In exact mode nothing is computed together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from flexp.link.messages import Backward, Forward
from flexp.model.backbone import Backbone
from flexp.model.cut import Seat
from flexp.model.dress import Leaves, dress, dropping
from flexp.model.joint import Member
from flexp.model.personal import Objective
from flexp.model.prompts import AT_CUT, put_in, taken_out, widened
from flexp.model.slots import Slots
from flexp.model.together import Together
from flexp.model.worn import Worn
from flexp.server.bodies import Others, body_at
from flexp.server.pending import Graph, Shared, Waiting
from flexp.tensors import Stacked, terms


@dataclass(frozen=True)
class ForwardJob:
    """A forward that a tenant asks for, over slots that no later step moves."""

    client: str
    seat: Seat
    slots: Slots
    message: Forward

    @property
    def tokens(self) -> int:
        """Rows times length."""
        return int(self.message.hidden.shape[0] * self.message.hidden.shape[1])

    @property
    def shape(self) -> Hashable:
        """What its graph's bytes depend on."""
        m = self.message
        size, slots = tuple(m.hidden.shape), len(self.slots.values)
        return self.seat.cut, self.seat.model, m.until, size, m.hidden.dtype, m.wants, slots


@dataclass(frozen=True)
class BackwardJob:
    """The gradient of a forward's result, to be taken back through its graph.

    ``again`` computes the graph once more, if others of its pass were differentiated without it.
    """

    client: str
    graph: Graph
    message: Backward
    again: Callable[[], Graph]

    def fresh(self) -> BackwardJob:
        """The same with a graph that can be differentiated."""
        return replace(self, graph=self.again()) if self.graph.spent else self

    @property
    def tokens(self) -> int:
        """Rows times length of what it is the gradient of."""
        return int(self.graph.hidden.shape[0] * self.graph.hidden.shape[1])

    def wanted(self) -> list[Tensor]:
        """By what is differentiated: the hidden state if asked for, coefficients, and leaves."""
        hidden = [self.graph.hidden] if self.message.hidden else []
        return [*hidden, *self.graph.coefs, *self.graph.leaves.tensors()]


Job = ForwardJob | BackwardJob
Gradients = tuple[Tensor | None, ...]


class Compute:
    """Forwards and gradients over backbones; only the compute thread calls it."""

    def __init__(
        self,
        backbone: Backbone,
        task: Objective,
        waiting: Waiting,
        *,
        dropout: float,
        others: Others | None = None,
    ) -> None:
        self.backbone, self.task, self.waiting, self.dropout = backbone, task, waiting, dropout
        self.jointly, self.others = Together(backbone), others or {}

    def kind(self, seat: Seat, m: Forward) -> Hashable:
        """What forwards have in common that can be one pass; None for one that is always alone.

        A gate looks at a row's real positions, which a joint pass does not know, and a pass has one
        model.
        """
        if seat.model or (isinstance(m.wear, Stacked) and m.wear.gated):
            return None
        if seat.cut.front + seat.cut.back >= self.backbone.depth:
            return None
        image = tuple(s[1:] for s in m.shapes.values() if len(s) != 2)
        return (m.keep, tuple(sorted(m.shapes)), image, m.hidden.shape[1] if image else None)

    def alone(self, job: Job) -> Any:
        """A graph and its bytes, or gradients in the order of ``wanted``."""
        if isinstance(job, BackwardJob):
            return self._gradients([job.fresh()])[0]
        again = partial(self.graph, job)
        if not job.message.keep:
            return again(), 0
        return self.waiting.measured(job.shape, again, job.tokens)

    def together(self, jobs: Sequence[Job]) -> list[Any]:
        """The same for several that have one kind, in one pass."""
        backwards = [job for job in jobs if isinstance(job, BackwardJob)]
        if backwards:
            return self._gradients(backwards)
        forwards = [job for job in jobs if isinstance(job, ForwardJob)]
        alike = ((job.seat.cut, job.message.wants, len(job.slots.values)) for job in forwards)
        shape = frozenset(alike)
        tokens = sum(job.tokens for job in forwards)
        graphs, size = self.waiting.measured(shape, partial(self._graphs, forwards), tokens)
        return [(g, size * j.tokens // tokens) for g, j in zip(graphs, forwards, strict=True)]

    # ---- forwards

    def graph(self, job: ForwardJob) -> Graph:
        """One forward: called again, it gives the same bits."""
        with torch.set_grad_enabled(job.message.keep):
            worn, feed, graph = self._dressed(job)
            return replace(graph, out=self._out(job, worn, feed, job.seat.cut.front))

    def _out(self, job: ForwardJob, worn: Worn, feed: Tensor, first: int) -> Tensor:
        """What a forward asks for, from the hidden state before a block."""
        m, last = job.message, None
        body = body_at(job.seat, self.backbone, self.others)
        if m.until == "hidden":
            last = body.depth - job.seat.cut.back
        blanks = body.blanks(*widened(m.shapes, m.mask, worn.at_cut))
        out = body.run(blanks, worn, first=first, last=last, feed=feed)
        if m.until != "hidden" and out.dim() == 3:
            out = taken_out(out, worn.at_cut)
        if m.labels is not None and m.until == "loss":
            return self.task.loss(out, m.labels)
        return out

    def _graphs(self, jobs: Sequence[ForwardJob]) -> list[Graph]:
        depth, messages = self.backbone.depth, [job.message for job in jobs]
        with torch.set_grad_enabled(messages[0].keep):
            dressed = [self._dressed(job) for job in jobs]
            members = [
                Member(job.seat.cut.front, depth - job.seat.cut.back, feed, worn)
                for job, (worn, feed, _) in zip(jobs, dressed, strict=True)
            ]
            wide = [
                widened(m.shapes, m.mask, worn.at_cut)
                for m, (worn, _, _) in zip(messages, dressed, strict=True)
            ]
            shapes, masks = [s for s, _ in wide], [mask for _, mask in wide]
            hidden = self.jointly.run(members, shapes, masks)
            # Heads are not alike: each is alone with its own.
            outs = [
                self._out(job, member.worn, out, member.last)
                for job, member, out in zip(jobs, members, hidden, strict=True)
            ]
        shared = Shared({job.client for job in jobs})
        graphs = [graph for *_, graph in dressed]
        return [replace(g, out=o, shared=shared) for g, o in zip(graphs, outs, strict=True)]

    def _dressed(self, job: ForwardJob) -> tuple[Worn, Tensor, Graph]:
        """What a forward wears, what it starts from, and its leaves; there is no result yet."""
        m, leaves = job.message, Leaves()
        given = iter(m.coefs)
        coefs = [
            next(given).detach().requires_grad_(m.keep)
            if isinstance(t.coef, float) and math.isnan(t.coef)
            else None
            for t in terms(m.wear)
        ]
        hidden = m.hidden.detach().requires_grad_(m.keep and m.wants)
        worn = dress(job.slots, m.wear, coefs, m.train, leaves)
        worn = dropping(worn, self.dropout, m.dropout)
        feed = put_in(hidden, worn.inputs[AT_CUT]) if worn.at_cut else hidden
        return worn, feed, Graph(hidden, hidden, [c for c in coefs if c is not None], leaves)

    # ---- gradients

    def _gradients(self, jobs: Sequence[BackwardJob]) -> list[Gradients]:
        """Gradients of several graphs, those of one pass in one walk back through it."""
        wanted = [job.wanted() for job in jobs]
        inputs = [tensor for some in wanted for tensor in some]
        found: Gradients = ()
        for job in jobs:
            if job.graph.shared is not None:
                job.graph.shared.done = True
        some = [job for job in jobs if job.graph.out.requires_grad]
        if inputs and some:
            outs, grads = [job.graph.out for job in some], [job.message.grad for job in some]
            found = cast(Gradients, torch.autograd.grad(outs, inputs, grads, allow_unused=True))
        each = iter(found or (None,) * len(inputs))
        return [tuple(next(each) for _ in mine) for mine in wanted]
