"""A bench for arithmetic by hand: real strategies, slots and desks, and bowls for losses.

A client's loss is half the squared distance from its model's few numbers to those it wants. So one
step of plain SGD with rate 0.5 goes half of the way: from 0 towards 8 the steps are 4, 6, 7.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from flexp.client.desk import Desk, Training
from flexp.client.memory import Memory
from flexp.client.session import Session
from flexp.data.examples import Batch, Examples, Shard
from flexp.dice import Dice
from flexp.engine.base import Arrival, Assignment, Failure, replies
from flexp.model.cut import Cut, Seat, uncut
from flexp.model.dress import Leaves, Train, spread
from flexp.model.ops import Optim, SlotSpec
from flexp.model.slots import Slots, moments
from flexp.parcel import Parcel
from flexp.rounds import waves_of
from flexp.selection import ALL, FAR, NONE, select
from flexp.strategies.base import Scene, Strategy, Turn
from flexp.tensors import Stacked, Tensors, Wear, mixed, slots_of, terms

FACTOR = "base_model.model.blocks.0.lora_A.weight"
FRONT = "base_model.model.blocks.0.lora_B.weight"
TRUNK = "base_model.model.blocks.1.lora_B.weight"
HEAD = "base_model.model.head.weight"
PROMPT = "prompt_behind"
BLOCKS = {PROMPT: -1, FACTOR: 0, FRONT: 0, TRUNK: 1, HEAD: 2}
DEPTH = 2
CUT, WHOLE = Seat(Cut(1)), uncut(DEPTH)  # cut, block 1 is far; the head never is

Row = tuple[int, ...]  # what one example wants, a number per block
A, B = (8, 16, 32), (16, 8, -16)
ROWS = {"a": [A], "b": [B, B, B]}  # so a weighs 1/4 and b 3/4


def numbers(**values: float) -> Tensors:
    """An adapter of 1 x 1 tensors: FRONT=1.0, TRUNK=2.0 and so on."""
    names = {"FACTOR": FACTOR, "FRONT": FRONT, "TRUNK": TRUNK, "HEAD": HEAD}
    return {names[k]: torch.full((1, 1), v) for k, v in values.items()}


ZERO = numbers(FRONT=0.0, TRUNK=0.0, HEAD=0.0)
PAIR: dict[str, Any] = {  # the front is the product of A = 1 and B = 1; a wants 9, b wants -7
    "start": numbers(FACTOR=1.0, FRONT=1.0),
    "rows": {"a": [(9,)], "b": [(-7,)] * 3},
    "optim": Optim("sgd", lr=0.125),
}
WIDE: dict[str, Any] = {  # pairs of rank 2 that wear 0; a wants 8 and has rank 1, b wants -16
    "seats": {"a": Seat(CUT.cut, rank=1), "b": Seat(CUT.cut)},
    "start": {FACTOR: torch.ones(2, 1), FRONT: torch.zeros(1, 2)},
    "rows": {"a": [(8,)], "b": [(-16,)] * 3},
    "optim": Optim("sgd", lr=0.125),
}


class Points(Batch):
    """Rows whose labels are several numbers, and no tokens."""

    @property
    def counted(self) -> int:
        return self.rows

    def parts(self, count: int) -> list[Batch]:
        return [Points(part.inputs, part.labels) for part in super().parts(count)]


class Wanted:
    """Stands in for a task: the labels of a row are the numbers it wants."""

    def collate(self, examples: Examples, indices: Sequence[int]) -> Batch:
        return Points({}, torch.tensor(examples.pick(indices).labels, dtype=torch.float32))

    def loss(self, point: Tensor, labels: Tensor) -> Tensor:
        """The mean over rows of half the squared distance of some numbers, the same for each."""
        point = point if point.dim() == 1 else point.mean(0)
        # Split into distance and width, so that no row's share of 1/3 rounds the gradient.
        middle = labels.mean(0)
        wide = (labels - middle).square().sum(1).mean()
        return ((point - middle).square().sum() + wide) / 2


@dataclass
class Bowl:
    """Stands in for ``PersonalModel``. One ``Slots`` holds both sides, so there is no far.

    The number of a block is its tensor, or the product of a LoRA pair; of a stack it is their sum.
    """

    near: Slots
    leaves: Leaves = field(default_factory=Leaves)
    train: Train = None
    rows: int = 0
    far: None = None
    prefix: None = None
    task: Wanted = field(default_factory=Wanted)

    @contextmanager
    def training(self, train: Train, dropout: Dice) -> Generator[None]:
        self.train = train
        yield
        self.train = None

    def point(self, wear: Wear) -> Tensor:
        """The model's numbers, from front to head."""
        views = {slot: self.view(slot) for slot in slots_of(wear)}
        found: dict[int, Tensor] = {}
        if isinstance(wear, Stacked):
            for term in wear.mix:
                for block, value in in_blocks(views[term.slot]).items():
                    part = value * term.coef
                    found[block] = found[block] + part if block in found else part
        else:
            mix = terms(wear)
            coefs = [spread(t.coef, DEPTH) if isinstance(t.coef, Tensor) else None for t in mix]
            found = in_blocks(mixed(mix, views, self.near.place, coefs))
        return torch.cat([found[block].flatten() for block in sorted(found)])

    def loss(self, batch: Batch, wear: Wear = "personal") -> Tensor:
        """The mean over rows of half the squared distance."""
        self.rows = batch.rows
        return self.task.loss(self.point(wear), batch.labels)

    def logits(self, batch: Batch, wear: Wear = "personal") -> Tensor:
        """The model's numbers, for every row."""
        self.rows = batch.rows
        return self.point(wear).expand(batch.rows, -1)

    def hidden(self, batch: Batch, wear: Wear) -> Tensor:
        """What a frozen model makes of each row: here the numbers that it wants."""
        return batch.labels[:, None]

    def view(self, slot: str) -> Tensors:
        """A slot's tensors; those that train are leaves."""
        where, place = ALL if self.train is None else self.train.get(slot, NONE), self.near.place
        moving = select(self.near[slot], where, place)
        leaves = {name: self.leaves.leaf(slot, name, held) for name, held in moving.items()}
        return {**self.near[slot], **leaves}


