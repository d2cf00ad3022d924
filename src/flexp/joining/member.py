"""A device in a run: its share of the model, its rows, its memory, and the orders that it carries
out. The server never runs code here; an order is a few numbers, and the method is this program's.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from flexp import export
from flexp.client.desk import Desk
from flexp.client.store import StoredMemory
from flexp.client.turn import Client, hand_in
from flexp.data.examples import Examples, Shard
from flexp.data.federation import has_own, labels_of, make_task, own_task, places, shard_of
from flexp.data.objectives import objective_of
from flexp.data.shards import check
from flexp.data.sources import Row
from flexp.data.tasks import Loss, Task
from flexp.data.tokens import padding_of
from flexp.dice import Dice
from flexp.engine.guests import turn_name
from flexp.engine.host import beginning
from flexp.engine.look import Cells, Look
from flexp.joining.parts import Say, fetch_part
from flexp.link.control import Begin, Order, Outcome
from flexp.link.dial import GrpcLink
from flexp.link.metered import Ledger, MeteredLink
from flexp.model.backbone import Backbone
from flexp.model.cut import Seat
from flexp.model.files import Manifest
from flexp.model.hollow import part
from flexp.model.ops import SlotSpec
from flexp.model.prefix import Prefix
from flexp.model.reader import open_reader
from flexp.model.skeleton import skeleton
from flexp.own_tasks import classes_of
from flexp.parcel import Parcel
from flexp.recipe import Recipe
from flexp.seating import adapter_kind, dtype_of, quantize_of
from flexp.stage import training
from flexp.strategies.base import Strategy
from flexp.tensors import Tensors


@dataclass
class Member:
    """This device in one run."""

    name: str
    recipe: Recipe
    strategy: Strategy[Any]
    link: GrpcLink
    rows: Sequence[Row]
    _: KW_ONLY
    model: Path
    theirs: Manifest | None  # the server's tensors, if the model comes from there
    memory: StoredMemory
    folder: Path
    device: str
    say: Say
    ledger: Ledger = field(default_factory=Ledger)
    task: Task | None = None
    shard: Shard | None = None
    objective: Loss | None = None
    backbone: Backbone | None = None
    seat: Seat | None = None
    scores: Cells = field(default_factory=dict[str, dict[str, float]])
    begun: dict[Any, Tensors] = field(default_factory=dict[Any, Tensors])
    prefix: Prefix | None = None

    def counts(self) -> tuple[int, int, int]:
        """How many rows there are for training, validation and test."""
        if not self.rows:
            return 0, 0, 0
        every, data = list(range(len(self.rows))), self.recipe.data
        train, val, test = places(self.name, self.rows, every, data, Dice(self.recipe.seed))
        return len(train), len(val), len(test)

    def try_rows(self, space: tuple[str, ...]) -> None:
        """DataError if these rows cannot be learnt from: before the server counts on them.

        ``space`` is the kind of task and the labels that the rows themselves have.
        """
        shared = self.recipe.task
        labels = shared.labels or space[1:]
        if shared.kind != "causal-lm" and len(labels) < 2:  # others will come
            labels = (*labels, "one", "other")
        if self.rows:
            self._encoded(labels, note=lambda text: None)

    def begin(self, told: Begin) -> None:
        """Gets the task, the rows and the blocks of the seat ready."""
        asked = self.recipe.clients.get(self.name)
        task, shard = self._encoded(told.labels, note=self.say)
        if asked is not None and asked.objective is not None and self.rows:
            self.objective = objective_of(asked.objective, task, shard.train, self.name)
        self.task, self.shard = task, shard
        budget = training(self.recipe).cache
        self.prefix = Prefix(budget) if budget else None
        self._open(told.seat)

    def _encoded(self, labels: tuple[str, ...], *, note: Say) -> tuple[Task, Shard]:
        """The task, whose labels for all are these, and the rows as it has them."""
        recipe, asked = self.recipe, self.recipe.clients.get(self.name)
        shared = recipe.task.model_copy(update={"labels": labels})
        task = make_task(shared, recipe.data, open_reader(self.model, shared.kind), labels)
        if asked is not None and has_own(asked):
            task = own_task(asked, shared, recipe.data, task, self.rows)
        if not self.rows:
            return task, Shard(Examples())
        every, dice = list(range(len(self.rows))), Dice(recipe.seed)
        shard = shard_of(self.name, self.rows, every, recipe.data, dice=dice, task=task)
        for finding in check({self.name: shard}, task, one_class=recipe.data.one_class):
            note(f"note: {finding}")
        return task, shard

    def obey(self, order: Order) -> None:
        """Carries an order out; what goes wrong is told to the server, and nothing of it lasts."""
        started = time.monotonic()
        outcome = Outcome(order.number)
        try:
            desk, offer = self.sit(order)
            if order.kind == "train":
                reply = self.strategy.train(desk, offer)
                hand_in(desk, reply)
                self._tell(order, reply, time.monotonic() - started)
                return
            served = self.strategy.personal(desk, offer)
            if order.kind == "look":
                cells = Look(order.split).at(desk, served)
                outcome, self.scores = Outcome(order.number, cells=cells), cells
                shown = ", ".join(f"{k} {v:.4g}" for k, v in cells["own"].items())
                self.say(f"own {order.split} rows: {shown}")
            elif served.adapter is None:
                self.say("what this method serves is not one PEFT adapter: nothing was written")
            else:
                self._write(desk, desk.whole(served.adapter))
            self.link.ask(outcome)
        finally:
            self.memory.rollback()

    # ---- inside

    def _tell(self, order: Order, reply: Parcel, seconds: float) -> None:
        loss = reply.facts.get("loss")
        shown = f", loss {loss:.3f}" if isinstance(loss, float) else ""
        self.say(f"round {order.round + 1} of {order.rounds}{shown}, {seconds:.1f} s")

    def _open(self, seat: Seat) -> None:
        """Loads the blocks of a seat, unless they are in memory."""
        if seat == self.seat:
            return
        bones = skeleton(
            self.model,
            self._task().name,  # pyright: ignore[reportArgumentType]
            classes=classes_of(self._task()),
            blocks_at=self.recipe.model.blocks_at,
        )
        depth = bones.depth
        near = frozenset([*range(seat.cut.front), *range(depth - seat.cut.back, depth)])
        # A client without blocks still passes a forward by them, so one has to be there.
        near = near or frozenset([0])
        if self.backbone is not None and near <= self.backbone.held:
            self.seat = seat
            return
        if self.theirs is not None:
            absent = part(bones, near, outside=True).absent
            fetch_part(self.link, self.theirs, self.model, absent, self.say)
        recipe = self.recipe
        self.backbone, self.begun = None, {}  # before the next one, so that both are never there
        self.backbone = Backbone.open(
            self.model,
            task=self._task().name,  # pyright: ignore[reportArgumentType]
            classes=classes_of(self._task()),
            seed=recipe.seed,
            dtype=dtype_of(recipe),
            quantize=quantize_of(recipe),
            device=self.device,
            blocks_at=recipe.model.blocks_at,
            name=recipe.model.source,
            pad=padding_of(open_reader(self.model, recipe.task.kind)),
            fast=recipe.mode == "fast",
            blocks=near,
        )
        self.seat = seat

    def sit(self, order: Order) -> tuple[Desk, Parcel]:
        """The desk of an order, over the link, with what was kept after the turns that count."""
        self.memory.open(order.turns, order.floor)
        self._open(order.seat)
        recipe = self.recipe
        kind, learning = adapter_kind(recipe.adapter), training(recipe)
        client = Client(
            self.name,
            self._body(),
            task=self._task(),
            objective=self.objective,
            shard=self._shard(),
            memory=self.memory,
            dice=Dice(recipe.seed),
            kind=kind,
            training=learning,
            initial=self._initial,
            profile=recipe.privacy.profile,
            prefix=self.prefix,
        )
        return client.open(
            MeteredLink(self.link, self.ledger, self.link.wire),
            order.seat,
            learning.specs(self.strategy.specs()),
            leaves=self.strategy.leaving(),
            run=turn_name(recipe.hash()[:12], order.number),
            round=order.round,
            wave=order.wave,
            before=order.before,
            # Without a barrier the order of messages is recorded, and replayed part after part.
            window=recipe.link.window if self.strategy.barrier else 1,
            posts=True,
        )

    def _initial(self, spec: SlotSpec, rank: int | None = None) -> Tensors:
        kind, dice = adapter_kind(self.recipe.adapter), Dice(self.recipe.seed)
        key = (spec.kind or kind, rank, spec.head_rows, spec.head_form)
        if key not in self.begun:
            self.begun[key] = beginning(self._body(), spec, rank, kind=kind, dice=dice)
        return self.begun[key]

    def _write(self, desk: Desk, adapter: Tensors) -> None:
        recipe, out = self.recipe, self.folder / "adapter"
        whole = self.model if self.theirs is None else None  # what was fetched is a part
        model = recipe.model
        card = export.card_at(desk, model.source, model.revision, whole, seed=recipe.seed)
        export.write(out, adapter, self._body(), adapter_kind(recipe.adapter), card)
        self.say(f"the adapter is in {out}")

    def _task(self) -> Task:
        assert self.task is not None
        return self.task

    def _shard(self) -> Shard:
        assert self.shard is not None
        return self.shard

    def _body(self) -> Backbone:
        assert self.backbone is not None
        return self.backbone


def spaces_of(recipe: Recipe, name: str, rows: Sequence[Row]) -> tuple[str, ...]:
    """The kind of task of a client and the names of its labels, as its own rows have them."""
    asked = recipe.clients.get(name)
    told = recipe.task
    if not rows:
        return (told.kind,)
    if asked is not None and asked.task is not None:
        told = told.model_copy(update=asked.task.model_dump(exclude_none=True))
    data = recipe.data
    if asked is not None:
        columns = {k: getattr(asked, k) for k in ("text", "image", "label", "prompt")}
        data = data.model_copy(update={k: v for k, v in columns.items() if v is not None})
    return (told.kind, *labels_of(rows, told, data))
