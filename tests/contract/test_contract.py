"""What every method must do, one table of all of them: a new file in `strategies` is a new row."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, get_args

import peft
import pytest
import torch
import toys
from contract.strategies_for_tests import Basis
from torch import Tensor
from toys import same, shard, toy_task, whole

from flexp import export
from flexp.checkpoint import decode_state, encode_state
from flexp.client.desk import Desk, Training
from flexp.client.memory import Memory
from flexp.dice import Dice
from flexp.engine.base import Arrival, Assignment
from flexp.engine.local import LocalEngine
from flexp.errors import LinkError
from flexp.evaluate import pooled
from flexp.link.messages import Answer, Link, Message
from flexp.link.metered import Ledger
from flexp.model.adapter import Dense, Kind, Lora, Prompt
from flexp.model.backbone import Backbone
from flexp.model.colora import CoLora
from flexp.model.cut import Cut, Seat
from flexp.model.ops import Optim
from flexp.parcel import Parcel, decode, encode
from flexp.rounds import waves_of
from flexp.selection import ALL, FRONT, HEAD, NEAR, NONE, Where
from flexp.strategies import BUILT_IN, about
from flexp.strategies.base import MethodKind, Scene, Setting, Strategy, Turn
from flexp.strategies.ddome import Ddome
from flexp.strategies.dypfl import DyPfl
from flexp.strategies.fed_influence import FedInfluence
from flexp.strategies.fedala import FedAla
from flexp.strategies.fedavg import FedAvg
from flexp.strategies.fedmosaic import FROZEN, FedMosaic
from flexp.strategies.flexp import FlexP
from flexp.strategies.hsplitlora import HSplitLora
from flexp.strategies.pfedme import PFedMe
from flexp.strategies.pfedpg import PFedPg
from flexp.strategies.pfedpt import PFedPt
from flexp.strategies.splitfed_v2 import SplitFedV2
from flexp.strategies.splitfed_v3 import SplitFedV3
from flexp.strategies.splitlora import SplitLora
from flexp.strategies.zoopfl import ZooPfl
from flexp.tensors import Tensors, Term, Wear

KIND = Lora(rank=3, alpha=6.0)
MIXED = (Seat(Cut(1, 1)), Seat(Cut(2, 0)), whole(4))
TRAINING = Training(Optim(lr=5e-2), batch=4, steps=2, clip_norm=1.0)
OTHER = (Seat(Cut(2, 1)), Seat(Cut(1), "logits"), Seat(Cut(3), "loss"))
CUTS = (Seat(Cut(1, 1)), Seat(Cut(2, 0)), Seat(Cut(1, 0)))


@dataclass(frozen=True)
class Row:
    """One method, and what is special about it."""

    strategy: Strategy[Any]
    alone: Strategy[Any] | None = None  # near and far learn apart: invariant for a single client
    reaches: float = 0.95  # of the untrained model's loss, after a few steps
    fixed: Where = NONE  # what never trains
    kind: Kind = KIND
    training: Training = TRAINING
    rounding: float = 0.0  # between what it predicts and what its one adapter does
    seats: Sequence[Seat] = MIXED
    uncut: bool = True  # whether it runs where everything is near, and learns the same there
    worn: Wear | None = None  # what it serves, if that is not one PEFT adapter
    once: Collection[str] = ()  # what crosses in a first turn alone, and nothing comes back of it
    other: Sequence[Seat] = OTHER  # where it learns the same as at ``seats``
    queries: int = 1  # hidden states that cross for each of a batch
    asks: Set[str] = frozenset({"forward", "backward"})  # of a cut client in the first round


SPECIAL: dict[str, Any] = {
    # What is merged depends on what is far, which is the point of it: only one client alone,
    # with nothing to align to, has the same model at any cut.
    "flexp": {"alone": FlexP(align=0.0, head="free"), "reaches": 0.97, "fixed": NEAR & HEAD},
    "flexp_sft": {"alone": FlexP(align=0.0, head="free")},
    "flexp_sfl": {"alone": FlexP(align=0.0, head="free")},
    "splitfed_v2": {"alone": SplitFedV2()},
    "splitfed_v3": {"alone": SplitFedV3()},
    "splitlora": {"alone": SplitLora()},
    "fedbn": {"kind": Dense(("query", "LayerNorm"))},  # its personal part must train
    "fedala": {"strategy": FedAla(passes=2)},
    "scaffold": {"training": Training(Optim("sgd", lr=3.0), batch=4, steps=2)},  # no other
    # Three rounds are too few for the paper's lambda of 15 and eta of 0.005.
    "pfedme": {"strategy": PFedMe(lam=1.0, rate=0.5, inner=3), "reaches": 0.97},
    # Everybody personalises in every round, and each serves what its validation rows want.
    "dypfl": {"strategy": DyPfl(1.0, 3, 0.5, explore=1.0, decay=1.0), "reaches": 0.97},
    # Each base moves by its share alone, and one round of three is a warm start.
    "fedbasis": {"reaches": 0.97, "rounding": 1e-6},
    # Rows of one client are served by several experts, which is no one adapter.
    "ddome": {"strategy": Ddome(3, anchors=("c0",), hidden=8), "worn": "expert/0"},
    "fed_influence": {  # of single rows it would take long
        "strategy": FedInfluence(rows=4),
        "training": Training(Optim("sgd", lr=3.0), batch=4, steps=2),
    },
    # Two adapters are worn one after the other, and exported as one of twice the rank.
    "feddpa": {"rounding": 1e-6},
    "pfedlora": {"rounding": 1e-6},
    # One client's near pairs are factored anew at each average, its far ones are not.
    "hsplitlora": {"alone": HSplitLora(every=9)},
    # It serves no adapter, and the one that it has never moves.
    "pac_pfl": {"worn": "personal", "fixed": ALL, "once": {"forward"}},
    # What is near is frozen, head and all, so the cut says what learns.
    # A prompt beside an adapter is nothing that PEFT has.
    "pfedpg": {"strategy": PFedPg("sgd", 1.0), "kind": Prompt(3, at="behind"), "worn": "personal"},
    "pfedpt": {
        "strategy": PFedPt(form="behind", tokens=2),
        "worn": (Term("personal"), Term("prompt")),
    },
    "splitfrozen": {"seats": CUTS, "uncut": False, "reaches": 0.97, "fixed": NEAR},
    # Its heads train where the client is, so there is no V-shape. The first round is of the client.
    "zoopfl": {
        "strategy": ZooPfl(code=2, embedding=1, width=4, warm=0, order="alternate", rate=0.1),
        "other": (Seat(Cut(2, 1)), Seat(Cut(3, 0)), Seat(Cut(1, 2))),
        "queries": 4,
        "asks": frozenset[str](),
        "worn": (Term("personal"), Term("surgery")),
    },
    # Two adapters are worn by a gate, which no one adapter does.
    "fedmosaic": {
        "strategy": FedMosaic(every=1),
        "kind": CoLora(3, 6.0, groups=2),
        "worn": "personal",
        "fixed": FROZEN,
    },
    # Fronts are frozen, so again the cut says what learns.
    "pfsl": {"seats": CUTS, "uncut": False, "fixed": FRONT},
}


def row(method: Callable[[], Strategy[Any]], name: str) -> Row:
    special: dict[str, Any] = {"strategy": method(), **SPECIAL.get(name, {})}
    return Row(**special)


TABLE = {m.name: row(m, m.name) for m in (*BUILT_IN, Basis)}


def each(*but: str) -> pytest.MarkDecorator:
    """All methods but some; one process has all tests of a method, which share runs."""
    names = [name for name in TABLE if name not in but]
    marked = [pytest.param(n, marks=pytest.mark.xdist_group(f"method-{n}")) for n in names]
    return pytest.mark.parametrize("name", marked)


rows, learners, federated = each(), each("base"), each("base", "pooled")


ROUNDS = 3
BEGUN: dict[Any, Tensors] = {}  # where everybody begins, the same in every run


# ---- a run that can be looked into


@functools.cache
def body() -> Backbone:
    return toys.backbone()


@dataclass
class Run:
    """A few clients under one method, round by round."""

    strategy: Strategy[Any]
    seats: Sequence[Seat] = MIXED
    wrap: Any = lambda client, link: link
    offers: list[tuple[str, Parcel]] = field(default_factory=list[tuple[str, Parcel]])
    arrivals: list[Arrival] = field(default_factory=list[Arrival])

    def __post_init__(self) -> None:
        central = self.strategy.kind == "centralised"
        self.placed = {f"c{n}": whole(4) if central else seat for n, seat in enumerate(self.seats)}
        shards = {client: shard(n + 1, 9) for n, client in enumerate(self.placed)}
        self.engine = LocalEngine(
            body(),
            toy_task(body()),
            shards,
            pool=pooled(shards, None, "train") if central else None,
            kind=self.row.kind,
            training=self.row.training,
            dice=Dice(0),
            profile="open",
            wrap=self.wrapped,
            keep_crossings=True,
        )
        self.engine.begun = BEGUN
        dice, sizes = Dice(0)("strategy"), body().sizes
        scene = Scene(tuple(self.placed), self.placed, self.engine.initial, dice, sizes)
        self.state = self.strategy.start(scene)

    @property
    def row(self) -> Row:
        return TABLE[self.strategy.name]

    def wrapped(self, client: str, link: Link) -> Link:
        return self.wrap(client, link)

    def turn(self, r: int, chosen: Sequence[str] = ()) -> Turn:
        places = body().block_of, body().depth
        return Turn(r, ROUNDS, 0, True, self.placed, {}, *places, tuple(chosen))

    def round(self, r: int, chosen: Sequence[str] | None = None) -> list[Arrival]:
        out: list[Arrival] = []
        turn = self.turn(r, list(self.placed) if chosen is None else chosen)
        dice = Dice(0)("waves", round=r)
        for _, arrivals, merged in waves_of(self.strategy, self, self.state, turn, dice):
            self.state = merged
            out += arrivals
        self.arrivals += out
        return out

    def seat_of(self, client: str) -> Seat | None:
        return self.engine.seat_of(client)

    def run(
        self, strategy: Strategy[Any], work: Iterable[Assignment], turn: Turn
    ) -> Iterator[Arrival]:
        """The engine's, with offers remembered."""
        given = list(work)
        self.offers += [(one.client, one.offer) for one in given]
        return self.engine.run(strategy, given, turn)

    def finish(self, rounds: int = ROUNDS) -> End:
        """Looks at everybody's personal model and ends the run."""
        adapters, logits, losses = dict[str, Tensors](), dict[str, Tensor](), dict[str, float]()
        for client, seat in self.placed.items():
            turn = self.turn(rounds)
            work = Assignment(client, seat, self.strategy.offer(self.state, client, turn))
            with self.engine.visit(self.strategy, work, turn, Ledger()) as (desk, offer):
                served = self.strategy.personal(desk, offer)
                rows = self.engine.shards[client].train
                batch = desk.task.collate(rows, range(len(rows)))
                with torch.no_grad():
                    logits[client] = served.predict(batch)
                losses[client] = float(desk.task.loss(logits[client], batch.labels))
                worn = served.adapter if self.row.worn is None else self.row.worn
                assert self.row.worn is None or served.adapter is None
                if worn is not None:
                    adapters[client] = desk.whole(worn)
        self.engine.close()
        return End(adapters, logits, losses, encode(encode_state(self.state)), self)


