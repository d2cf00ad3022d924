"""How the turns of a round are played: wave by wave, or all at once without a barrier."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from flexp.dice import Dice
from flexp.engine.base import Arrival, Assignment, Engine, FlowEngine, assigned, replies
from flexp.engine.flow import Flow, Pace
from flexp.strategies.base import ClientId, Strategy, Turn


def waves_of(
    strategy: Strategy[Any],
    engine: Engine,
    state: Any,
    begun: Turn,
    dice: Dice,
    *,
    tell: Callable[[Turn, Arrival], None] = lambda turn, arrival: None,
) -> Iterator[tuple[Turn, list[Arrival], Any]]:
    """One round: offers go out, clients train, replies are merged, wave by wave.

    Gives each wave's turn, arrivals and merged state; ``tell`` hears of an arrival as it comes.
    """
    had = Counter[ClientId]()
    waves = strategy.waves(state, begun.chosen, dice)
    for w, wave in enumerate(waves):
        turn = replace(begun, wave=w, last_wave=w == len(waves) - 1)
        work = [assigned(strategy, engine, state, c, turn, nth=had[c]) for c in wave]
        had.update(wave)
        arrivals: list[Arrival] = []
        for arrival in engine.run(strategy, work, turn):
            tell(turn, arrival)
            arrivals.append(arrival)
        turn = replace(turn, rows={a.client: a.rows for a in arrivals})
        state = strategy.merge(state, replies(arrivals), turn)
        yield turn, arrivals, state


def flow_of(
    strategy: Strategy[Any],
    engine: FlowEngine,
    state: Any,
    begun: Sequence[Turn],
    flow: Flow,
    *,
    paces: Callable[[int], Mapping[ClientId, Pace]] | None = None,
    tell: Callable[[Turn, Arrival], None] = lambda turn, arrival: None,
) -> Iterator[tuple[Turn, list[Arrival], Any]]:
    """Rounds without a barrier: every client gets its next assignment when it has arrived.

    Gives each arrival's turn and the state that it was merged into. ``paces``: how fast clients are
    in a round, if that changes.
    """
    todo = {c: [turn for turn in begun if c in turn.chosen] for c in flow.lines}
    now: dict[ClientId, Turn] = {}

    def give(client: ClientId) -> tuple[Assignment, Turn] | None:
        if not todo[client]:
            return None
        turn = now[client] = todo[client].pop(0)
        if paces is not None:
            flow.lines[client].pace = paces(turn.round)[client]
        return assigned(strategy, engine, state, client, turn), turn

    for arrival in engine.flow(strategy, give, flow):
        turn = now[arrival.client]
        tell(turn, arrival)
        turn = replace(turn, rows={arrival.client: arrival.rows})
        state = strategy.merge(state, replies([arrival]), turn)
        yield turn, [arrival], state
