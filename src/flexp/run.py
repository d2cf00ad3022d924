"""The round loop. A newcomer starts here.

Every strategy, engine and link goes through this one loop: offers go out, clients train where
their data lives, replies are merged, scores and checkpoints are written.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from flexp import checkpoint, export
from flexp.client.desk import Desk
from flexp.engine.base import Arrival, assigned, replies
from flexp.engine.flow import Flow
from flexp.engine.host import Host
from flexp.errors import FlexpError
from flexp.evaluate import Score, evaluate
from flexp.events import (
    Checkpointed,
    Interleaved,
    Merged,
    Noted,
    RoundStarted,
    RunEnded,
    RunStarted,
    Scored,
    SeatTaken,
    Stream,
    WentAlone,
)
from flexp.parcel import file_name
from flexp.recipe import Recipe
from flexp.rounds import flow_of, waves_of
from flexp.seating import adapter_kind
from flexp.stage import Stage
from flexp.strategies.base import ClientId, Scene, Served, Turn
from flexp.telling import moved, seat_facts, tell

# The order in which the server heard its clients, by the first round of a span.
Orders = Mapping[int, Sequence[ClientId]]


@dataclass(frozen=True)
class Result:
    """What a run leaves behind in memory; on its stage are all who have come by its end."""

    scores: tuple[Score, ...]
    state: Any
    turn: Turn
    stage: Stage[Any]


def run(
    stage: Stage[Host],
    stream: Stream,
    *,
    out: Path | None = None,
    resume: bool = False,
    replay: Orders | None = None,
    without: Sequence[ClientId] = (),
) -> Result:
    """Runs a recipe from its first round, or from its newest checkpoint, to its last.

    ``replay`` has the recorded order of a method without barrier, by the first round of a span.
    Those ``without`` whom it runs are chosen as ever, and have no turn.
    """
    recipe, engine = stage.recipe, stage.engine
    started = time.monotonic()
    state, first = begin(stage, stream, out, resume)
    scores: list[Score] = []
    for span in spans(stage, first):
        stage = stage.renew(stage, span[0])
        begun = [turn_of(stage, r, [c for c in sample(stage, r) if c not in without]) for r in span]
        turns: list[Arrival] = []
        for turn in begun:
            moved(stage, stream, turn.round)
            stream.write(RoundStarted(turn.round, turn.chosen))
            turns += apart(stage, state, stream, turn)
        for turn, arrivals, merged in play(stage, state, begun, stream, replay):
            state, turns = merged, turns + arrivals
            stream.write(Merged(turn.round, turn.wave, tuple(replies(arrivals))))
        check(turns)
        r, done = span[-1], span[-1] + 1
        if due(recipe, done):
            scores = score(stage, state, stream, done)
        if out is not None:
            path = checkpoint.write(out / "checkpoint", done, stage.recipe, state, engine)
            stream.write(Checkpointed(r, path.relative_to(out).as_posix()))
            engine.saved()
    if not scores:
        scores = score(stage, state, stream, recipe.rounds)
    stream.write(RunEnded(recipe.rounds, time.monotonic() - started))
    return Result(tuple(scores), state, after(stage, recipe.rounds), stage)


def due(recipe: Recipe, done: int) -> bool:
    """Whether models are scored after so many rounds."""
    every = recipe.evaluate.every
    return done == recipe.rounds or bool(every and done % every == 0)


def spans(stage: Stage[Host], first: int) -> list[range]:
    """The rounds that are played as one: each for itself, or without a barrier as many as can be.

    Scores end a span, and so does a round in which a client is alone.
    """
    recipe, alone = stage.recipe, stage.fleet.alone
    rounds = range(first, recipe.rounds)
    if not stage.strategy.barrier:
        rounds = [r for r in rounds if due(recipe, r + 1) or alone(r) or alone(r + 1)]
    return [range(a, b) for a, b in pairwise([first, *(r + 1 for r in rounds)])]


def play(
    stage: Stage[Host], state: Any, begun: Sequence[Turn], stream: Stream, replay: Orders | None
) -> Iterator[tuple[Turn, list[Arrival], Any]]:
    """The rounds of a span: wave by wave, or all clients side by side without a barrier."""
    strategy, engine, told = stage.strategy, stage.engine, partial(tell, stream)
    if strategy.barrier:
        (turn,) = begun
        dice = stage.dice("waves", round=turn.round)
        if turn.chosen:
            yield from waves_of(strategy, engine, state, turn, dice, tell=told)
        return
    first = begun[0].round
    recorded = None if replay is None else replay.get(first, ())
    flow = Flow(stage.paces_at(first), recorded)
    paces = stage.paces_at
    yield from flow_of(strategy, engine, state, begun, flow, paces=paces, tell=told)
    stream.write(Interleaved(first, begun[-1].round, tuple(flow.order)))


def begin(stage: Stage[Host], stream: Stream, out: Path | None, resume: bool) -> tuple[Any, int]:
    """State and round to start from: those of the newest checkpoint, or the beginning."""
    recipe = stage.recipe
    found = checkpoint.newest(out / "checkpoint", recipe) if resume and out is not None else None
    if found is not None:
        return checkpoint.read(found[1], stage.strategy, stage.engine), found[0]
    backbone = stage.backbone
    dtype = str(backbone.dtype).removeprefix("torch.")
    facts = {"model": backbone.name, "blocks": backbone.depth, "dtype": dtype}
    facts["quantize"] = recipe.model.quantize
    method = stage.strategy.name
    stream.write(RunStarted(recipe.name, method, recipe.seed, recipe.mode, recipe.hash(), facts))
    for client, p in stage.placed.items():
        stream.write(SeatTaken(client, *seat_facts(p)))
    for finding in stage.federation.findings:
        stream.write(Noted("warning", finding))
    clients = tuple(sorted(stage.placed))
    dice, sizes = stage.dice("strategy"), backbone.sizes
    scene = Scene(clients, stage.seats, stage.engine.initial, dice, sizes)
    return stage.strategy.start(scene), 0


def apart(stage: Stage[Host], state: Any, stream: Stream, turn: Turn) -> list[Arrival]:
    """Turns of those who are alone in a round; no method hears of them."""
    arrivals: list[Arrival] = []
    for client in turn.alone:
        stream.write(WentAlone(turn.round, client))
        work = assigned(stage.strategy, stage.engine, state, client, turn)
        arrivals.append(stage.engine.alone(stage.strategy, work, turn))
        tell(stream, turn, arrivals[-1])
    return arrivals


def sample(stage: Stage[Host], round: int) -> list[ClientId]:
    """The clients of a round, in order of their names; the same for every method."""
    clients = stage.fleet.present(round)
    if not clients:
        return []
    take = max(1, round_half_up(stage.recipe.sample * len(clients)))
    if take == len(clients):
        return clients
    return [clients[n] for n in stage.dice("sample", round=round).choose(len(clients), take)]


def round_half_up(x: float) -> int:
    """The nearest integer, halves up (Python's own rounds them to even)."""
    return int(x + 0.5)


def turn_of(stage: Stage[Host], round: int, chosen: Sequence[ClientId] = ()) -> Turn:
    """The turn of a round's only wave, before anything is known of its rows."""
    body, rounds = stage.backbone, stage.recipe.rounds
    places = body.block_of, body.depth
    alone = tuple(stage.fleet.alone(round))
    others = {name: (it.block_of, it.depth) for name, it in stage.engine.others.items()}
    who = stage.seats_at(round), dict[ClientId, int]()
    return Turn(round, rounds, 0, True, *who, *places, tuple(chosen), alone, others)


def after(stage: Stage[Host], done: int) -> Turn:
    """The turn in which everybody is looked at after ``done`` rounds, as they sat in the last."""
    last = turn_of(stage, max(0, done - 1))
    return replace(last, round=done)


def check(turns: Sequence[Arrival]) -> None:
    """Raises FlexpError if every turn of a round failed; who is away may be back in the next."""
    if turns and all(a.failure is not None and not a.failure.away for a in turns):
        first = turns[0]
        error = first.failure.error if first.failure else ""
        raise FlexpError(f'Every client failed, the first one ("{first.client}") with: {error}')


def score(stage: Stage[Host], state: Any, stream: Stream, done: int) -> list[Score]:
    """Evaluates every client's personal model and writes the scores."""
    last = done == stage.recipe.rounds
    scores = evaluate(
        stage.engine,
        stage.strategy,
        state,
        after(stage, done),
        clients=stage.fleet.known(done),
        when="after" if last else f"round-{done}",
        global_rows=stage.recipe.evaluate.global_rows,
    )
    for s in scores:
        stream.write(Scored(done - 1, s.client, s.cell, s.metric, s.value))
    return scores


def save_adapters(result: Result, folder: Path) -> list[Path]:
    """Every client gets its personal adapter, if it is one, as a PEFT folder.

    Those in this process in ``folder``; others write theirs where they are.
    """
    stage: Stage[Host] = result.stage
    recipe, written = stage.recipe, list[Path]()

    def write(desk: Desk, served: Served) -> None:
        if served.adapter is None:
            return
        adapter, body = desk.whole(served.adapter), desk.model.backbone
        path = folder / file_name(desk.client)
        base, revision, at = recipe.model.source, recipe.model.revision, stage.survey.source
        if name := desk.seat.model:
            base, revision, at = name, None, stage.survey.others[name].source
        card = export.card_at(desk, base, revision, at, seed=recipe.seed)
        export.write(path, adapter, body, adapter_kind(recipe.adapter), card)
        written.append(path)

    strategy, turn = stage.strategy, result.turn
    clients = stage.fleet.known(recipe.rounds)
    work = [assigned(strategy, stage.engine, result.state, c, turn) for c in clients]
    stage.engine.hand_over(strategy, work, turn, write)
    return written


def rows(scores: Sequence[Score], method: str, seed: int) -> list[dict[str, Any]]:
    """Scores as rows of a table, the shape of every ``--json``."""
    return [
        {
            "method": method,
            "client": s.client,
            "cell": s.cell,
            "metric": s.metric,
            "value": s.value,
            "seed": seed,
        }
        for s in scores
    ]
