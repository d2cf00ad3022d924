"""The interface of a strategy: one algorithm, in one file, that knows no block numbers.

A strategy is a frozen dataclass whose fields are its hyper-parameters. It says what a client is
offered, what the client does with it at its desk, and how replies are merged. The engine cuts what
is offered and joins what comes back, so the same file runs whole and at any cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol, TypeVar

from torch import Tensor

from flexp.client.desk import Desk, Training
from flexp.data.tasks import Batch
from flexp.dice import Dice
from flexp.model.adapter import Kind, Lora
from flexp.model.cut import Seat
from flexp.model.ops import SlotSpec
from flexp.parcel import Parcel
from flexp.privacy.egress import Leave
from flexp.selection import ALL, NONE, Place, Where, select
from flexp.tensors import Tensors, Wear

ClientId = str
State = TypeVar("State")
Blocks = tuple[Callable[[str], int], int]  # a name's block, and how many there are
MethodKind = Literal[
    "reference", "centralised", "federated", "personalised", "federated LoRA", "split", "observer"
]


@dataclass(frozen=True)
class Setting:
    """What a method is asked to run in, known before any weight is read.

    ``head`` is whether the adapter has tensors after the last block. ``heads`` are the kinds of
    task and the labels by client, where some have their own. ``training`` is the recipe's.
    """

    task: str
    adapter: Kind
    seats: Mapping[ClientId, Seat]
    depth: int
    head: bool
    heads: Mapping[ClientId, tuple[str, ...]] = field(
        default_factory=dict[ClientId, tuple[str, ...]]
    )
    training: Training = field(default_factory=Training)


class Beginning(Protocol):
    """The adapter that a slot begins with, of a rank (None: the recipe's, or its own kind's)."""

    def __call__(self, spec: SlotSpec, rank: int | None = None, /) -> Tensors: ...


@dataclass(frozen=True)
class Scene:
    """What a strategy sees once, at the start: who takes part and where everybody begins.

    ``sizes`` are the numbers of a position behind the last block, and the classes of a
    classification.
    """

    clients: tuple[ClientId, ...]
    seats: Mapping[ClientId, Seat]
    initial: Beginning
    dice: Dice
    sizes: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Turn:
    """Which round and wave it is. ``rows`` are training rows as the server saw them in this turn.

    Of a client without a server part the server sees none; then they are the client's claim.
    ``block_of`` and ``depth`` are of the run's model, ``others`` of models that seats name.
    ``chosen`` are the clients of the whole round; ``alone`` are those that train without the server
    in it, of which a method sees nothing.
    """

    round: int
    rounds: int
    wave: int
    last_wave: bool
    seats: Mapping[ClientId, Seat]
    rows: Mapping[ClientId, int]
    block_of: Callable[[str], int]
    depth: int
    chosen: tuple[ClientId, ...] = ()
    alone: tuple[ClientId, ...] = ()
    others: Mapping[str, Blocks] = field(default_factory=dict[str, "Blocks"])

    def blocks(self, client: ClientId) -> Blocks:
        """Where names of a client's adapter lie in its model, and how many blocks that has."""
        model = self.seats[client].model
        return self.others[model] if model else (self.block_of, self.depth)

    def select(self, client: ClientId, tensors: Tensors, where: Where) -> Tensors:
        """The part of an adapter that a selection takes at that client's cut."""
        seat, (block_of, depth) = self.seats[client], self.blocks(client)
        return select(tensors, where, lambda k: seat.place(block_of(k), depth))

    def weights(self, clients: Sequence[ClientId]) -> list[float]:
        """Rows as weights of a mean; all equal if nobody trained on any."""
        rows = [float(self.rows.get(c, 0)) for c in clients]
        return rows if sum(rows) else [1.0] * len(rows)

    def told(self, replies: Mapping[ClientId, Parcel]) -> list[float]:
        """Rows that the replies tell of, at most those seen, as weights.

        For turns in which something trains behind the trunk alone: the server sees that at some
        cuts, and at others not.
        """
        told = [reply.facts.get("rows") for reply in replies.values()]
        pairs = zip(told, self.weights(list(replies)), strict=True)
        return [min(float(t), seen) if isinstance(t, int) and t > 0 else seen for t, seen in pairs]


@dataclass(frozen=True)
class Served:
    """What a client would deploy: a predictor, and the wear if it is one PEFT adapter."""

    predict: Callable[[Batch], Tensor]
    adapter: Wear | None


