"""What a server holds of one client, between its turns and within one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from flexp.model.cut import Seat
from flexp.model.ops import SlotSpec
from flexp.model.slots import Slots
from flexp.parcel import JSON, Facts, Parcel
from flexp.tensors import Tensors

Held = dict[str, Tensors]


@dataclass
class Tenancy:
    """One client's residence: its seat, its far slots, and what it was offered for this turn.

    After a change of seat, ``leaving`` waits for the client to fetch it. ``there`` are the names by
    slot that it need not hand in, ``awaited`` the far tensors (slot, name) that have yet to come.
    """

    client: str
    seat: Seat
    specs: Mapping[str, SlotSpec]
    slots: Slots
    offered: Mapping[str, Tensors] = field(default_factory=dict[str, Tensors])
    loose: Tensors = field(default_factory=dict[str, Tensor])
    facts: Facts = field(default_factory=dict[str, JSON])
    rows: int = 0
    counted: tuple[int, int] = (-1, 0)
    reply: Parcel | None = None
    counted_rows: int = 0
    before: tuple[Seat, Held, Held, int] | None = None
    seen: int = 0  # steps of server slots before its newest forward
    stepped: int = 0  # its own of this turn
    turns: int = 0  # that counted
    moving: bool = False
    leaving: Held = field(default_factory=dict[str, Tensors])
    there: dict[str, set[str]] = field(default_factory=dict[str, set[str]])
    awaited: set[tuple[str, str]] = field(default_factory=set[tuple[str, str]])