@dataclass(frozen=True)
class End:
    """What a run leaves behind."""

    adapters: Mapping[str, Tensors]
    logits: Mapping[str, Tensor]
    losses: Mapping[str, float]
    state: bytes
    run: Run


def play(
    strategy: Strategy[Any], seats: Sequence[Seat] = (), order: Sequence[int] = (0, 1, 2)
) -> End:
    run = Run(strategy, seats or seats_of(strategy))
    names = list(run.placed)
    for r in range(ROUNDS):
        for arrival in run.round(r, [names[n] for n in order if n < len(names)]):
            assert arrival.failure is None, arrival.failure
    return run.finish()


def seats_of(strategy: Strategy[Any]) -> Sequence[Seat]:
    """Where the contract seats clients of a method."""
    return TABLE[strategy.name].seats if strategy.name in TABLE else MIXED


@functools.cache
def played(name: str, seats: Sequence[Seat] = ()) -> End:
    return play(TABLE[name].strategy, seats)


def alike(a: End, b: End) -> bool:
    return all(same(a.adapters[c], b.adapters[c]) for c in a.adapters) and all(
        torch.equal(a.logits[c], b.logits[c]) for c in a.logits
    )


# ---- the contract


def test_every_method_has_a_row() -> None:
    assert set(TABLE) == {m.name for m in BUILT_IN} | {"test-basis"}
    assert len(TABLE) == len(BUILT_IN) + 1


