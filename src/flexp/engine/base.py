"""What every engine takes and gives: assignments, arrivals, and failures that end no round."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from flexp.data.tasks import Loss, Task
from flexp.link.metered import Ledger
from flexp.model.backbone import Backbone
from flexp.model.cut import Seat
from flexp.parcel import Parcel
from flexp.selection import FAR, NEAR
from flexp.strategies.base import ClientId, Strategy, Turn

if TYPE_CHECKING:
    from flexp.engine.flow import Flow


@dataclass(frozen=True)
class Assignment:
    """One client's place in a wave: who, where it sits, and what it is offered.

    ``before`` counts its turns in earlier waves of the round.
    """

    client: ClientId
    seat: Seat
    offer: Parcel
    before: int = 0


@dataclass(frozen=True)
class Own:
    """What a client has otherwise than the rest: a task, a backbone with its head, an objective."""

    task: Task
    backbone: Backbone
    objective: Loss | None = None


@dataclass(frozen=True)
class Failure:
    """Why a client gave no reply; ``away`` if it was not there."""

    error: str
    away: bool = False


@dataclass(frozen=True)
class Arrival:
    """A reply, or a failure; never both. ``rows`` were trained on, as far as the server saw.

    ``clock`` is the simulated second, if there is one.
    """

    client: ClientId
    reply: Parcel | None = None
    failure: Failure | None = None
    rows: int = 0
    seconds: float = 0.0
    clock: float | None = None
    ledger: Ledger = field(default_factory=Ledger)
    measured: Measured | None = None


@dataclass(frozen=True)
class Measured:
    """What a turn took: floating point operations near and far, and the client's memory in bytes.

    ``peak`` counts tensors that the turn made, and those that the client keeps; not its weights.
    """

    near_flops: int
    far_flops: int
    peak: int


# A client's next assignment and its turn, when it has arrived; None when it has no more.
Give = Callable[[ClientId], tuple[Assignment, Turn] | None]


class Engine(Protocol):
    """Runs ``train`` of a wave of clients somewhere."""

    def run(
        self, strategy: Strategy[Any], work: Iterable[Assignment], turn: Turn
    ) -> Iterator[Arrival]:
        """Arrivals, in the order in which their results count."""
        ...

    def seat_of(self, client: ClientId) -> Seat | None:
        """Where a client had its last turn; None before its first."""
        ...


class FlowEngine(Engine, Protocol):
    """An engine that can also do without a barrier."""

    def flow(self, strategy: Strategy[Any], give: Give, flow: Flow) -> Iterator[Arrival]:
        """Turns side by side, without a barrier: who has arrived is given the next one at once."""
        ...


def assigned(
    strategy: Strategy[Any],
    engine: Engine,
    state: Any,
    client: ClientId,
    turn: Turn,
    *,
    nth: int = 0,
) -> Assignment:
    """A client's work: what it is offered at its seat, as its ``nth`` turn of the round.

    Of a block that moves to it since its last turn it is also offered what it wore there.
    """
    seat, was = turn.seats[client], engine.seat_of(client)
    offer = strategy.offer(state, client, turn)
    if was is None or was == seat:
        return Assignment(client, seat, offer, nth)
    there = replace(turn, seats={**turn.seats, client: was})
    adapters = dict(offer.adapters)
    for slot, worn in strategy.offer(state, client, there).adapters.items():
        moved = turn.select(client, there.select(client, worn, FAR), NEAR)
        if moved:
            adapters[slot] = {**moved, **adapters.get(slot, {})}
    return Assignment(client, seat, replace(offer, adapters=adapters), nth)


def replies(arrivals: Iterable[Arrival]) -> Mapping[ClientId, Parcel]:
    """The replies by client, in order of client ids."""
    found = {a.client: a.reply for a in arrivals if a.reply is not None}
    return dict(sorted(found.items()))
