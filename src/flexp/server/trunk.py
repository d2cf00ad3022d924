"""The far part of every forward and backward, over the server's backbones."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from flexp.errors import LinkError
from flexp.link.messages import (
    Answer,
    Backward,
    Continue,
    Do,
    Fetch,
    Forward,
    Join,
    Message,
    Put,
    Submit,
)
from flexp.model.backbone import Backbone
from flexp.model.personal import Objective
from flexp.parcel import JSON, Parcel
from flexp.selection import select
from flexp.server.bodies import Others
from flexp.server.checks import check, check_finite, check_rows, odd_reply, refuse_odd
from flexp.server.compute import BackwardJob, Compute, ForwardJob, Gradients
from flexp.server.line import Request
from flexp.server.pending import Graph, Pending, Waiting
from flexp.server.rows import Rows
from flexp.server.steps import StepTable
from flexp.server.talks import Talks
from flexp.server.tenancy import Tenancy
from flexp.server.tenants import Tenants
from flexp.server.thread import ComputeThread, Work
from flexp.tensors import Tensors, slots_of


class Trunk(ComputeThread):
    """Answers messages, each exactly once, on one compute thread.

    One after another; ``together``, forwards that wait are computed in one pass with others, and
    backwards of one pass too. ``kept``: bytes of hidden states that a client may leave here.
    ``others`` are backbones of seats that name one; there messages are alone.
    """

    def __init__(
        self,
        backbone: Backbone,
        tenants: Tenants,
        task: Objective,
        *,
        dropout: float = 0.0,
        together: bool = False,
        kept: int = 0,
        others: Others | None = None,
    ) -> None:
        self.backbone, self.tenants, self.together = backbone, tenants, False
        self.tables: dict[str, StepTable] = {}
        self.pending = Waiting(rows=Rows(kept))
        self.talks = Talks(backbone, others or {})
        super().__init__(Compute(backbone, task, self.pending, dropout=dropout, others=others))
        if together:
            self.take_together()

    def take_together(self) -> None:
        """From now on what waits is computed together, if the backbone proves to take it.

        Call it before the first message: the proof looks at what blocks are called with.
        """
        self.together = self.in_turn(lambda: self.compute.jointly.possible)

    def handle(self, client: str, message: Message, digest: str = "") -> Answer:
        """The answer to a client's message, computed at most once per key."""
        return self.carry_out(client, message, self.answer(client, message, digest))

    def carry_out(self, client: str, message: Message, work: Work) -> Answer:
        """The answer that a message's work gives, computed with whom it can be."""
        request = Request(client, message, work, self._kind(client, message))
        if request.kind is not None and isinstance(message, Backward):
            request.mates = self.pending.mates(client, message.key.call)
        return self.served(request)

    def answer(self, client: str, message: Message, digest: str) -> Work:
        """Carries out a message, unless that was done before."""
        table = self.tables.setdefault(client, StepTable())
        found = table.find(message.key, digest)
        if found is not None:
            return found
        answer = yield from self._answer(client, message)
        table.keep(message.key, digest, answer)
        return answer

    def commit(self) -> None:
        """Forgets answers that both sides have on disk."""
        for table in self.tables.values():
            table.commit()

    def _kind(self, client: str, message: Message) -> Hashable:
        """What a message can be computed with; None if it is alone.

        So is who trains a slot that all wear: in which order its steps come must not change.
        """
        home = self.tenants.homes.get(client)
        if not self.together or self.flops is not None or home is None:
            return None
        if any(spec.home == "server" for spec in home.specs.values()):
            return None
        if isinstance(message, Forward):
            return self.compute.kind(home.seat, message)
        return "backward" if isinstance(message, Backward) else None

    # ---- messages

    def _answer(self, client: str, message: Message) -> Work:
        home = self.tenants[client]
        check_finite(client, message)
        before = dict(home.slots.values), dict(home.slots.grads), dict(self.tenants.shared.values)
        counts = self.tenants.steps, home.stepped, home.seen
        try:
            return (yield from self._carried_out(home, message))
        except BaseException:
            # A message counts wholly or not at all: it may come again.
            home.slots.values, home.slots.grads, self.tenants.shared.values = before
            self.tenants.steps, home.stepped, home.seen = counts
            raise

    def _carried_out(self, home: Tenancy, message: Message) -> Work:
        client = home.client
        if isinstance(message, Fetch):
            return self._fetch(home, message)
        if isinstance(message, Join):
            return self._join(home, message)
        if isinstance(message, Put):
            self.tenants.hand_in(client, message.slot, message.values)
            return Answer()
        self.tenants.settled(client)
        if isinstance(message, Forward):
            return (yield from self._forward(home, message))
        if isinstance(message, Backward):
            return (yield from self._backward(home, message))
        if isinstance(message, Continue):
            self.tenants.wear_shared(home)
            until = "logits" if home.seat.labels == "logits" else "hidden"
            return Answer({until: self.talks.proceed(home, message)})
        if isinstance(message, Do):
            return Answer(scalars=tuple(self.tenants.do(home.client, message.ops)))
        return self._submit(home, message) if isinstance(message, Submit) else self._leave(home)

    def _join(self, home: Tenancy, message: Join) -> Answer:
        if message.seat != home.seat:
            raise LinkError(
                f'Client "{home.client}" came with seat {message.seat}, but it was given '
                f"{home.seat}. Both sides must run the same recipe."
            )
        for slot, asked in message.optims.items():
            given = home.specs[slot].optim if slot in home.specs else None
            if slot not in home.specs or given not in (None, asked):
                raise LinkError(
                    f'Client "{home.client}" would train slot "{slot:.80}" with {asked}, but the '
                    f"recipe has {given}. Both sides must run the same recipe."
                )
        self.tenants.optims(home.client, message.optims)
        self.pending.begin(home.client)
        self.talks.drop(home.client)
        offered = {slot: sorted(held) for slot, held in home.offered.items()}
        loose = {f"tensor/{k}": v for k, v in home.loose.items()}
        facts: dict[str, JSON] = {"offered": offered, "facts": dict(home.facts), "moved": None}
        if home.moving:
            there = {slot: sorted(names) for slot, names in home.there.items()}
            leaving = [slot for slot, held in home.leaving.items() if held]
            facts["moved"] = {"leaving": leaving, "there": there}
        return Answer(loose, facts=facts)

    def _fetch(self, home: Tenancy, message: Fetch) -> Answer:
        if message.leaving:
            held = home.leaving.get(message.slot, {})
        elif message.far:
            held = self.tenants.take(home.client, [message.slot], message.where)[message.slot]
        else:
            held = home.offered.get(message.slot, {})
            held = select(held, message.where, home.slots.place)
        return Answer({f"slot/{message.slot}/{k}": v for k, v in held.items()})

    def _submit(self, home: Tenancy, message: Submit) -> Answer:
        adapters: dict[str, Tensors] = {}
        for slot in (*message.near, *message.far):
            odd = f'slot "{slot:.80}", which is none that it gives'
            if slot in message.far and slot in home.specs:
                spec = home.specs[slot]
                known = self.tenants.initial(spec, home.seat)
                odd = odd_reply(home.slots, slot, message, known, any_rank=spec.any_rank)
            if odd:
                raise LinkError(
                    f'Client "{home.client}" submitted {odd}. Both sides must run the same recipe.'
                )
        for slot, where in message.far.items():
            far = self.tenants.take(home.client, [slot], where)[slot]
            refuse_odd(home.client, {f"slot/{slot}/{name}": far[name] for name in far})
            adapters[slot] = dict(sorted({**message.near.get(slot, {}), **far}.items()))
        home.reply = Parcel(adapters, dict(message.loose), message.facts)
        return Answer()

    def _leave(self, home: Tenancy) -> Answer:
        self.pending.drop(home.client)
        self.talks.drop(home.client)
        self.tenants.leave(home.client)
        return Answer()

    # ---- what is computed

    def _forward(self, home: Tenancy, m: Forward) -> Work:
        body = self.tenants.body(home.seat)
        check_rows(body, home.seat, m)
        rows, lacks = self.pending.rows, self.pending.rows.lacking(home.client, m)
        if not lacks:
            m = rows.whole(home.client, m)
            check(body, home.seat, m)
        self.tenants.do(home.client, m.ops)
        home.seen = self.tenants.steps
        if lacks:
            # Not an error: messages may be on their way that count on these operations.
            return Answer(facts={"lacks": lacks})
        self.tenants.wear_shared(home)
        worn = {slot: home.slots[slot] for slot in slots_of(m.wear)}
        job = ForwardJob(home.client, home.seat, replace(home.slots, values=worn, grads={}), m)
        graph, size = cast("tuple[Graph, int]", (yield job))
        rows.keep(home.client, m)
        if m.keep:
            again = partial(self.compute.graph, job)
            pending = Pending(m.key.step, m.part, again, graph, size, self.pending.clock())
            self.pending.keep(home.client, m.key.call, pending)
        return Answer({m.until: graph.out.detach()})

    def _backward(self, home: Tenancy, m: Backward) -> Work:
        pending = self.pending.of(home.client, m.key.call, m.key.step)
        graph = pending.whole()
        if (m.grad.shape, m.grad.dtype) != (graph.out.shape, graph.out.dtype):
            raise LinkError(
                f"The gradient has shape {list(m.grad.shape)} and {m.grad.dtype}, the result "
                f"{list(graph.out.shape)} and {graph.out.dtype}."
            )
        if m.hidden and not graph.hidden.requires_grad:
            raise LinkError("The gradient of a hidden state was asked for that was not wanted.")
        self.pending.done(home.client, m.key.call)
        self._count(home, (pending.step, pending.part), int(graph.hidden.shape[0]))
        found = cast(Gradients, (yield BackwardJob(home.client, graph, m, pending.again)))
        grads = iter(found)
        out: dict[str, Tensor] = {}
        of_hidden = next(grads) if m.hidden else None
        if of_hidden is not None:
            out["grad"] = of_hidden
        for n, coef in enumerate(graph.coefs):
            g = next(grads)
            out[f"coef/{n}"] = torch.zeros_like(coef) if g is None else g
        for slot, held in graph.leaves.grads(list(grads)).items():
            home.slots.gather(slot, held)
        return Answer(out)

    def _count(self, home: Tenancy, part: tuple[int, int], rows: int) -> None:
        """Rows of a step's part: those of the largest forward that was differentiated in it."""
        if home.counted != part:
            home.counted, home.counted_rows = part, 0
        home.rows += max(0, rows - home.counted_rows)
        home.counted_rows = max(rows, home.counted_rows)