@rows
def test_trains_on_the_toy_task(name: str) -> None:
    base = played("base").losses
    found = played(name).losses
    if name != "base":
        assert sum(found.values()) < TABLE[name].reaches * sum(base.values())
        assert all(found[c] < base[c] for c in base)
    else:
        assert found == base


@rows
def test_does_not_depend_on_the_cut(name: str) -> None:
    strategy = TABLE[name].alone
    if not TABLE[name].uncut:
        loss, logits = (play(TABLE[name].strategy, [Seat(Cut(1), v)]) for v in ("loss", "logits"))
        assert alike(loss, logits)
        return
    if strategy is None:
        other = played(name, TABLE[name].other)
        assert alike(other, played(name))
        assert other.state == played(name).state
        return
    expected = play(strategy, [whole(4)])
    for seat in (*MIXED[:2], *TABLE[name].other):
        assert alike(play(strategy, [seat]), expected), seat


@rows
def test_is_deterministic_and_does_not_depend_on_the_order_of_clients(name: str) -> None:
    other = play(TABLE[name].strategy, order=(2, 0, 1))
    assert alike(other, played(name))
    assert other.state == played(name).state


@rows
def test_only_what_is_its_own_differs_between_clients(name: str) -> None:
    strategy, seat = TABLE[name].strategy, Seat(Cut(1, 1))
    one, two, three = play(strategy, [seat] * 3).adapters.values()
    kinds = [TABLE[name].kind, *(s.kind for s in strategy.specs().values() if s.kind is not None)]
    keys = [(0, kind, None, None, "drawn") for kind in kinds[::-1]]
    begun = {k: v for key in keys for k, v in BEGUN.get(key, {}).items()}
    for k in one:
        mine = strategy.owns().holds(k, body().place(k, seat))
        fixed = TABLE[name].fixed.holds(k, body().place(k, seat))
        if name != "base" and "lora_A" not in k and not fixed:
            assert not torch.equal(one[k], begun[k]), k  # it was trained
        equal = torch.equal(one[k], two[k]) or torch.equal(two[k], three[k])
        assert equal != mine, k