def in_blocks(held: Tensors) -> dict[int, Tensor]:
    """The number of each block: its tensor, or what is worn of a pair, B A / rank (alpha is 1)."""
    held = dict(held)
    if FACTOR in held:
        held[FRONT] = held[FRONT] @ held[FACTOR] / len(held.pop(FACTOR))
    return {BLOCKS[name]: value for name, value in held.items()}


@dataclass
class Bench:
    """Two clients under one method, round by round, in the order of ``run.py``."""

    strategy: Strategy[Any]
    seats: Mapping[str, Seat] | Seat = CUT
    steps: int = 1
    rows: Mapping[str, Sequence[Row]] = field(default_factory=lambda: dict(ROWS))
    start: Tensors = field(default_factory=lambda: dict(ZERO))
    optim: Optim = field(default_factory=lambda: Optim("sgd", lr=0.5))
    seed: int = 0
    order: list[str] = field(default_factory=list[str])  # of all turns so far
    replies: dict[str, Parcel] = field(default_factory=dict[str, Parcel])  # each client's newest
    kept: dict[str, dict[str, Tensors]] = field(default_factory=dict[str, dict[str, Tensors]])
    memories: dict[str, Memory] = field(default_factory=dict[str, Memory])
    shared: dict[str, Tensors] = field(default_factory=dict[str, Tensors])  # the one far copy
    done: int = 0
    rounds: int = 9
    failing: Collection[str] = ()
    batch: int = 8
    task: Wanted = field(default_factory=Wanted)

    def __post_init__(self) -> None:
        same = self.seats
        self.placed = dict.fromkeys(self.rows, same) if isinstance(same, Seat) else dict(same)
        self.training = Training(self.optim, batch=self.batch, steps=self.steps)
        self.specs = self.training.specs(self.strategy.specs())
        dice = Dice(self.seed)("strategy")
        scene = Scene(tuple(self.rows), self.placed, lambda spec, rank=None: self.begun(rank), dice)
        self.state: Any = self.strategy.start(scene)

    def seat_of(self, client: str) -> Seat:
        return self.placed[client]

    def round(self, *failing: str) -> None:
        """One round; the turns of those who fail come to nothing."""
        self.failing, dice = failing, Dice(self.seed)("waves", round=self.done)
        for _, arrivals, merged in waves_of(self.strategy, self, self.state, self.turn(), dice):
            self.replies |= replies(arrivals)
            self.state = merged
        self.done += 1

    def run(
        self, strategy: Strategy[Any], work: Iterable[Assignment], turn: Turn
    ) -> Iterator[Arrival]:
        """Each client's turn, as an engine gives them."""
        return (self.arrival(one.client, one.offer, self.failing) for one in work)

    def worn(self, client: str) -> tuple[float, ...]:
        """What the client would deploy now: front, trunk, head."""
        offer = self.strategy.offer(self.state, client, self.turn())
        desk = self.sit(client, offer)
        served = self.strategy.personal(desk, offer)
        assert served.adapter is not None
        return flat(desk.whole(served.adapter))

    def serves(self, client: str) -> tuple[float, ...]:
        """The numbers of the model that the client would deploy now."""
        offer = self.strategy.offer(self.state, client, self.turn())
        desk = self.sit(client, offer)
        wear = self.strategy.personal(desk, offer).adapter
        assert wear is not None
        return tuple(cast("Any", desk.model).point(wear).detach().tolist())

    def offered(self, client: str) -> Mapping[str, Tensors]:
        """What the client would be offered now, by slot."""
        return self.strategy.offer(self.state, client, self.turn()).adapters

    def both(self) -> tuple[float, ...]:
        """What all clients would deploy, which must be the same."""
        (worn,) = {self.worn(client) for client in self.rows}
        return worn

    def trained(self, client: str) -> tuple[float, ...]:
        """What the client replied last."""
        return flat(self.replies[client].adapters["personal"])

    def product(self, client: str) -> float:
        """B A of the client's last reply, with the A of the start where that has none."""
        replied = self.replies[client].adapters["personal"]
        return float(replied[FRONT] * replied.get(FACTOR, self.start[FACTOR]))

    # ---- inside

    def begun(self, rank: int | None) -> Tensors:
        """Where all begin: the first rows of A and columns of B, if that is less."""
        cuts = {FACTOR: (slice(rank),), FRONT: (slice(None), slice(rank))} if rank else {}
        return {k: v[cuts.get(k, ())] for k, v in self.start.items()}

    def turn(self) -> Turn:
        places = BLOCKS.__getitem__, DEPTH
        return Turn(
            self.done, self.rounds, 0, True, self.placed, {}, *places, tuple(sorted(self.rows))
        )

    def arrival(self, client: str, offer: Parcel, failing: Collection[str]) -> Arrival:
        """A client's turn, which fails, if it does, when all the work is done."""
        self.order.append(client)
        desk = self.sit(client, offer)
        reply = self.strategy.train(desk, Parcel(tensors=offer.tensors, facts=offer.facts))
        if client in failing:
            desk.memory.rollback()
            return Arrival(client, failure=Failure("as the test wants"))
        self.stand(desk)
        return Arrival(client, reply, rows=desk.rows)

    def sit(self, client: str, offer: Parcel) -> Desk:
        """Opens a desk: what lasts is kept, the rest begins anew, offers are put in."""
        seat = self.placed[client]
        slots = Slots(lambda name: seat.place(BLOCKS[name], DEPTH), DEPTH)
        slots.optims = {s: spec.optim for s, spec in self.specs.items() if spec.optim is not None}
        begun = dict.fromkeys(self.specs, self.begun(seat.rank)) | self.kept.get(client, {})
        for slot, tensors in begun.items():
            slots.put(slot, {**tensors, **offer.adapters.get(slot, {})})
        for slot in at_server(self.specs) & self.shared.keys():
            far = select(self.shared[slot], FAR, slots.place)
            slots.put(slot, {**slots.values.get(slot, {}), **far})
        central = self.strategy.kind == "centralised"
        wanted = [r for c in sorted(self.rows) if central or c == client for r in self.rows[c]]
        nothing = ((0,),) * len(wanted)
        mine = Examples(nothing, tuple(wanted), ("by hand",) * len(wanted))
        return Desk(
            client=client,
            seat=seat,
            model=cast("Any", Bowl(slots, task=self.task)),
            shard=Shard(mine, val=mine),
            task=cast("Any", self.task),
            memory=deepcopy(self.memories.get(client, Memory())),
            dice=Dice(self.seed)("turn", client=client, round=self.done),
            session=Session(cast("Any", None), cast("Any", None), "bench", self.done, 0),
            specs=self.specs,
            training=self.training,
        )

    def stand(self, desk: Desk) -> None:
        """Ends a turn: puts away what lasts, at the client and in the one copy for all."""
        slots = desk.model.near
        for slot in at_server(self.specs) & slots.values.keys():
            far = select(slots[slot], FAR, slots.place)
            self.shared[slot] = {**self.shared.get(slot, {}), **far}
        desk.memory.commit()
        slots.end_turn(self.specs)
        self.kept[desk.client], self.memories[desk.client] = slots.values, desk.memory


def at_server(specs: Mapping[str, SlotSpec]) -> set[str]:
    """The slots, with their moments, of which one far copy serves all."""
    shared = [slot for slot, spec in specs.items() if spec.home == "server"]
    return {name for slot in shared for name in (slot, *moments(slot))}


def flat(adapter: Mapping[str, Tensor]) -> tuple[float, ...]:
    """The numbers of an adapter, from front to head."""
    return tuple(float(adapter[k]) for k in sorted(adapter, key=lambda k: (BLOCKS[k], k)))


def after_two_rounds(strategy: Strategy[Any], start: Tensors = ZERO) -> tuple[float, ...]:
    """Where both are who want 8 and take a step a round, with half of the momentum kept in it."""
    wanted = (8,) * len({BLOCKS[name] for name in start})
    rows, optim = dict.fromkeys("ab", (wanted,)), Optim("sgd", lr=0.5, momentum=0.5)
    seats = WHOLE if strategy.kind == "centralised" else CUT
    bench = Bench(strategy, seats, rows=rows, optim=optim, start=dict(start))
    bench.round()
    bench.round()
    (found,) = {bench.serves(client) for client in rows}
    return found
