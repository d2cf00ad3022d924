"""Writes what happens in a run as events: who moves, who has trained, who has failed."""

from __future__ import annotations

from flexp.engine.base import Arrival
from flexp.engine.host import Host
from flexp.events import SeatMoved, Stream, TurnEnded, TurnFailed
from flexp.parcel import Facts
from flexp.seating import Placed
from flexp.stage import Stage
from flexp.strategies.base import Turn


def moved(stage: Stage[Host], stream: Stream, round: int) -> None:
    """Writes who sits elsewhere from this round on."""
    for move in stage.fleet.moves:
        if move.round == round:
            stream.write(SeatMoved(round, move.client, *seat_facts(move.placed)))


def seat_facts(p: Placed) -> tuple[str, int, int, str, int, str]:
    """A seat as events tell it."""
    cut = p.seat.cut
    return p.device, cut.front, cut.back, p.seat.labels, p.bytes, p.reason


def tell(stream: Stream, turn: Turn, arrival: Arrival) -> None:
    """Writes an arrival's event."""
    if arrival.reply is None:
        error = arrival.failure.error if arrival.failure else "no reply"
        stream.write(TurnFailed(turn.round, turn.wave, arrival.client, error))
        return
    facts, ledger = arrival.reply.facts, arrival.ledger
    loss, steps = facts.get("loss"), facts.get("steps")
    stream.write(
        TurnEnded(
            turn.round,
            turn.wave,
            arrival.client,
            float(loss) if isinstance(loss, int | float) else float("nan"),
            int(steps) if isinstance(steps, int) else 0,
            arrival.seconds,
            ledger.sent,
            ledger.received,
            {f"{way} {kind}": size for (way, kind), size in sorted(ledger.kinds.items())},
            measured(arrival),
        )
    )


def measured(arrival: Arrival) -> Facts:
    """What a turn took, as far as it was measured."""
    held = arrival.measured
    if held is None:
        return {"messages": arrival.ledger.messages}
    return {
        "messages": arrival.ledger.messages,
        "near_flops": held.near_flops,
        "far_flops": held.far_flops,
        "peak_bytes": held.peak,
    }
