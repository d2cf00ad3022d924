"""What every engine takes and gives: assignments, arrivals, and failures that end no round."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from flexp.data.tasks import Loss, Task
from flexp.link.metered import Ledger
from flexp.model.backbone import Backbone
from flexp.model.cut import Seat
from flexp.parcel import Parcel
from flexp.strategies.base import ClientId, Strategy, Turn


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
    """Why a client gave no reply."""

    error: str


@dataclass(frozen=True)
class Arrival:
    """A reply, or a failure; never both. ``rows`` were trained on, as far as the server saw."""

    client: ClientId
    reply: Parcel | None = None
    failure: Failure | None = None
    rows: int = 0
    seconds: float = 0.0
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


class Engine(Protocol):
    """Runs ``train`` of a wave of clients somewhere."""

    def run(
        self, strategy: Strategy[Any], work: Iterable[Assignment], turn: Turn
    ) -> Iterator[Arrival]:
        """Arrivals, in the order in which their results count."""
        ...


def replies(arrivals: Iterable[Arrival]) -> Mapping[ClientId, Parcel]:
    """The replies by client, in order of client ids."""
    found = {a.client: a.reply for a in arrivals if a.reply is not None}
    return dict(sorted(found.items()))
