"""Tenants: every client's far slots and optimizers, on the one shared backbone.

Knows slots and places, never a strategy. A client reads and moves only its own tenancy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from flexp.errors import AdapterError, CutError, LinkError
from flexp.model.backbone import Backbone
from flexp.model.cut import Seat, uncut
from flexp.model.ops import Initial, Op, Optim, SlotSpec
from flexp.model.slots import Slots, moments
from flexp.parcel import JSON, Facts, Parcel
from flexp.tensors import ALL, BlockScalars, Place, Tensors, Where, select

Held = dict[str, Tensors]


@dataclass
class Tenancy:
    """One client's residence: its seat, its far slots, and what it was offered for this turn."""

    client: str
    seat: Seat
    specs: Mapping[str, SlotSpec]
    slots: Slots
    offered: Mapping[str, Tensors] = field(default_factory=dict[str, Tensors])
    loose: Tensors = field(default_factory=dict[str, Tensor])
    facts: Facts = field(default_factory=dict[str, JSON])
    rows: int = 0
    counted: int = -1
    reply: Parcel | None = None
    counted_rows: int = 0
    before: tuple[Held, Held] | None = None


class Tenants:
    """All tenancies of one server."""

    def __init__(self, backbone: Backbone, initial: Initial) -> None:
        self.backbone, self.initial = backbone, initial
        self.homes: dict[str, Tenancy] = {}
        self.shared = Slots(self._everywhere, backbone.depth)

    def __getitem__(self, client: str) -> Tenancy:
        if client not in self.homes:
            raise LinkError(f'Client "{client}" has no seat at this server. Join first.')
        return self.homes[client]

    def join(
        self,
        client: str,
        seat: Seat,
        slots: Mapping[str, SlotSpec],
        *,
        offer: Parcel | None = None,
        alpha: float = 16.0,
    ) -> None:
        """Opens a client's turn: what lasts is kept, the rest begins anew, offers are put in."""
        home = self.homes.get(client)
        if home is None:
            held = Slots(self._placer(seat), self.backbone.depth, alpha)
            home = self.homes[client] = Tenancy(client, seat, slots, held)
        elif home.seat != seat:
            how = replace(home.seat, recompute=seat.recompute, accumulate=seat.accumulate)
            if how != seat and home.slots.lasting(slots) & home.slots.values.keys():
                raise CutError(
                    f'Client "{client}" moved from cut {home.seat.cut} to {seat.cut} between '
                    "turns, and adapters that last would be lost. Recut it within a turn first."
                )
            self.recut(client, seat)
        home.specs, home.rows, home.counted, home.reply = slots, 0, -1, None
        home.counted_rows = 0
        home.before = (dict(home.slots.values), dict(self.shared.values))
        home.slots.alpha = alpha
        home.slots.end_turn(slots)
        offer = offer or Parcel()
        for slot, spec in slots.items():
            self._begin(home, slot, spec)
        for slot, tensors in offer.adapters.items():
            self.put(client, slot, select(tensors, Where(side="far"), home.slots.place))
        home.offered = {
            slot: select(tensors, Where(side="near"), home.slots.place)
            for slot, tensors in offer.adapters.items()
        }
        home.loose, home.facts = offer.tensors, offer.facts

    def _begin(self, home: Tenancy, slot: str, spec: SlotSpec) -> None:
        far = Where(side="far")
        if spec.home == "server" and slot not in self.shared.values:
            self.shared.put(slot, self.initial(spec, home.seat.rank))
        if slot not in home.slots.values:
            value = self.initial(spec, home.seat.rank)
            home.slots.put(slot, select(value, far, home.slots.place))
        if spec.optim is not None:
            home.slots.optims[slot] = spec.optim

    def optims(self, client: str, optims: Mapping[str, Optim]) -> None:
        """Sets the optimizers that the client trains with."""
        self[client].slots.optims |= dict(optims)

    def put(self, client: str, slot: str, tensors: Mapping[str, Tensor]) -> None:
        """Replaces far tensors of a slot. AdapterError unless names and shapes are the tenant's."""
        home = self[client]
        if slot.partition("@")[0] not in home.specs:
            raise AdapterError(f'Client "{client}" has no slot "{slot}" at this server.')
        held = home.slots.values.get(slot, {})
        for name, value in tensors.items():
            if home.slots.place(name).side != "far":
                raise AdapterError(f'"{name}" of slot "{slot}" is not far for client "{client}".')
            if name in held and held[name].shape != value.shape:
                raise AdapterError(
                    f'"{name}" of slot "{slot}" has shape {list(value.shape)}, but the tenant '
                    f"holds {list(held[name].shape)}. Check the rank of the seat."
                )
        fresh = {k: v.detach().clone() for k, v in tensors.items()}
        home.slots.values[slot] = dict(sorted({**held, **fresh}.items()))

    def do(self, client: str, ops: Sequence[Op]) -> list[BlockScalars]:
        """Applies operations to the client's far slots."""
        home = self[client]
        self.wear_shared(home)
        out = home.slots.do(ops)
        self.return_shared(home)
        return out

    def take(self, client: str, slots: Sequence[str], where: Where = ALL) -> dict[str, Tensors]:
        """Far tensors of slots, for merges and export on the server's side."""
        home = self[client]
        self.wear_shared(home)
        return {s: select(home.slots[s], where, home.slots.place) for s in slots}

    def recut(self, client: str, seat: Seat) -> None:
        """Moves a client to another seat: blocks that are no longer far are dropped.

        The client fetches those before, and puts the ones that become far after.
        """
        home = self[client]
        seat.check(self.backbone.depth, open_profile=True, who=client)
        home.seat = seat
        home.slots.place = self._placer(seat)
        home.slots.values = {
            s: select(v, Where(side="far"), home.slots.place) for s, v in home.slots.values.items()
        }

    def rollback(self, client: str) -> None:
        """Takes the tenancy back to what it was before the turn that failed."""
        home = self.homes.get(client)
        if home is not None and home.before is not None:
            home.slots.values, self.shared.values = dict(home.before[0]), dict(home.before[1])
            home.slots.grads = {}

    def leave(self, client: str) -> None:
        """Ends the turn: slots of the turn are dropped."""
        home = self[client]
        home.slots.end_turn(home.specs)
        home.offered, home.loose, home.facts = {}, {}, {}

    # ---- slots with one far copy for all

    def wear_shared(self, home: Tenancy) -> None:
        """Lets a tenancy see the present value of slots that live at the server."""
        for slot, spec in home.specs.items():
            if spec.home == "server":
                for name in (slot, *moments(slot)):
                    if name in self.shared.values:
                        home.slots.values[name] = select(
                            self.shared.values[name], Where(side="far"), home.slots.place
                        )

    def return_shared(self, home: Tenancy) -> None:
        """Writes what a tenancy changed in such slots back to the one copy."""
        for slot, spec in home.specs.items():
            if spec.home == "server":
                for name in (slot, *moments(slot)):
                    if name in home.slots.values:
                        held = self.shared.values.get(name, {})
                        self.shared.values[name] = {**held, **home.slots.values[name]}

    def _placer(self, seat: Seat) -> Callable[[str], Place]:
        return lambda name: self.backbone.place(name, seat)

    def _everywhere(self, name: str) -> Place:
        return replace(self.backbone.place(name, uncut(self.backbone.depth)), side="far")
