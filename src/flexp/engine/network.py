"""Clients out on the network: the server's side here, everybody else where the data is.

A client works on one order at a time. It may lose its connection, come back with the same process
and go on, or come back as a new process and begin the order anew; only for whom the policy does not
wait any longer fails. The step table sees to it that no message counts twice.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from queue import SimpleQueue
from typing import Any, Literal

from msgspec import structs

from flexp.audit import printable
from flexp.client.desk import Desk, Training
from flexp.data.tasks import Task
from flexp.dice import Dice
from flexp.engine.base import Arrival, Assignment, Failure, Give
from flexp.engine.flow import Flow
from flexp.engine.guests import TICK, WAITS_FOR_ALL, Guests, Job, Policy, turn_name
from flexp.engine.host import Host
from flexp.engine.look import Cells, Look
from flexp.errors import FlexpError, LinkError, StepError
from flexp.link.control import Noted, Order, Outcome, Problem
from flexp.link.frame import Body
from flexp.link.listen import Call
from flexp.link.messages import Answer, Leave, Message
from flexp.link.metered import Ledger
from flexp.model.adapter import Kind
from flexp.model.backbone import Backbone
from flexp.model.ops import SlotSpec
from flexp.server.thread import Work
from flexp.strategies.base import ClientId, Served, Strategy, Turn


class NetworkEngine(Host):
    """Gives orders to clients that have called, and carries out what they send."""

    def __init__(
        self,
        backbone: Backbone,
        task: Task,
        *,
        kind: Kind,
        training: Training,
        dice: Dice,
        run: str,
        tasks: Mapping[ClientId, Task],
        together: bool = False,
        policy: Policy = WAITS_FOR_ALL,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(backbone, task, kind=kind, training=training, dice=dice, together=together)
        self.tasks, self.name, self.clock, self.pause = tasks, run, clock, pause
        self.guests = Guests(policy, clock)
        self.lasting = True  # whether a time in which nobody is there is waited for
        self.handed: set[ClientId] = set()
        self.orders: list[ClientId] | None = None  # whose messages were heard, without a barrier

    # ---- the round loop's side

    def run(
        self, strategy: Strategy[Any], work: Iterable[Assignment], turn: Turn
    ) -> Iterator[Arrival]:
        """Turns side by side, as they end; one after another where all train one far copy."""
        todo, specs = list(work), self.training.specs(strategy.specs())
        together = not any(spec.home == "server" for spec in specs.values())
        if todo:
            self._wait_for_anybody()
        for some in [todo] if together else [[each] for each in todo]:
            done: SimpleQueue[Job] = SimpleQueue()
            under_way = [self._begin("train", each, specs, turn, done) for each in some]
            for job in self.guests.ended(under_way, done):
                yield self._arrival(job)

    def flow(self, strategy: Strategy[Any], give: Give, flow: Flow) -> Iterator[Arrival]:
        """Turns side by side; the true order of messages is recorded in ``flow.order``."""
        if flow.recorded is not None:
            raise FlexpError(
                "An order is replayed by `flexp run --replay`, in one process; out on the network "
                "clients come as they come."
            )
        done: SimpleQueue[Job] = SimpleQueue()
        specs = self.training.specs(strategy.specs())
        under_way: list[Job] = []

        def begin(client: ClientId) -> None:
            given = give(client)
            if given is not None:
                work, turn = given
                under_way.append(self._begin("train", work, specs, turn, done, flows=True))

        self._wait_for_anybody()
        self.orders = flow.order
        try:
            for client in list(flow.lines):
                begin(client)
            while under_way:
                job = next(self.guests.ended(under_way, done))
                yield self._arrival(job)
                begin(job.work.client)
                under_way.remove(job)  # only now: who waits for it is let go if this fails
                if job.taken is not None:
                    job.taken.set()
        finally:
            self.orders = None
            for job in under_way:
                if job.taken is not None:
                    job.taken.set()

    def alone(self, strategy: Strategy[Any], work: Assignment, turn: Turn) -> Arrival:
        """Not over a network: who is alone there has no server to tell it."""
        raise FlexpError(f'Client "{work.client}" cannot be alone: the server runs its rounds.')

    def look(
        self, strategy: Strategy[Any], work: Sequence[Assignment], turn: Turn, look: Look
    ) -> dict[ClientId, Cells]:
        """Every client scores its own rows; who is not there has no score."""
        jobs = self._all("look", strategy, work, turn, split=look.split)
        return {job.work.client: job.cells for job in jobs if not job.error}

    def hand_over(
        self,
        strategy: Strategy[Any],
        work: Sequence[Assignment],
        turn: Turn,
        write: Callable[[Desk, Served], None],
    ) -> None:
        """Every client writes its whole adapter on its own disk; ``handed`` are those who did."""
        jobs = self._all("adapter", strategy, work, turn)
        self.handed |= {job.work.client for job in jobs if not job.error}

    def saved(self) -> None:
        """A checkpoint is on disk: clients need what they had at the one before it, no older."""
        super().saved()
        with self.guests.lock:
            for client, home in self.tenants.homes.items():
                guest = self.guests[client]
                guest.floors = (*guest.floors[1:], home.turns)

    def talk(self, strategy: Strategy[Any], work: Assignment, turn: Turn) -> None:
        """A client talks through the server, until it says that it has ended."""
        self._all("speak", strategy, [work], turn)

    def _all(
        self,
        kind: Literal["look", "adapter", "speak"],
        strategy: Strategy[Any],
        work: Sequence[Assignment],
        turn: Turn,
        **more: Any,
    ) -> list[Job]:
        """Orders after which nothing lasts at the server."""
        done: SimpleQueue[Job] = SimpleQueue()
        specs = self.training.specs(strategy.specs())
        jobs = [self._begin(kind, each, specs, turn, done, **more) for each in work]
        for job in self.guests.ended(jobs, done):
            self.trunk.between(partial(self._undo, job.work.client))
        return jobs

    def _wait_for_anybody(self) -> None:
        """Waits until somebody is there: nobody trains, and nothing is lost by it."""
        while self.lasting and not self.guests.anybody():
            self.pause(TICK)

    def _begin(
        self,
        kind: Literal["train", "look", "adapter", "speak"],
        work: Assignment,
        specs: Mapping[str, SlotSpec],
        turn: Turn,
        done: SimpleQueue[Job],
        *,
        flows: bool = False,
        **more: Any,
    ) -> Job:
        """Opens a client's tenancy and gives it an order, now or when it calls."""
        guest = self.guests[work.client]
        self.trunk.between(partial(self.admit, work, specs))
        guest.number += 1
        order = Order(
            guest.number,
            kind,
            work.seat,
            round=turn.round,
            wave=turn.wave,
            before=work.before,
            turns=self.tenants[work.client].turns,
            floor=guest.floors[0],
            rounds=turn.rounds,
            **more,
        )
        job = Job(work, specs, order, done, self.clock())
        job.taken = threading.Event() if flows else None
        self.guests.give(job)
        return job

    def _arrival(self, job: Job) -> Arrival:
        client, seconds = job.work.client, self.clock() - job.began
        if job.error:
            self.trunk.between(partial(self._undo, client))
            return Arrival(
                client, failure=Failure(job.error, job.away), seconds=seconds, ledger=job.ledger
            )
        home = self.tenants[client]
        rows = home.rows
        if job.order.seat.near_only(self.backbone.depth) and home.reply is not None:
            rows = self._claimed(client, home.reply.facts.get("rows"))
        return Arrival(client, home.reply, rows=rows, seconds=seconds, ledger=job.ledger)

    def _claimed(self, client: ClientId, rows: Any) -> int:
        """Rows that the server did not see: as the client says, but no more than there can be."""
        train = self.training
        known = self.guests[client].rows
        most = known * (train.epochs or 1) if train.steps is None else train.steps * train.batch
        return max(0, min(rows, most)) if type(rows) is int else 0

    def _undo(self, client: ClientId) -> None:
        self.trunk.pending.drop(client)
        self.trunk.talks.drop(client)
        self.tenants.rollback(client)

    # ---- the calls' side

    def ready(self, call: Call, rows: int) -> None:
        """A new process is ready: an order that the old one had begun begins anew."""
        guest = self.guests[call.name]
        job, guest.rows = guest.job, rows
        if job is not None and not job.over:
            self.trunk.between(partial(self._begin_anew, job))
        self.guests.seated(call)

    def _begin_anew(self, job: Job) -> None:
        """On the compute thread: takes the tenancy back to before the turn, and opens it again."""
        with self.guests.lock:
            if job.over:
                return
            self._undo(job.work.client)
            self.admit(job.work, job.specs)
            guest = self.guests[job.work.client]
            guest.number += 1
            job.order = structs.replace(job.order, number=guest.number)
            job.ledger = Ledger()

    def message(self, call: Call, message: Message, digest: str) -> Body:
        """Carries out a message of a step, once, and gives its answer, or says what was wrong."""
        try:
            work = self._carry_out(call, message, digest)
            return self.trunk.carry_out(call.name, message, work)
        except FlexpError:
            raise
        except Exception as problem:  # noqa: BLE001 no message, however odd, ends a run
            text = f"It cannot be carried out ({type(problem).__name__}: {str(problem)[:200]})."
            return Problem("LinkError", text)

    def _carry_out(self, call: Call, message: Message, digest: str) -> Work:
        """On the compute thread."""
        guest = self.guests[call.name]
        job = guest.job
        if guest.call is not call:
            raise LinkError(f'Another process has joined as "{call.name}"; this one is not heard.')
        if message.key == guest.left:
            return Answer()
        if job is None or message.key.run != turn_name(self.name, job.order.number):
            raise StepError(
                f"This turn of round {message.key.round + 1} is over at the server: {guest.ended}."
            )
        table = self.trunk.tables.get(call.name)
        known = table is not None and message.key in table.rows
        answer = yield from self.trunk.answer(call.name, message, digest)
        if not known:
            job.ledger.up(message, call.wire)
            job.ledger.down(message, answer, call.wire)
            if self.orders is not None:
                self.orders.append(call.name)
        if isinstance(message, Leave) and job.order.kind == "train":
            self.tenants.commit(call.name)
            guest.left = message.key
            if job.taken is None:
                self.guests.end(job)
            else:  # what comes next for this client is decided before anybody's next message
                self.trunk.park(job.taken, partial(self.guests.end, job))
        return answer

    def outcome(self, call: Call, outcome: Outcome) -> Body:
        """An order has ended otherwise than by leaving: with scores, or with an error."""
        with self.guests.lock:
            job = self.guests[call.name].job
            if job is not None and job.order.number == outcome.order and call.alive:
                job.cells = outcome.cells
                lacks = "it ended without a reply" if job.order.kind == "train" else ""
                self.guests.end(job, printable(outcome.error, 80) or lacks)
        return Noted()
