"""The far part of every forward and backward: one compute thread over the shared backbone."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from queue import Empty, SimpleQueue
from typing import TypeVar, cast

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
    Leave,
    Message,
    Put,
    Submit,
)
from flexp.model.backbone import Backbone
from flexp.model.cut import Seat
from flexp.model.dress import Leaves, dress, dropping
from flexp.model.meter import Meter
from flexp.model.personal import Objective
from flexp.model.slots import Slots
from flexp.model.worn import Worn
from flexp.parcel import JSON, Parcel
from flexp.selection import select
from flexp.server.checks import check, check_finite, refuse_odd
from flexp.server.pending import Graph, Pending, Waiting
from flexp.server.steps import StepTable
from flexp.server.talks import Talks
from flexp.server.tenants import Tenancy, Tenants
from flexp.tensors import slots_of, terms

T = TypeVar("T")
PARKED = 0.005  # seconds between two looks at whether the compute thread may go on


class Trunk:
    """Answers messages: each exactly once, one after another, in exact mode client by client."""

    def __init__(
        self, backbone: Backbone, tenants: Tenants, task: Objective, *, dropout: float = 0.0
    ) -> None:
        self.backbone, self.tenants, self.task, self.dropout = backbone, tenants, task, dropout
        self.tables: dict[str, StepTable] = {}
        self.pending = Waiting()
        self.talks = Talks(backbone)
        self.flops: dict[str, int] | None = None  # of each client's messages, if they are counted
        self.beside: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="flexp-trunk")

    def handle(self, client: str, message: Message, digest: str = "") -> Answer:
        """The answer to a client's message, computed at most once per key."""
        return self.in_turn(partial(self.answer, client, message, digest))

    def in_turn(self, work: Callable[[], T]) -> T:
        """Does something on the compute thread, after the messages that came before it."""
        return self.thread.submit(work).result()

    def between(self, work: Callable[[], T]) -> T:
        """Does something on the compute thread between two messages, also while it is parked."""
        done: Future[T] = Future()
        self.beside.put(partial(_settle, done, work))
        self.thread.submit(self._beside)
        return done.result()

    def park(self, until: threading.Event, tell: Callable[[], None]) -> None:
        """On the compute thread: tells, and waits; messages wait too, what is between them not."""
        tell()
        while not until.is_set():
            with suppress(Empty):
                self.beside.get(timeout=PARKED)()

    def _beside(self) -> None:
        with suppress(Empty):  # it was done while the thread was parked
            self.beside.get_nowait()()

    def answer(self, client: str, message: Message, digest: str) -> Answer:
        """The answer to a message; only on the compute thread."""
        table = self.tables.setdefault(client, StepTable())
        return table.once(message.key, digest, lambda: self._counted(client, message))

    def close(self) -> None:
        """Stops the compute thread."""
        self.thread.shutdown()

    def commit(self) -> None:
        """Forgets answers that both sides have on disk."""
        for table in self.tables.values():
            table.commit()

    def _counted(self, client: str, message: Message) -> Answer:
        if self.flops is None:
            return self._answer(client, message)
        with Meter() as meter:
            answer = self._answer(client, message)
        self.flops[client] = self.flops.get(client, 0) + meter.flops
        return answer

    def _answer(self, client: str, message: Message) -> Answer:
        home = self.tenants[client]
        check_finite(client, message)
        before = dict(home.slots.values), dict(home.slots.grads), dict(self.tenants.shared.values)
        counts = self.tenants.steps, home.stepped, home.seen
        try:
            return self._carried_out(home, message)
        except BaseException:
            # A message counts wholly or not at all: it may come again.
            home.slots.values, home.slots.grads, self.tenants.shared.values = before
            self.tenants.steps, home.stepped, home.seen = counts
            raise

    def _carried_out(self, home: Tenancy, message: Message) -> Answer:
        client = home.client
        if isinstance(message, Fetch):
            return self._fetch(home, message)
        if isinstance(message, Join):
            return self._join(home, message)
        if isinstance(message, Put):
            self.tenants.hand_in(client, message.slot, message.values)
            return Answer()
        self.tenants.settled(client)
        return self._at_work(home, message)

    def _at_work(
        self, home: Tenancy, message: Forward | Backward | Continue | Do | Submit | Leave
    ) -> Answer:
        if isinstance(message, Forward):
            return self._forward(home, message)
        if isinstance(message, Backward):
            return self._backward(home, message)
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
        adapters = {slot: dict(held) for slot, held in message.near.items()}
        for slot, where in message.far.items():
            far = self.tenants.take(home.client, [slot], where)[slot]
            refuse_odd(home.client, {f"slot/{slot}/{name}": far[name] for name in far})
            adapters[slot] = dict(sorted({**adapters.get(slot, {}), **far}.items()))
        home.reply = Parcel(adapters, dict(message.loose), message.facts)
        return Answer()

    def _leave(self, home: Tenancy) -> Answer:
        self.pending.drop(home.client)
        self.talks.drop(home.client)
        self.tenants.leave(home.client)
        return Answer()

    # ---- compute

    def _forward(self, home: Tenancy, m: Forward) -> Answer:
        check(self.backbone, home.seat, m)
        self.tenants.do(home.client, m.ops)
        home.seen = self.tenants.steps
        self.tenants.wear_shared(home)
        worn = {slot: home.slots[slot] for slot in slots_of(m.wear)}
        again = partial(self._graph, home.seat, replace(home.slots, values=worn, grads={}), m)
        if not m.keep:
            return Answer({m.until: again().out.detach()})
        shape = (home.seat.cut, m.until, tuple(m.hidden.shape), m.hidden.dtype, len(worn))
        graph, size = self.pending.measured(shape, again)
        pending = Pending(m.key.step, m.part, again, graph, size, self.pending.clock())
        self.pending.keep(home.client, m.key.call, pending)
        return Answer({m.until: graph.out.detach()})

    def _graph(self, seat: Seat, slots: Slots, m: Forward) -> Graph:
        """A forward over slots that no later step moves: called again, it gives the same bits."""
        given = iter(m.coefs)
        with torch.set_grad_enabled(m.keep):
            coefs = [
                next(given).detach().requires_grad_(m.keep)
                if isinstance(t.coef, float) and math.isnan(t.coef)
                else None
                for t in terms(m.wear)
            ]
            leaves = Leaves()
            hidden = m.hidden.detach().requires_grad_(m.keep)
            worn = dress(slots, m.wear, coefs, m.train, leaves)
            worn = dropping(worn, self.dropout, m.dropout)
            out = self._through(seat, m, worn, hidden)
        return Graph(out, hidden, [c for c in coefs if c is not None], leaves)

    def _count(self, home: Tenancy, part: tuple[int, int], rows: int) -> None:
        """Rows of a step's part: those of the largest forward that was differentiated in it."""
        if home.counted != part:
            home.counted, home.counted_rows = part, 0
        home.rows += max(0, rows - home.counted_rows)
        home.counted_rows = max(rows, home.counted_rows)

    def _through(self, seat: Seat, m: Forward, worn: Worn, hidden: Tensor) -> Tensor:
        depth = self.backbone.depth
        blanks = self.backbone.blanks(m.shapes, m.mask)
        last = depth - seat.cut.back if m.until == "hidden" else None
        out = self.backbone.run(blanks, worn, first=seat.cut.front, last=last, feed=hidden)
        return out if m.labels is None or m.until != "loss" else self.task.loss(out, m.labels)

    def _backward(self, home: Tenancy, m: Backward) -> Answer:
        pending = self.pending.of(home.client, m.key.call, m.key.step)
        graph = pending.whole()
        if (m.grad.shape, m.grad.dtype) != (graph.out.shape, graph.out.dtype):
            raise LinkError(
                f"The gradient has shape {list(m.grad.shape)} and {m.grad.dtype}, the result "
                f"{list(graph.out.shape)} and {graph.out.dtype}."
            )
        self.pending.done(home.client, m.key.call)
        self._count(home, (pending.step, pending.part), int(graph.hidden.shape[0]))
        hidden = [graph.hidden] if m.hidden else []
        leaves = [leaf for *_, leaf in graph.leaves.held]
        grads = iter(_grads(graph.out, [*hidden, *graph.coefs, *leaves], m.grad))
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


def _settle(done: Future[T], work: Callable[[], T]) -> None:
    try:
        done.set_result(work())
    except BaseException as problem:  # noqa: BLE001 it is for who waits for the result
        done.set_exception(problem)


def _grads(out: Tensor, of: list[Tensor], grad: Tensor) -> tuple[Tensor | None, ...]:
    found = torch.autograd.grad(out, of, grad, allow_unused=True) if of else ()
    return cast("tuple[Tensor | None, ...]", found)