class Strategy(Protocol[State]):
    """One algorithm. Only ``start``, ``offer``, ``train`` and ``merge`` must be written.

    The first line of the class's docstring is what `flexp methods` says that it does. ``own`` is
    the part of what it serves that may differ between clients; the rest is equal for all.
    ``alone``: whether a client may go on training its slot "personal" without the server.
    ``gates``: whether it wears adapters by gates, which Co-LoRA has. ``probes``: whether clients
    look at rows with the run's probe. ``models``: whether they may have other backbones each.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    kind: ClassVar[MethodKind]
    own: ClassVar[Where] = NONE
    reconstruction: ClassVar[str] = ""
    split: ClassVar[str] = "yes"
    alone: ClassVar[bool] = True
    gates: ClassVar[bool] = False
    probes: ClassVar[bool] = False
    models: ClassVar[bool] = False
    slots: ClassVar[Mapping[str, SlotSpec]]
    leaves: ClassVar[tuple[Leave, ...]] = ()

    def refuses(self, setting: Setting) -> str:
        """Why the method cannot run in this setting, and what to change; empty if it can."""
        return self.unequal_ranks(setting) or self.unequal_heads(setting)

    def unequal_heads(self, setting: Setting) -> str:
        """The refusal of methods for which heads or rows of all clients come together."""
        groups: dict[tuple[str, ...], list[ClientId]] = {}
        for client, space in setting.heads.items():
            groups.setdefault(space, []).append(client)
        head = Place("near", "head", setting.depth, setting.depth)
        leaves = setting.head and any(leave.where.holds("head", head) for leave in self.leaving())
        if len(groups) < 2 or not (leaves or self.kind == "centralised"):
            return ""
        odd = sorted(groups.values(), key=len)[:-1]
        names = ", ".join(f'"{client}"' for group in odd for client in group)
        return (
            f"it brings the heads of all clients together, but {names} learn other labels or "
            "another task. Remove them from clients, or choose a method whose heads stay near."
        )

    def unequal_ranks(self, setting: Setting) -> str:
        """The refusal of methods that average factors of all clients."""
        ranks = {seat.rank for seat in setting.seats.values()}
        if len(ranks) < 2:
            return ""
        return "it averages LoRA factors, so all clients need one rank. Remove plan.ranks."

    def without_lora(self, setting: Setting) -> str:
        """The refusal of methods that are made of LoRA's factors."""
        if isinstance(setting.adapter, Lora):
            return ""
        return "it is made of LoRA's A and B, which this adapter lacks. Set adapter.kind=lora."

    @property
    def barrier(self) -> bool:
        """Whether a round waits for all its clients; without, each goes on when it has arrived."""
        return True

    def specs(self) -> Mapping[str, SlotSpec]:
        """The slots of this setting of the method."""
        return self.slots

    def owns(self) -> Where:
        """What ``own`` is in this setting of the method."""
        return self.own

    def leaving(self) -> tuple[Leave, ...]:
        """What ``leaves`` is in this setting of the method."""
        return self.leaves

    def averages(self) -> Where:
        """What of slot "personal" a merge makes the mean of replies, rows as weights.

        Only where that, and a few steps down the client's loss, is all that becomes of it, and the
        state holds it by name: then an observer can follow it.
        """
        return NONE

    def moving(self) -> Where:
        """What of its personal model trains when a client is alone."""
        return ALL

    def start(self, scene: Scene) -> State:
        """The server's state before the first round."""
        ...

    def waves(
        self, state: State, chosen: Sequence[ClientId], dice: Dice
    ) -> Sequence[Sequence[ClientId]]:
        """The round's waves of clients; one wave of all who were chosen unless overridden."""
        del state, dice
        return [chosen]

    def offer(self, state: State, client: ClientId, turn: Turn) -> Parcel:
        """What a client gets at the start of its turn."""
        ...

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        """What the client does, where its data lives. ``offer`` has facts and loose tensors;
        offered slots lie on the desk, their near parts fetched on first use."""
        ...

    def merge(self, state: State, replies: Mapping[ClientId, Parcel], turn: Turn) -> State:
        """The server's state after a wave; ``replies`` come in order of client ids."""
        ...

    def personal(self, desk: Desk, offer: Parcel) -> Served:
        """What this client would deploy after its last turn."""
        del offer
        return Served(lambda batch: desk.model.logits(batch, "personal"), "personal")
