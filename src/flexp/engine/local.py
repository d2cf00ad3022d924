"""All clients and the server in this process; every tensor still crosses a metered link."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from flexp.client.desk import Desk
from flexp.client.memory import Memory
from flexp.client.session import Session
from flexp.data.shards import Shard
from flexp.data.tasks import Task
from flexp.dice import Dice
from flexp.engine.base import Arrival, Assignment, Failure
from flexp.link.local import LocalLink
from flexp.link.messages import Link
from flexp.link.metered import Ledger, MeteredLink
from flexp.model.adapter import Kind, Lora
from flexp.model.backbone import Backbone
from flexp.model.cut import Seat
from flexp.model.personal import PersonalModel
from flexp.model.slots import Optim, Slots, SlotSpec
from flexp.parcel import JSON, Parcel
from flexp.privacy.egress import Egress, Profile
from flexp.server.tenants import Tenants
from flexp.server.trunk import Trunk
from flexp.strategies.base import ClientId, Strategy, Turn
from flexp.tensors import NEAR, Tensors, select


@dataclass(frozen=True)
class Training:
    """How clients train unless a strategy says otherwise."""

    optim: Optim = field(default_factory=Optim)
    batch: int = 8
    steps: int | None = None
    epochs: int | None = None
    clip_norm: float | None = None


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
    ) -> None:
        self.backbone, self.task, self.shards = backbone, task, shards
        self.kind, self.training, self.dice = kind, training, dice
        self.profile: Profile = profile
        self.name, self.wrap, self.keep_crossings = run, wrap, keep_crossings
        self.memories: dict[ClientId, Memory] = {c: Memory() for c in shards}
        self.begun: dict[tuple[Kind, int | None], Tensors] = {}
        dropout = kind.dropout if isinstance(kind, Lora) else 0.0
        self.dropout = dropout
        self.tenants = Tenants(backbone, self.initial)
        self.trunk = Trunk(backbone, self.tenants, task, dropout=dropout)

    def close(self) -> None:
        """Stops the trunk's thread."""
        self.trunk.close()

    def initial(self, spec: SlotSpec, rank: int | None = None) -> Tensors:
        """The adapter that a slot begins with, the same on both sides."""
        key = (spec.kind or self.kind, rank)
        if key not in self.begun:
            self.begun[key] = self.backbone.initial(key[0], self.dice("initial"), rank)
        return self.begun[key]

    def run(
        self, strategy: Strategy[Any], work: Iterable[Assignment], turn: Turn
    ) -> Iterator[Arrival]:
        """Each client's turn; a client that fails is an arrival with a failure."""
        for assignment in work:
            yield self._turn(strategy, assignment, turn)

    def _turn(self, strategy: Strategy[Any], work: Assignment, turn: Turn) -> Arrival:
        started = time.monotonic()
        ledger = Ledger(crossings=[] if self.keep_crossings else None)
        memory = self.memories[work.client]
        try:
            with self._at_desk(strategy, work, turn, ledger) as (desk, offer):
                reply = strategy.train(desk, offer)
                desk.session.submit(reply)
                self._remember(desk)
                desk.session.leave()
                home = self.tenants[work.client]
                rows = desk.rows if desk.model.far is None else home.rows
                reply = home.reply
            memory.commit()
        except Exception as problem:  # whatever a client does, the round goes on without it
            memory.rollback()
            self.tenants.rollback(work.client)
            error = f"{type(problem).__name__}: {problem}"
            seconds = time.monotonic() - started
            return Arrival(work.client, failure=Failure(error), seconds=seconds, ledger=ledger)
        seconds = time.monotonic() - started
        return Arrival(work.client, reply, rows=rows, seconds=seconds, ledger=ledger)

    @contextmanager
    def visit(
        self, strategy: Strategy[Any], work: Assignment, turn: Turn, ledger: Ledger
    ) -> Iterator[tuple[Desk, Parcel]]:
        """A client's desk to look at, as after its last turn; nothing that happens there lasts."""
        try:
            with self._at_desk(strategy, work, turn, ledger) as (desk, offer):
                yield desk, offer
        finally:
            self.memories[work.client].rollback()
            self.tenants.rollback(work.client)

    @contextmanager
    def _at_desk(
        self, strategy: Strategy[Any], work: Assignment, turn: Turn, ledger: Ledger
    ) -> Iterator[tuple[Desk, Parcel]]:
        client, seat, specs = work.client, work.seat, self._specs(strategy)
        alpha = self.kind.alpha if isinstance(self.kind, Lora) else 1.0
        self.trunk.tables.pop(client, None)
        self.tenants.join(client, seat, specs, offer=work.offer, alpha=alpha)
        link = MeteredLink(self.wrap(client, LocalLink(client, self.trunk.handle)), ledger)
        place = self.tenants[client].slots.place
        egress = Egress(strategy.leaves, seat.labels, self.profile, place)
        session = Session(link, egress, self.name, turn.round, turn.wave)
        answer = session.join(seat, {s: spec.optim or Optim() for s, spec in specs.items()})
        desk = self._desk(client, seat, session, specs, turn)
        self._lay_out(desk, answer.facts["offered"], alpha)
        loose = {k.removeprefix("tensor/"): v for k, v in answer.tensors.items()}
        facts: Any = answer.facts["facts"]
        yield desk, Parcel(tensors=loose, facts=facts)

    def _specs(self, strategy: Strategy[Any]) -> dict[str, SlotSpec]:
        optim = self.training.optim
        return {
            slot: SlotSpec(s.kind, s.home, s.lasts, s.optim or optim, s.moments)
            for slot, s in strategy.slots.items()
        }

    def _desk(
        self,
        client: ClientId,
        seat: Seat,
        session: Session,
        specs: Mapping[str, SlotSpec],
        turn: Turn,
    ) -> Desk:
        whole = seat.near_only(self.backbone.depth)
        near = Slots(lambda name: self.backbone.place(name, seat), self.backbone.depth)
        near.optims = {s: spec.optim for s, spec in specs.items() if spec.optim is not None}
        names = list(self.initial(SlotSpec(), seat.rank))
        model = PersonalModel(
            self.backbone,
            seat,
            near,
            task=self.task,
            far=None if whole else session,
            layout=names,
            dropout=self.dropout,
        )
        return Desk(
            client=client,
            seat=seat,
            model=model,
            shard=self.shards[client],
            task=self.task,
            memory=self.memories[client],
            dice=self.dice("turn", client=client, round=turn.round, wave=turn.wave),
            session=session,
            specs=specs,
            batch=self.training.batch,
            epochs=self.training.epochs,
            steps=self.training.steps,
            clip_norm=self.training.clip_norm,
        )

    def _lay_out(self, desk: Desk, offered: JSON, alpha: float) -> None:
        """Puts what the client kept on the desk; offered near parts come on first use."""
        near, memory, seat = desk.model.near, desk.memory, desk.seat
        near.alpha = alpha
        for name in near.lasting(desk.specs):
            kept = memory.get(f"slot/{name}")
            if kept is not None:
                near.put(name, kept)
        for slot, count in memory.facts.items():
            if slot.startswith("steps/") and isinstance(count, int):
                near.steps[slot.removeprefix("steps/")] = count
        kept_values = dict(near.values)

        def missing(slot: str) -> Tensors | None:
            if slot not in desk.specs and slot not in names:
                return None
            base = kept_values.get(slot)
            if base is None and slot in desk.specs:
                base = select(self.initial(desk.specs[slot], seat.rank), NEAR, near.place)
            fetched = desk.session.fetch(slot) if slot in names else {}
            return dict(sorted({**(base or {}), **fetched}.items()))

        names = {s for s, held in offered.items() if held} if isinstance(offered, Mapping) else {}
        for slot in names:
            near.values.pop(slot, None)
        near.missing = missing

    def _remember(self, desk: Desk) -> None:
        near = desk.model.near
        for name in near.lasting(desk.specs):
            if name in near.values or name in desk.specs:
                desk.memory.put(f"slot/{name}", near[name])
        for slot, spec in desk.specs.items():
            if spec.moments == "keep" and slot in near.steps:
                desk.memory.facts[f"steps/{slot}"] = near.steps[slot]