@rows
def test_its_row_in_the_listing_is_complete(name: str) -> None:
    strategy = TABLE[name].strategy
    assert strategy.kind in get_args(MethodKind)
    assert about(type(strategy)).endswith(".")
    assert strategy.paper
    for leave in strategy.leaves:
        assert leave.why, leave


@rows
def test_its_parcels_can_be_encoded(name: str) -> None:
    run = played(name).run
    parcels = [offer for _, offer in run.offers]
    parcels += [a.reply for a in run.arrivals if a.reply is not None]
    assert parcels or name == "base"
    for parcel in parcels:
        data = encode(parcel)
        back = decode(data)
        assert encode(back) == data
        assert back.adapters.keys() == parcel.adapters.keys()
        for slot, held in parcel.adapters.items():
            assert same(back.adapters[slot], held)


@rows
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own
def test_its_adapter_opens_with_peft(name: str, tmp_path: Path) -> None:
    end = played(name)
    if TABLE[name].worn is not None:
        return
    client, adapter = [*end.adapters.items()][1]  # who is cut; the others' are like it
    export.write(tmp_path, adapter, body(), TABLE[name].kind, export.Card("toy", "classification"))
    worn: Any = peft.PeftModel.from_pretrained(fresh(), str(tmp_path)).eval()
    data = end.run.engine.shards[client].train
    batch = toy_task(body()).collate(data, range(len(data)))
    with torch.no_grad():
        theirs, close = worn(**batch.inputs).logits, TABLE[name].rounding
    assert torch.allclose(theirs, end.logits[client], rtol=0.0, atol=close)


def fresh() -> Any:
    """The toy model as the library makes it, without our forwards."""
    made, config = toys._families(4)["bert-cls"]
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        return made(config).eval()


UNEQUAL = {"local", "pac_pfl", "pooled", "zoopfl", "flexlora", "fedppa", "flora", "hetlora"} | {
    "hsplitlora"
}


