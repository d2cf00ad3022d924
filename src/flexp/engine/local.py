"""All clients and the server in this process; every tensor still crosses a metered link."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from flexp.client.desk import Desk, Training
from flexp.client.memory import Memory
from flexp.client.turn import ALONE, Client, hand_in
from flexp.data.examples import Examples, Shard
from flexp.data.tasks import Task
from flexp.dice import Dice
from flexp.engine.abreast import Abreast
from flexp.engine.base import Arrival, Assignment, Failure, Give, Measured, Own
from flexp.engine.flow import Flow
from flexp.engine.host import Host
from flexp.engine.look import Cells, Look
from flexp.link.apart import NoLink
from flexp.link.coded import coded
from flexp.link.local import LocalLink
from flexp.link.messages import Link
from flexp.link.metered import Ledger, MeteredLink
from flexp.link.wire import Wire
from flexp.model.adapter import Kind, alpha_of
from flexp.model.backbone import Backbone
from flexp.model.cut import Cut, Seat
from flexp.model.meter import Meter
from flexp.model.ops import SlotSpec
from flexp.model.prefix import Prefix
from flexp.parcel import Parcel
from flexp.privacy.egress import Profile
from flexp.server.bodies import Others
from flexp.strategies.base import ClientId, Served, Strategy, Turn
from flexp.tensors import size_of

PERSONAL = "personal"  # the slot that a client trains when it is alone


class LocalEngine(Host):
    """Clients in order of their ids; the trunk on a thread of its own."""

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
        pool: Examples | None = None,  # all rows, for a method that is not federated
        own: Mapping[ClientId, Own] | None = None,
        wires: Mapping[ClientId, Wire] | None = None,
        together: bool = False,
        others: Others | None = None,
        probe: Backbone | None = None,  # what every client has whole; None: each its own backbone
    ) -> None:
        more: Any = {"dice": dice, "together": together, "others": others}
        super().__init__(backbone, task, kind=kind, training=training, **more)
        self.shards, self.name, self.keep_crossings = shards, run, keep_crossings
        self.profile: Profile = profile
        self.own, self.pool, self.probe = own or dict[ClientId, Own](), pool, probe
        self.wires: Mapping[ClientId, Wire] = wires or {}
        self.tasks = {client: own.task for client, own in self.own.items()}
        self.wrap: Callable[[ClientId, Link], Link] = wrap
        self.memories = {c: Memory() for c in shards}
        self.prefixes = {c: Prefix(training.cache) for c in shards if training.cache}

    def backbone_of(self, client: ClientId) -> Backbone:
        """The backbone of a client's side: the server's, or one with its own head."""
        return self.own[client].backbone if client in self.own else self.backbone

    def run(
        self, strategy: Strategy[Any], work: Iterable[Assignment], turn: Turn
    ) -> Iterator[Arrival]:
        """Each client's turn, in order or abreast; who fails is an arrival with a failure."""
        work = list(work)
        turns = {each.client: partial(self._turn, strategy, each, turn) for each in work}
        if self._one_by_one(strategy) or len(turns) < 2:
            yield from (each() for each in turns.values())
            return
        with self._through((abreast := Abreast(self.trunk, torch.get_num_threads())).wrapped):
            whole = [w.client for w in work if w.seat.near_only(self.tenants.body(w.seat).depth)]
            yield from abreast.run(turns, whole)

    def _one_by_one(self, strategy: Strategy[Any]) -> bool:
        """In exact mode, while turns are measured, and where all train one far copy in turn."""
        shared = any(spec.home == "server" for spec in strategy.specs().values())
        return not self.trunk.together or self.measures or shared

    def flow(self, strategy: Strategy[Any], give: Give, flow: Flow) -> Iterator[Arrival]:
        """Turns side by side, without a barrier: who has arrived is given the next one at once."""

        def begin(client: ClientId) -> Callable[[], Arrival] | None:
            given = give(client)
            return None if given is None else partial(self._turn, strategy, *given)

        with self._through(flow.wrapped):
            yield from flow.run(begin)

    @contextmanager
    def _through(self, outer: Callable[[ClientId, Link], Link]) -> Generator[None]:
        """Within this, clients' links go through another one."""
        inside: Callable[[ClientId, Link], Link] = self.wrap
        self.wrap = lambda client, link: outer(client, inside(client, link))
        try:
            yield
        finally:
            self.wrap = inside

    def _turn(self, strategy: Strategy[Any], work: Assignment, turn: Turn) -> Arrival:
        started = time.monotonic()
        ledger = Ledger(crossings=[] if self.keep_crossings else None)
        try:
            desk, offer = self._open(strategy, work, turn, ledger)
            with self._measuring(desk) as found:
                hand_in(desk, strategy.train(desk, offer))
            self.tenants.commit(work.client)
        except Exception as problem:  # noqa: BLE001 whatever a client does, the round goes on
            return self._failed(work.client, problem, started, ledger)
        home = self.tenants[work.client]
        rows = desk.rows if desk.model.far is None else home.rows
        seconds, took = time.monotonic() - started, found[0] if found else None
        return Arrival(
            work.client, home.reply, rows=rows, seconds=seconds, ledger=ledger, measured=took
        )

    def alone(self, strategy: Strategy[Any], work: Assignment, turn: Turn) -> Arrival:
        """A turn without the server: the client trains its whole personal model by itself.

        Unless it was alone in the round before, it first takes along what is offered and what is
        far: all that crosses the link. ``work.seat`` is its ordinary seat.
        """
        started, ledger = time.monotonic(), Ledger(crossings=[] if self.keep_crossings else None)
        try:
            if self.memories[work.client].facts.get(ALONE) != turn.round - 1:
                self._go(strategy, work, turn, ledger)
            desk, _ = self._apart(strategy, work, turn)
            with self._measuring(desk) as found:
                reply = Parcel(facts=desk.fit(train=strategy.moving()))
                hand_in(desk, reply, alone=turn.round)
        except Exception as problem:  # noqa: BLE001 as in any turn
            return self._failed(work.client, problem, started, ledger)
        seconds, took = time.monotonic() - started, found[0] if found else None
        return Arrival(
            work.client, reply, rows=desk.rows, seconds=seconds, ledger=ledger, measured=took
        )

    def _go(self, strategy: Strategy[Any], work: Assignment, turn: Turn, ledger: Ledger) -> None:
        """Moves a client to a seat with the whole model, its personal slot as it is offered."""
        specs = self._solo(strategy)
        if work.client not in self.tenants.homes:  # a copy for all is taken along from its seat
            self.tenants.join(work.client, work.seat, specs, alpha=alpha_of(self.kind))
        mine = {s: v for s, v in work.offer.adapters.items() if s == PERSONAL}
        going = replace(work, seat=self._whole(work), offer=Parcel(mine))
        desk, _ = self._open(strategy, going, turn, ledger, specs)
        hand_in(desk, Parcel(), alone=turn.round - 1)
        self.tenants.commit(work.client)

    def _apart(self, strategy: Strategy[Any], work: Assignment, turn: Turn) -> tuple[Desk, Parcel]:
        """The desk of a client that is alone: it has what it took along."""
        work = replace(work, seat=self._whole(work))
        return self._sit(NoLink(work.client), strategy, work, turn, self._solo(strategy))

    def _whole(self, work: Assignment) -> Seat:
        whole = Cut(self.tenants.body(work.seat).depth)
        return Seat(whole, model=work.seat.model, rank=work.seat.rank)

    def _solo(self, strategy: Strategy[Any]) -> dict[str, SlotSpec]:
        """The slots of who is alone: the personal one lasts until it comes back."""
        specs = self.training.specs(strategy.specs())
        return {s: replace(v, lasts="run") if s == PERSONAL else v for s, v in specs.items()}

    def _failed(
        self, client: ClientId, problem: Exception, started: float, ledger: Ledger
    ) -> Arrival:
        self._undo(client)
        failure = Failure(f"{type(problem).__name__}: {problem}")
        return Arrival(client, failure=failure, seconds=time.monotonic() - started, ledger=ledger)

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
        found.append(Measured(meter.flops, self.trunk.flops.get(desk.client, 0), kept + meter.peak))

    def look(
        self, strategy: Strategy[Any], work: Sequence[Assignment], turn: Turn, look: Look
    ) -> dict[ClientId, Cells]:
        """Scores of what clients would deploy; nothing that happens there lasts."""
        found: dict[ClientId, Cells] = {}
        for each in work:
            with self.visit(strategy, each, turn, Ledger()) as (desk, offer):
                found[each.client] = look.at(desk, strategy.personal(desk, offer))
        return found

    def hand_over(
        self,
        strategy: Strategy[Any],
        work: Sequence[Assignment],
        turn: Turn,
        write: Callable[[Desk, Served], None],
    ) -> None:
        """What every client would deploy, written here."""
        for each in work:
            with self.visit(strategy, each, turn, Ledger()) as (desk, offer):
                write(desk, strategy.personal(desk, offer))

    @contextmanager
    def visit(
        self, strategy: Strategy[Any], work: Assignment, turn: Turn, ledger: Ledger
    ) -> Generator[tuple[Desk, Parcel]]:
        """A client's desk to look at, as after its last turn; nothing that happens there lasts."""
        apart = work.client in turn.alone and ALONE in self.memories[work.client].facts
        try:
            if apart:
                yield self._apart(strategy, work, turn)
            else:
                yield self._open(strategy, work, turn, ledger)
        finally:
            self._undo(work.client)

    def _open(
        self,
        strategy: Strategy[Any],
        work: Assignment,
        turn: Turn,
        ledger: Ledger,
        specs: Mapping[str, SlotSpec] | None = None,
    ) -> tuple[Desk, Parcel]:
        """Both sides of a turn: the tenancy at the server, and the client at its desk."""
        name, specs = work.client, specs or self.training.specs(strategy.specs())
        self.admit(work, specs)
        wire, inner = self.wires.get(name, "fp32"), LocalLink(name, self.trunk.handle)
        link = MeteredLink(coded(self.wrap(name, inner), wire), ledger, wire)
        return self._sit(link, strategy, work, turn, specs)

    def _sit(
        self,
        link: Link,
        strategy: Strategy[Any],
        work: Assignment,
        turn: Turn,
        specs: Mapping[str, SlotSpec],
    ) -> tuple[Desk, Parcel]:
        return self._client(work.client).open(
            link,
            work.seat,
            specs,
            leaves=strategy.leaving(),
            run=self.name,
            round=turn.round,
            wave=turn.wave,
            before=work.before,
        )

    def _client(self, name: ClientId) -> Client:
        own = self.own.get(name)
        return Client(
            name,
            self.backbone_of(name),
            task=self.task_of(name),
            objective=None if own is None else own.objective,
            shard=self.shards[name],
            pool=self.pool,
            memory=self.memories[name],
            dice=self.dice,
            kind=self.kind,
            training=self.training,
            initial=partial(self.begun_on, self.backbone_of(name)),
            profile=self.profile,
            prefix=self.prefixes.get(name),
            probe=self.probe or self.backbone_of(name),
        )

    def _undo(self, client: ClientId) -> None:
        """Takes both sides back to before the turn."""
        self.memories[client].rollback()
        self.tenants.rollback(client)
        self.trunk.pending.drop(client)
        self.trunk.talks.drop(client)
