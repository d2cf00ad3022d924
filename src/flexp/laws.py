"""The laws of methods, for the tests of a method of any package: ``check(MyMethod())``.

Three clients train a tiny random model for three rounds, several times over, by the engine of every
run. What should make no difference must make none, bit for bit. Nothing is read or downloaded.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast, get_args

import torch
from torch import Tensor

from flexp import libraries, threads
from flexp.checkpoint import decode_state, encode_state
from flexp.client.desk import Training
from flexp.client.memory import Memory
from flexp.data.examples import Examples, Shard
from flexp.data.tasks import Classification
from flexp.dice import Dice
from flexp.engine.base import Arrival, Assignment, assigned
from flexp.engine.local import LocalEngine
from flexp.errors import CheckpointError, ParcelError, StrategyError
from flexp.evaluate import pooled
from flexp.link.metered import Ledger
from flexp.model.adapter import Kind, Lora
from flexp.model.backbone import Backbone
from flexp.model.cut import Cut, Seat, uncut
from flexp.model.ops import Optim
from flexp.model.weights import fill
from flexp.parcel import Parcel, decode, encode
from flexp.rounds import waves_of
from flexp.strategies import about
from flexp.strategies.base import ClientId, MethodKind, Scene, Setting, Strategy, Turn

LAWS = {
    "a method says what it is": "",
    "a turn ends with a reply": "",
    "what leaves a client is declared": "",
    "what is kept and sent is data": "Keep things in the state, in slots and in desk.memory alone.",
    "the same run ends the same": "Draw from the dice alone; keep nothing on the method itself.",
    "the order of clients does not matter": "Sort clients where one comes first, as in `waves`.",
    "the cut is invisible": "Select parts with Where; ask for no seat and for no block.",
    "only `own` differs between clients": "Change `own`, or what everybody is offered.",
}
DESCRIBED, TURNS, DECLARED, DATA, REPEATED, ORDER, CUT, OWN = LAWS

DEPTH, WORDS, LABELS = 3, 50, ("x", "y", "z")
CLIENTS: tuple[ClientId, ...] = ("anna", "ben", "carl")
SERVER, LOGITS = "the server", "predictions"
End = dict[tuple[str, str], Tensor]  # what a run leaves behind, by whose it is and what
ROUNDS = (CLIENTS, ("anna", "carl"), CLIENTS)  # who takes part
KIND = Lora(rank=2, alpha=4.0)
TRAINING = Training(Optim(lr=5e-2), batch=4, steps=2, clip_norm=1.0)
TASK = Classification(LABELS, cast("Any", SimpleNamespace(pad_token_id=0, eos_token_id=None)))
WHOLE, EQUAL = (uncut(DEPTH),) * 3, (Seat(Cut(1, 1)),) * 3
MIXED = (Seat(Cut(1, 1)), Seat(Cut(2, 0)), uncut(DEPTH))
HEADS_FAR = (Seat(Cut(1), "logits"), Seat(Cut(2), "loss"), Seat(Cut(1), "logits"))


@dataclass(frozen=True)
class Ground:
    """What methods are checked with: how clients train, and the kind of adapter."""

    training: Training = TRAINING
    kind: Kind = KIND


GROUND = Ground()


def check(
    strategy: Strategy[Any], *, alone: Strategy[Any] | None = None, ground: Ground = GROUND
) -> None:
    """Raises StrategyError that names the first law which a method breaks.

    ``alone`` is for methods whose near and far parts learn apart on purpose, so that the cut
    matters: the method with options by which it does not for a client that is alone. ``ground`` is
    for those that refuse AdamW or LoRA.
    """
    _describes_itself(strategy)
    first, *others = _allowed(strategy, ground)
    play = functools.partial(_play, ground=ground)
    try:
        end = play(strategy, first)
        _equal(strategy, REPEATED, end, play(strategy, first))
        _equal(strategy, ORDER, end, play(strategy, first, backwards=True))
        _equal(strategy, DATA, end, play(strategy, first, at_rest=True))
    except (CheckpointError, ParcelError) as problem:
        raise _broken(strategy, DATA, str(problem)) from problem
    ends = [play(strategy, seats) for seats in others]
    if alone is not None:
        end, *ends = [play(alone, [seat]) for seats in (first, *others) for seat in seats]
    for other in ends:
        _equal(strategy, CUT, end, other)
    for seats in (EQUAL, HEADS_FAR[:1] * 3, WHOLE):
        if not _refusal(strategy, seats, ground):
            _own(strategy, seats, play(strategy, seats))


def alike(one: Strategy[Any], other: Strategy[Any], *, ground: Ground = GROUND) -> bool:
    """Whether two methods leave every client the same model, bit for bit, whole and cut."""
    places = [seats for seats in _allowed(one, ground) if not _refusal(other, seats, ground)]
    play = functools.partial(_play, ground=ground)
    ends = [(play(one, seats), play(other, seats)) for seats in places]
    return bool(ends) and not any(_difference(*pair) for pair in ends)


# ---- laws


def _broken(strategy: Strategy[Any], law: str, what: str) -> StrategyError:
    return StrategyError(f'"{strategy.name}" breaks the law "{law}": {what} {LAWS[law]}'.rstrip())


def _describes_itself(strategy: Strategy[Any]) -> None:
    kind: Any = type(strategy)
    frozen = getattr(getattr(kind, "__dataclass_params__", None), "frozen", False)
    told = {
        "it is no frozen dataclass.": frozen,
        f"its kind is none of {get_args(MethodKind)}.": strategy.kind in get_args(MethodKind),
        "its class's docstring begins with no sentence.": about(kind).endswith("."),
        "one of its leaves does not say why.": all(leave.why for leave in strategy.leaves),
    }
    for what, good in told.items():
        if not good:
            raise _broken(strategy, DESCRIBED, what)


def _allowed(strategy: Strategy[Any], ground: Ground) -> list[tuple[Seat, ...]]:
    places = MIXED, HEADS_FAR, WHOLE
    if out := [seats for seats in places if not _refusal(strategy, seats, ground)]:
        return out
    why = _refusal(strategy, WHOLE, ground)
    raise StrategyError(f'"{strategy.name}" cannot be checked on a small classifier: {why}')


def _refusal(strategy: Strategy[Any], seats: Sequence[Seat], ground: Ground) -> str:
    cut = any(not seat.near_only(DEPTH) for seat in seats)
    if cut and (strategy.kind == "centralised" or strategy.split != "yes"):
        return strategy.split
    placed = dict(zip(CLIENTS, seats, strict=True))
    setting = Setting("classification", ground.kind, placed, DEPTH, head=True)
    return strategy.refuses(replace(setting, training=ground.training))


def _equal(strategy: Strategy[Any], law: str, one: End, other: End) -> None:
    if found := _difference(one, other, server=law != CUT):
        raise _broken(strategy, law, found)


def _difference(one: End, other: End, *, server: bool = False) -> str:
    """What two ends do not share, or nothing."""
    for (who, what), value in one.items():
        counts = (who, what) in other and (server or who != SERVER)
        if counts and not torch.equal(value, other[who, what]):
            return f"{who} ends with other {what}."
    return ""


def _own(strategy: Strategy[Any], seats: Sequence[Seat], end: End) -> None:
    for k in [k for who, k in end if who == CLIENTS[0] and k != LOGITS]:
        mine = strategy.owns().holds(k, _body().place(k, seats[0]))
        one, two, three = (end[client, k] for client in CLIENTS)
        if {torch.equal(one, two), torch.equal(two, three)} != {not mine}:
            what = "own, but clients have the same" if mine else "not own, but clients differ"
            raise _broken(strategy, OWN, f"{k} is {what}.")


# ---- a tiny run


@threads.one()
def _play(
    strategy: Strategy[Any],
    seats: Sequence[Seat],
    *,
    ground: Ground,
    backwards: bool = False,
    at_rest: bool = False,
) -> End:
    """A run of as many clients as seats; ``at_rest`` saves and loads everything between rounds."""
    body, placed = _body(), dict(zip(CLIENTS, seats, strict=False))
    engine, dice = _engine(strategy, list(placed), ground), Dice(0)
    begin = Turn(0, len(ROUNDS), 0, True, placed, {}, body.block_of, body.depth)
    try:
        scene = Scene(tuple(placed), placed, engine.initial, dice("strategy"), body.sizes)
        state = strategy.start(scene)
        for r, everybody in enumerate(ROUNDS):
            chosen = tuple(c for c in everybody if c in placed)[:: -1 if backwards else 1]
            turn, order = replace(begin, round=r, chosen=chosen), dice("waves", round=r)
            for *_, merged in waves_of(strategy, _Crossing(engine), state, turn, order):
                state = merged
            if at_rest:
                strategy, state = _woken(strategy, state, engine)
        return _end(strategy, state, engine, replace(begin, round=len(ROUNDS)))
    finally:
        engine.close()


def _end(strategy: Strategy[Any], state: Any, engine: LocalEngine, turn: Turn) -> End:
    out: End = {}
    for client in turn.seats:
        work = assigned(strategy, engine, state, client, turn)
        with engine.visit(strategy, work, turn, Ledger()) as (desk, offer):
            served, rows = strategy.personal(desk, offer), engine.shards[client].test
            if isinstance(served.adapter, str | tuple):
                out |= {(client, k): v for k, v in desk.whole(served.adapter).items()}
            with torch.no_grad():
                out[client, LOGITS] = served.predict(TASK.collate(rows, range(len(rows))))
    kept = bytearray(encode(encode_state(state)))
    return {**out, (SERVER, "state"): torch.frombuffer(kept, dtype=torch.uint8)}


@dataclass(frozen=True)
class _Crossing:
    """An engine whose offers and replies cross as bytes, and whose failures break a law."""

    inner: LocalEngine

    def seat_of(self, client: ClientId) -> Seat | None:
        return self.inner.seat_of(client)

    def run(
        self, strategy: Strategy[Any], work: Iterable[Assignment], turn: Turn
    ) -> Iterator[Arrival]:
        crossed = [replace(one, offer=_crossed(one.offer)) for one in work]
        for arrival in self.inner.run(strategy, crossed, turn):
            if arrival.reply is None:
                error = arrival.failure.error if arrival.failure else ""
                law = DECLARED if error.startswith("EgressError") else TURNS
                raise _broken(strategy, law, error)
            yield replace(arrival, reply=_crossed(arrival.reply))


def _crossed(parcel: Parcel) -> Parcel:
    """The parcel as it comes out of bytes."""
    return decode(encode(parcel))


def _woken(strategy: Strategy[Any], state: Any, engine: LocalEngine) -> tuple[Strategy[Any], Any]:
    """Method, state and memories as another process would have them from disk."""
    for client, memory in engine.memories.items():
        engine.memories[client] = Memory(_crossed(Parcel(memory.slots, facts=memory.facts)))
    fresh: Any = replace(cast("Any", strategy))
    return fresh, decode_state(decode(encode(encode_state(state))), fresh)


def _engine(strategy: Strategy[Any], clients: Sequence[ClientId], ground: Ground) -> LocalEngine:
    shards = {c: Shard(_rows(c, "train", 9), _rows(c, "val", 3), _rows(c, "test")) for c in clients}
    pool = pooled(shards, None, "train") if strategy.kind == "centralised" else None
    how: dict[str, Any] = {"kind": ground.kind, "training": ground.training}
    return LocalEngine(_body(), TASK, shards, dice=Dice(0), profile="open", pool=pool, **how)


@functools.cache
def _body() -> Backbone:
    transformers = libraries.transformers()
    config = transformers.BertConfig(
        vocab_size=WORDS, hidden_size=24, num_hidden_layers=DEPTH, id2label=dict(enumerate(LABELS))
    )
    model: Any = transformers.BertForSequenceClassification(config)
    fill(model, {name for name, _ in model.named_parameters()}, Dice(0)("model"))
    return Backbone(model, task="classification")


def _rows(client: ClientId, split: str, count: int = 5) -> Examples:
    """Rows of five to nine random words."""
    dice = [Dice(0)("row", client=client, split=split, n=n) for n in range(count)]
    ids = tuple(tuple(2 + w for w in d.shuffle(WORDS - 2)[: 5 + n % 5]) for n, d in enumerate(dice))
    labels = tuple(d("label").choose(len(LABELS), 1)[0] for d in dice)
    return Examples(ids, labels, tuple(d.path for d in dice))
