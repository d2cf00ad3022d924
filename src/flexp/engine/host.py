"""The server's side of every engine: the shared backbone, its tenancies and the trunk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from flexp.client.desk import Desk, Training
from flexp.client.memory import Memory
from flexp.data.examples import Shard
from flexp.data.tasks import Task
from flexp.dice import Dice
from flexp.engine.base import Arrival, Assignment, Give
from flexp.engine.flow import Flow
from flexp.engine.look import Cells, Look
from flexp.model.adapter import Kind, alpha_of, dropout_of
from flexp.model.backbone import Backbone
from flexp.model.cut import Seat
from flexp.model.heads import headed
from flexp.model.ops import HeadForm, SlotSpec
from flexp.server.bodies import Others
from flexp.server.tenants import Tenants
from flexp.server.trunk import Trunk
from flexp.strategies.base import ClientId, Served, Strategy, Turn
from flexp.tensors import Tensors

CHECKPOINTS = 3  # the newest that are kept
# Adapters that slots begin with, by backbone, kind, rank, length and form of a head's rows.
Begun = dict[tuple[int, Kind, int | None, float | None, HeadForm], Tensors]


class Host(ABC):
    """What the round loop needs of an engine, and what all engines have in common at the server.

    ``memories`` and ``shards`` are those of clients in this process; who is out on the network
    keeps both. ``tasks`` are those of clients that learn something else than ``task``, ``others``
    the backbones of seats that name one. The trunk computes ``together`` what waits for it, or one
    message after another.
    """

    def __init__(
        self,
        backbone: Backbone,
        task: Task,
        *,
        kind: Kind,
        training: Training,
        dice: Dice,
        together: bool = False,
        others: Others | None = None,
    ) -> None:
        self.others = others or {}
        self.backbone, self.task, self.kind = backbone, task, kind
        self.training, self.dice = training, dice
        self.tasks: Mapping[ClientId, Task] = {}
        self.shards: Mapping[ClientId, Shard] = {}
        self.memories: dict[ClientId, Memory] = {}
        self.begun: Begun = {}
        self.measures = False  # whether turns are measured, which takes a little time
        begun = {name: partial(self.begun_on, it) for name, it in self.others.items()}
        how: dict[str, Any] = {"others": others, "begun": begun}
        self.tenants = Tenants(backbone, self.initial, still=training.still, **how)
        drops = dropout_of(kind)
        self.trunk = Trunk(
            backbone,
            self.tenants,
            task,
            dropout=drops,
            together=together,
            kept=training.cache,
            others=others,
        )

    def close(self) -> None:
        """Stops the trunk's thread."""
        self.trunk.close()

    def saved(self) -> None:
        """A checkpoint is on disk: answers that both sides have there are forgotten."""
        self.trunk.commit()

    @abstractmethod
    def run(
        self, strategy: Strategy[Any], work: Iterable[Assignment], turn: Turn
    ) -> Iterator[Arrival]:
        """Each client's turn; a client that fails is an arrival with a failure."""

    @abstractmethod
    def flow(self, strategy: Strategy[Any], give: Give, flow: Flow) -> Iterator[Arrival]:
        """Turns side by side, without a barrier: who has arrived is given the next one at once."""

    @abstractmethod
    def alone(self, strategy: Strategy[Any], work: Assignment, turn: Turn) -> Arrival:
        """A turn without the server; ``work.seat`` is the client's ordinary seat."""

    @abstractmethod
    def look(
        self, strategy: Strategy[Any], work: Sequence[Assignment], turn: Turn, look: Look
    ) -> Mapping[ClientId, Cells]:
        """Scores of what clients would deploy, by client and by whose data; nothing lasts."""

    @abstractmethod
    def hand_over(
        self,
        strategy: Strategy[Any],
        work: Sequence[Assignment],
        turn: Turn,
        write: Callable[[Desk, Served], None],
    ) -> None:
        """Every client gets what it would deploy; those in this process have it written here."""

    def initial(self, spec: SlotSpec, rank: int | None = None) -> Tensors:
        """The adapter that a slot begins with, the same on both sides."""
        return self.begun_on(self.backbone, spec, rank)

    def begun_on(self, body: Backbone, spec: SlotSpec, rank: int | None) -> Tensors:
        """The same on another backbone, which has a head of its own."""
        whose = 0 if body is self.backbone else id(body)
        key = (whose, spec.kind or self.kind, rank, spec.head_rows, spec.head_form)
        if key not in self.begun:
            self.begun[key] = beginning(body, spec, rank, kind=self.kind, dice=self.dice)
        return self.begun[key]

    def task_of(self, client: ClientId) -> Task:
        """What a client learns."""
        return self.tasks.get(client, self.task)

    def seat_of(self, client: ClientId) -> Seat | None:
        """Where a client had its last turn; None before its first."""
        home = self.tenants.homes.get(client)
        return None if home is None else home.seat

    def admit(self, work: Assignment, specs: Mapping[str, SlotSpec]) -> None:
        """Opens a client's tenancy for a turn."""
        self.trunk.tables.pop(work.client, None)
        alpha = alpha_of(self.kind)
        self.tenants.join(work.client, work.seat, specs, offer=work.offer, alpha=alpha)


def beginning(
    body: Backbone, spec: SlotSpec, rank: int | None, *, kind: Kind, dice: Dice
) -> Tensors:
    """The adapter that a slot begins with on a backbone; ``kind`` where the slot names none."""
    rank = rank if spec.kind is None else None
    return headed(body, body.initial(spec.kind or kind, dice("initial"), rank), spec)
