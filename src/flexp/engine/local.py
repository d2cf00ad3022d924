"""All clients and the server in this process; every tensor still crosses a metered link."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from flexp.client.desk import Desk, Training
from flexp.client.memory import Memory
from flexp.client.turn import Client, hand_in
from flexp.data.examples import Examples, Shard
from flexp.data.tasks import Task
from flexp.dice import Dice
from flexp.engine.base import Arrival, Assignment, Failure, Give, Measured
from flexp.engine.flow import Flow
from flexp.link.local import LocalLink
from flexp.link.messages import Link
from flexp.link.metered import Ledger, MeteredLink
from flexp.model.adapter import Kind, alpha_of, dropout_of
from flexp.model.backbone import Backbone
from flexp.model.meter import Meter
from flexp.model.ops import SlotSpec
from flexp.parcel import Parcel
from flexp.privacy.egress import Profile
from flexp.server.tenants import Tenants
from flexp.server.trunk import Trunk
from flexp.strategies.base import ClientId, Strategy, Turn
from flexp.tensors import Tensors


class LocalEngine:
    """Clients one after another, in order of their ids; the trunk on a thread of its own."""

    def __init__(
        self,
        backbone: Backbone,
        task: Task,
        shards: Mapping[ClientId, Shard],
        *,
        kind: Kind,
        training: Training,
        dice: Dice,
        profile: Profile = "u-shape",
        run: str = "run",
        wrap: Callable[[ClientId, Link], Link] = lambda client, link: link,
        keep_crossings: bool = False,
        pool: Examples | None = None,
    ) -> None:
        self.backbone, self.task, self.shards = backbone, task, shards
        self.kind, self.training, self.dice = kind, training, dice
        self.profile: Profile = profile
        self.pool = pool  # everybody's training rows, for a method that is not federated
        self.name, self.keep_crossings = run, keep_crossings
        self.wrap: Callable[[ClientId, Link], Link] = wrap
        self.measures = False  # whether turns are measured, which takes a little time
        self.memories: dict[ClientId, Memory] = {c: Memory() for c in shards}
        self.begun: dict[tuple[Kind, int | None, float | None], Tensors] = {}
        self.tenants = Tenants(backbone, self.initial)
        self.trunk = Trunk(backbone, self.tenants, task, dropout=dropout_of(kind))

    def close(self) -> None:
        """Stops the trunk's thread."""
        self.trunk.close()

    def initial(self, spec: SlotSpec, rank: int | None = None) -> Tensors:
        """The adapter that a slot begins with, the same on both sides."""
        kind, rows = spec.kind or self.kind, spec.head_rows
        if (kind, rank, rows) not in self.begun:
            begun = self.backbone.initial(kind, self.dice("initial"), rank)
            self.begun[kind, rank, rows] = (
                begun if rows is None else self.backbone.scaled(begun, rows)
            )
        return self.begun[kind, rank, rows]

    def run(
        self, strategy: Strategy[Any], work: Iterable[Assignment], turn: Turn
    ) -> Iterator[Arrival]:
        """Each client's turn; a client that fails is an arrival with a failure."""
        for assignment in work:
            yield self._turn(strategy, assignment, turn)

    def flow(self, strategy: Strategy[Any], give: Give, flow: Flow) -> Iterator[Arrival]:
        """Turns side by side, without a barrier: who has arrived is given the next one at once."""

        def begin(client: ClientId) -> Callable[[], Arrival] | None:
            given = give(client)
            return None if given is None else partial(self._turn, strategy, *given)

        inside: Callable[[ClientId, Link], Link] = self.wrap
        self.wrap = lambda client, link: flow.wrapped(client, inside(client, link))
        try:
            yield from flow.run(begin)
        finally:
            self.wrap = inside

    def _turn(self, strategy: Strategy[Any], work: Assignment, turn: Turn) -> Arrival:
        started = time.monotonic()
        ledger = Ledger(crossings=[] if self.keep_crossings else None)
        try:
            desk, offer = self._open(strategy, work, turn, ledger)
            with self._measuring(desk) as found:
                hand_in(desk, strategy.train(desk, offer))
        except Exception as problem:  # noqa: BLE001 whatever a client does, the round goes on
            self._undo(work.client)
            failure = Failure(f"{type(problem).__name__}: {problem}")
            seconds = time.monotonic() - started
            return Arrival(work.client, failure=failure, seconds=seconds, ledger=ledger)
        home = self.tenants[work.client]
        rows = desk.rows if desk.model.far is None else home.rows
        seconds = time.monotonic() - started
        return Arrival(
            work.client,
            home.reply,
            rows=rows,
            seconds=seconds,
            ledger=ledger,
            measured=found[0] if found else None,
        )

    @contextmanager
    def _measuring(self, desk: Desk) -> Generator[list[Measured]]:
        """Measures what happens within on both sides; the list has it at the end."""
        found: list[Measured] = []
        if not self.measures:
            yield found
            return
        self.trunk.flops = self.trunk.flops or {}
        self.trunk.flops.pop(desk.client, None)
        kept = size_of(desk.model.near.values.values())
        with Meter() as meter:
            yield found
        far = self.trunk.flops.get(desk.client, 0)
        found.append(Measured(meter.flops, far, kept + meter.peak))

    @contextmanager
    def visit(
        self, strategy: Strategy[Any], work: Assignment, turn: Turn, ledger: Ledger
    ) -> Generator[tuple[Desk, Parcel]]:
        """A client's desk to look at, as after its last turn; nothing that happens there lasts."""
        try:
            yield self._open(strategy, work, turn, ledger)
        finally:
            self._undo(work.client)

    def _open(
        self, strategy: Strategy[Any], work: Assignment, turn: Turn, ledger: Ledger
    ) -> tuple[Desk, Parcel]:
        """Both sides of a turn: the tenancy at the server, and the client at its desk."""
        name, specs = work.client, self.training.specs(strategy.specs())
        self.trunk.tables.pop(name, None)
        self.tenants.join(name, work.seat, specs, offer=work.offer, alpha=alpha_of(self.kind))
        link = MeteredLink(self.wrap(name, LocalLink(name, self.trunk.handle)), ledger)
        return self._client(name).open(
            link,
            work.seat,
            specs,
            leaves=strategy.leaves,
            run=self.name,
            round=turn.round,
            wave=turn.wave,
            before=work.before,
        )

    def _client(self, name: ClientId) -> Client:
        return Client(
            name,
            self.backbone,
            task=self.task,
            shard=self.shards[name],
            pool=self.pool,
            memory=self.memories[name],
            dice=self.dice,
            kind=self.kind,
            training=self.training,
            initial=self.initial,
            profile=self.profile,
        )

    def _undo(self, client: ClientId) -> None:
        """Takes both sides back to before the turn."""
        self.memories[client].rollback()
        self.tenants.rollback(client)


def size_of(slots: Iterable[Tensors]) -> int:
    """Bytes of all tensors of some slots."""
    return sum(v.numel() * v.element_size() for held in slots for v in held.values())