@rows
def test_unequal_ranks_are_for_methods_that_claim_them(name: str) -> None:
    strategy, row = TABLE[name].strategy, TABLE[name]
    seats = {f"c{n}": replace(seat, rank=n + 2) for n, seat in enumerate(row.seats)}
    setting = Setting("classification", row.kind, seats, 4, head=True, training=row.training)
    found = strategy.refuses(setting)
    assert ("all clients need one rank. Remove plan.ranks" in found) == (name not in UNEQUAL), found
    equal = replace(setting, seats={f"c{n}": seat for n, seat in enumerate(row.seats)})
    assert strategy.refuses(equal) == ""


# ---- what crosses


def declared(strategy: Strategy[Any], seat: Seat, crossed: str) -> bool:
    """Whether a name that went up is one of the cut's own or one of the method's ``leaves``."""
    kind, _, rest = crossed.partition("/")
    if kind == "slot":
        slot, _, path = rest.partition("/base_model.")
        slot, tensor = (slot, f"base_model.{path}") if path else rest.rsplit("/", 1)
        place = body().place(tensor, seat)
        return any(
            fnmatchcase(slot, leave.what) and leave.where.holds(tensor, place)
            for leave in strategy.leaving()
        )
    if kind == "tensor":
        return any(fnmatchcase(crossed, leave.what) for leave in strategy.leaving())
    return kind in ("hidden", "mask", "grad", "coef") or (
        kind == "labels" and seat.labels == "loss"
    )


@rows
@pytest.mark.parametrize("seats", [MIXED, OTHER], ids=["u-shape", "v-shape"])
def test_nothing_leaves_undeclared(name: str, seats: Sequence[Seat]) -> None:
    strategy = TABLE[name].strategy
    seats = TABLE[name].seats if seats == MIXED else TABLE[name].other
    end = played(name) if seats == TABLE[name].seats else played(name, tuple(seats))
    for arrival in end.run.arrivals:
        seat, crossings = end.run.placed[arrival.client], arrival.ledger.crossings
        assert crossings is not None
        for one in crossings:
            if one.way == "up":
                assert declared(strategy, seat, one.name), one
                floats = one.name not in ("mask", "labels")
                assert one.dtype == ("float32" if floats else "int64"), one
                if one.name == "hidden":  # never a row of ids
                    rows = 4 * TABLE[name].queries
                    assert one.shape in [(n, toys.LENGTH, toys.H) for n in (4, rows)] or (
                        one.shape[0] < 9
                    )
    trained = [a for a in end.run.arrivals if a.reply is not None]
    assert bool(trained) == (name != "base")
    if seats == MIXED:  # a client that hosts everything needs no server to train
        sent = {k for a in trained if a.client == "c2" for (_, k) in a.ledger.kinds}
        assert not sent & {"hidden", "mask", "grad", "labels"}


@rows
def test_offers_hold_nothing_of_anothers_memory(name: str) -> None:
    """Unless ``leaves`` declares it: near tensors in any client's memory are its own."""
    end, strategy = played(name), TABLE[name].strategy
    run = end.run
    for client in run.placed:
        offer = strategy.offer(run.state, client, run.turn(ROUNDS))
        offered = [v for held in offer.adapters.values() for v in held.values()]
        offered += list(offer.tensors.values())
        for other, memory in run.engine.memories.items():
            if other == client:
                continue
            for slot, held in memory.slots.items():
                for tensor, value in held.items():
                    if declared(strategy, run.placed[other], f"{slot}/{tensor}"):
                        continue
                    assert not any(torch.equal(value, v) for v in offered), (slot, tensor)
            for fact in memory.facts.values():
                assert not isinstance(fact, list) or str(fact) not in str(offer.facts)


# ---- what goes wrong


@dataclass
class Tearing:
    """A link that is torn at the first message of a phase, before or after it arrives."""

    inner: Link
    phase: str = ""
    late: bool = False
    seen: set[str] = field(default_factory=set[str])

    def send(self, message: Message) -> Answer:
        self.seen.add(message.key.phase)
        if message.key.phase == self.phase:
            if self.late:
                self.inner.send(message)
            raise LinkError("the cable was cut")
        return self.inner.send(message)

    def close(self) -> None:
        self.inner.close()


# The others' losses are long tests; here is one of each way to keep what counts.
OFTEN = ("fedavg", "flexp", "ditto", "splitfed_v2", "fedfomo", "pfedpg", "pfsl")


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        pytest.param(
            name,
            lost,
            id=f"{'cut' if lost == 'c0' else 'whole'}-{name}",
            marks=() if name in OFTEN[: 7 if lost == "c0" else 2] else pytest.mark.slow,
        )
        for name in TABLE
        if name not in ("base", "pooled")
        for lost in ("c0", "c2")
    ],
)
def test_survives_a_lost_client(name: str, lost: str) -> None:
    strategy, seats = TABLE[name].strategy, TABLE[name].seats
    without, run = Run(strategy, seats), Run(strategy, seats)
    rest, phases = [c for c in ("c0", "c1", "c2") if c != lost], set[str]()
    run.wrap = lambda c, link: Tearing(link, seen=phases) if c == lost else link
    run.round(0)
    before, expected = belongings(run, lost), {"join", "submit", "leave"}
    once = {*TABLE[name].once}
    asked = expected | (once or TABLE[name].asks)
    assert phases >= (expected if lost == "c2" else asked)
    offer = run.strategy.offer(run.state, lost, run.turn(1))
    work = [Assignment(lost, run.placed[lost], offer)]
    for phase in sorted(phases - once):
        for late in (False, True):
            run.wrap = lambda c, link, phase=phase, late=late: Tearing(link, phase, late)
            (arrival,) = run.engine.run(run.strategy, work, run.turn(1))
            assert arrival.reply is None
            assert arrival.failure is not None
            assert arrival.failure.error == "LinkError: the cable was cut"
            assert belongings(run, lost) == before, (phase, late)
    run.wrap = lambda c, link: Tearing(link, "submit") if c == lost else link
    assert sorted(a.client for a in run.round(1) if a.reply is not None) == rest
    run.wrap = Run.wrap
    without.round(0)
    without.round(1, rest)
    for one in (run, without):  # the others went on without it, and then it is back
        assert all(a.failure is None for a in one.round(2))
    ends = run.finish(), without.finish()
    assert alike(*ends)
    assert ends[0].state == ends[1].state


def belongings(run: Run, client: str) -> tuple[bytes, bytes]:
    """A client's memory and tenancy, as bytes."""
    memory = run.engine.memories[client]
    slots = run.engine.tenants[client].slots
    return (
        encode(Parcel(memory.slots, facts=memory.facts)),
        encode(Parcel(slots.values)),
    )


@pytest.mark.parametrize("late", [True, False], ids=["after", "before"])
def test_rows_are_counted_alike_whole_and_cut(late: bool) -> None:
    """A loss that is looked at, and never differentiated, is no training."""

    class Looks(FedAvg):
        def train(self, desk: Desk, offer: Parcel) -> Parcel:
            facts = desk.fit() if late else {}
            desk.model.loss(next(desk.batches(steps=1, size=3)))
            return desk.reply("personal", facts=facts or desk.fit())

    run = Run(Looks())
    assert {a.client: a.rows for a in run.round(0)} == {"c0": 8, "c1": 8, "c2": 8}
    run.engine.close()


@rows
def test_goes_on_from_what_was_saved(name: str, tmp_path: Path) -> None:
    strategy = TABLE[name].strategy
    first = Run(strategy, seats_of(strategy))
    first.round(0)
    first.round(1)
    second = Run(strategy, seats_of(strategy))
    second.state = decode_state(decode(encode(encode_state(first.state))), strategy)
    for client, memory in first.engine.memories.items():
        memory.save(tmp_path / client)
        second.engine.memories[client] = Memory.load(tmp_path / client)
        if client in first.engine.tenants.homes:
            slots = first.engine.tenants[client].slots
            second.engine.tenants.join(client, second.placed[client], {})
            kept = decode(encode(Parcel(slots.values))).adapters
            second.engine.tenants[client].slots.values = {s: dict(v) for s, v in kept.items()}
    shared = decode(encode(Parcel(first.engine.tenants.shared.values))).adapters
    second.engine.tenants.shared.values = {s: dict(v) for s, v in shared.items()}
    first.engine.close()
    second.round(2)
    end = second.finish()
    assert alike(end, played(name))
    assert end.state == played(name).state
