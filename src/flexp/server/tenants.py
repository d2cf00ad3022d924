"""Tenants: every client's far slots and optimizers, on a backbone that many share.

Knows slots and places, never a strategy. A client reads and moves only its own tenancy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from torch import Tensor

from flexp.errors import AdapterError, CutError, LinkError
from flexp.model.backbone import Backbone
from flexp.model.cut import Seat, uncut
from flexp.model.ops import Initial, Op, Optim, SlotSpec, Step, alphas_of
from flexp.model.slots import Slots, moments
from flexp.parcel import Parcel
from flexp.selection import ALL, FAR, NEAR, Place, Where, select
from flexp.server.bodies import Others, body_at
from flexp.server.checks import refuse_odd
from flexp.server.tenancy import Tenancy
from flexp.tensors import BlockScalars, Tensors


class Tenants:
    """All tenancies of one server. ``still``: whether a tensor may take steps and never move.

    ``others`` are the backbones of seats that name one, and ``begun`` how slots begin there.
    """

    def __init__(
        self,
        backbone: Backbone,
        initial: Initial,
        *,
        still: Literal["refuse", "allow"] = "allow",
        others: Others | None = None,
        begun: Mapping[str, Initial] | None = None,
    ) -> None:
        self.backbone, self.still, self.others = backbone, still, others or {}
        self._initial = {"": initial, **(begun or {})}
        self.homes: dict[str, Tenancy] = {}
        self.shared = Slots(self._everywhere, backbone.depth, fused=backbone.fast)
        self.steps = 0  # taken so far on slots of the server, by anybody

    def body(self, seat: Seat) -> Backbone:
        """The backbone of a seat."""
        return body_at(seat, self.backbone, self.others)

    def initial(self, spec: SlotSpec, seat: Seat) -> Tensors:
        """The adapter that a slot begins with at a seat."""
        return self._initial[seat.model](spec, seat.rank)

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
        """Opens a client's turn: what lasts is kept, the rest begins anew, offers are put in.

        At another seat than before, what lasts moves: see ``_move``. CutError at another rank.
        """
        home = self.homes.get(client)
        if home is None:
            body = self.body(seat)
            held = Slots(self._placer(seat), body.depth, alpha, fused=body.fast)
            home = self.homes[client] = Tenancy(client, seat, slots, held)
        shared = dict(self.shared.values)
        home.before = (home.seat, dict(home.slots.values), shared, self.steps)
        home.specs, home.rows, home.reply = slots, 0, None
        home.counted, home.counted_rows = (-1, 0), 0
        home.seen, home.stepped = self.steps, 0
        home.moving, home.leaving, home.there, home.awaited = False, {}, {}, set()
        home.slots.alpha, home.slots.alphas = alpha, alphas_of(slots)
        home.slots.end_turn(slots)
        offer = offer or Parcel()
        if home.seat != seat:
            self._move(home, seat, offer)
        for slot, spec in slots.items():
            self._begin(home, slot, spec)
        for slot, tensors in offer.adapters.items():
            self.put(client, slot, select(tensors, FAR, home.slots.place))
        home.offered = {
            slot: select(tensors, NEAR, home.slots.place)
            for slot, tensors in offer.adapters.items()
        }
        home.loose, home.facts = offer.tensors, offer.facts

    def _move(self, home: Tenancy, seat: Seat, offer: Parcel) -> None:
        """Takes another seat: what is near from now on leaves, what is far is awaited.

        Nothing is awaited that is offered, or of which the server has the one copy for all.
        """
        seat.check(self.body(seat).depth, open_profile=True, who=home.client)
        lasting = sorted(home.slots.lasting(home.specs))
        there = {s: self._far(home, s) for s in lasting}
        if seat.rank != home.seat.rank and home.slots.values:
            raise CutError(
                f'Client "{home.client}" moved from rank {home.seat.rank} to {seat.rank}, but its '
                "adapters last and keep their rank. Only its cut and its device may change."
            )
        home.seat, home.moving = seat, True
        home.slots.place = self._placer(seat)
        home.leaving = {s: select(v, NEAR, home.slots.place) for s, v in there.items()}
        home.slots.values = {
            s: select(v, FAR, home.slots.place) for s, v in home.slots.values.items()
        }
        home.there = {s: self._present(home, s) | offer.adapters.get(s, {}).keys() for s in lasting}
        for slot in [s for s in lasting if s in home.specs and s in home.slots.values]:
            names = select(self.initial(home.specs[slot], seat), FAR, home.slots.place)
            home.awaited |= {(slot, name) for name in names if name not in home.there[slot]}

    def _far(self, home: Tenancy, slot: str) -> Tensors:
        """What a tenancy has of a slot, by its seat: the one copy of all, or its own."""
        spec = home.specs.get(slot.partition("@")[0])
        held = self.shared if spec is not None and spec.home == "server" else home.slots
        return select(held.values.get(slot, {}), FAR, home.slots.place)

    def _present(self, home: Tenancy, slot: str) -> set[str]:
        """Names of a slot that are far already; moments of a copy for all come with its values."""
        owner = slot.partition("@")[0]
        shared = owner in home.specs and home.specs[owner].home == "server"
        return set(self._far(home, owner if shared else slot))

    def _begin(self, home: Tenancy, slot: str, spec: SlotSpec) -> None:
        if spec.home == "server":
            self._begin_shared(home, slot, spec)
        elif slot not in home.slots.values:
            value = self.initial(spec, home.seat)
            home.slots.put(slot, select(value, FAR, home.slots.place))
        if spec.optim is not None:
            home.slots.optims[slot] = spec.optim

    def _begin_shared(self, home: Tenancy, slot: str, spec: SlotSpec) -> None:
        """The one copy has a tensor from when the first client has it far."""
        seat = replace(home.seat, rank=None) if spec.any_rank else home.seat
        value = select(self.initial(spec, seat), FAR, home.slots.place)
        held = self.shared.values.get(slot, {})
        fresh = {k: v.clone() for k, v in value.items() if (slot, k) not in home.awaited}
        self._share(home, slot, {k: v for k, v in fresh.items() if k not in held})
        home.slots.put(slot, select(self.shared.values[slot], FAR, home.slots.place))

    def _share(self, home: Tenancy, slot: str, tensors: Tensors) -> None:
        """Puts tensors into the one copy; no turn of others that is under way takes them back."""
        under_way = [o.before[2] for o in self.homes.values() if o is not home and o.before]
        for values in (self.shared.values, *under_way):
            values[slot] = {**values.get(slot, {}), **tensors}

    def optims(self, client: str, optims: Mapping[str, Optim]) -> None:
        """Sets the optimizers that the client trains with."""
        self[client].slots.optims |= dict(optims)

    def put(self, client: str, slot: str, tensors: Mapping[str, Tensor]) -> None:
        """Replaces far tensors of a slot. AdapterError unless names and shapes are the tenant's."""
        home = self[client]
        if slot.partition("@")[0] not in home.specs:
            raise AdapterError(f'Client "{client}" has no slot "{slot}" at this server.')
        held = home.slots.values.get(slot, {})
        free = slot in home.specs and home.specs[slot].any_rank
        for name, value in tensors.items():
            if home.slots.place(name).side != "far":
                raise AdapterError(f'"{name}" of slot "{slot}" is not far for client "{client}".')
            alike = name not in held or held[name].shape == value.shape
            if not (alike or (free and ".lora_" in name)):
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
        out = home.slots.do([self._aged(home, op) for op in ops])
        if ops:
            self.return_shared(home)
        return out

    def _aged(self, home: Tenancy, op: Op) -> Op:
        """A step of a server's slot, scaled down by the steps of others since its forward."""
        spec = home.specs.get(op.slot) if isinstance(op, Step) else None
        if spec is None or spec.home != "server" or not isinstance(op, Step):
            return op
        stale = self.steps - home.seen
        self.steps, home.stepped, home.seen = self.steps + 1, home.stepped + 1, home.seen + 1
        return replace(op, share=op.share / (1 + stale) ** spec.staleness)

    def take(self, client: str, slots: Sequence[str], where: Where = ALL) -> dict[str, Tensors]:
        """Far tensors of slots, for merges and export on the server's side."""
        home = self[client]
        self.wear_shared(home)
        return {s: select(home.slots[s], where, home.slots.place) for s in slots}

    def hand_in(self, client: str, slot: str, tensors: Mapping[str, Tensor]) -> None:
        """Takes in what a client that moves had near; LinkError for anything else."""
        home = self[client]
        there = home.there.get(slot)
        if there is None or there & tensors.keys():
            raise LinkError(
                f'Client "{client}" handed in tensors of slot "{slot}", but no block of them has '
                "moved to the server."
            )
        self.put(client, slot, tensors)
        if home.specs[slot.partition("@")[0]].home == "server":
            self._share(home, slot, {k: home.slots.values[slot][k] for k in tensors})
        there.update(tensors)
        home.awaited -= {(slot, name) for name in tensors}

    def settled(self, client: str) -> None:
        """LinkError if a client that moved has not handed in what has become far."""
        missing = sorted(self[client].awaited)
        if missing:
            slot, name = missing[0]
            raise LinkError(
                f'Client "{client}" has moved, but "{name}" of slot "{slot}" and '
                f"{len(missing) - 1} more have not come. Hand them in first."
            )

    def commit(self, client: str) -> None:
        """Makes the turn that is over count."""
        home = self[client]
        home.before, home.turns = None, home.turns + 1

    def rollback(self, client: str) -> None:
        """Takes the tenancy back to what it was before the turn that failed.

        So does a slot of the server, unless others have stepped it since: steps that were applied
        at once for all stay applied.
        """
        home = self.homes.get(client)
        if home is not None and home.before is not None:
            seat, slots, shared, steps = home.before
            home.seat, home.slots.place = seat, self._placer(seat)
            home.slots.values, home.slots.grads = dict(slots), {}
            if self.steps == steps + home.stepped:
                self.shared.values = dict(shared)

    def leave(self, client: str) -> None:
        """Ends the turn: slots of the turn are dropped. AdapterError if tensors stood still."""
        home = self[client]
        if self.still == "refuse":
            home.slots.check_moved(client)
        home.slots.end_turn(home.specs)
        home.offered, home.loose, home.facts = {}, {}, {}
        home.moving, home.leaving, home.there = False, {}, {}

    # ---- slots with one far copy for all

    def wear_shared(self, home: Tenancy) -> None:
        """Lets a tenancy see the present value of slots that live at the server."""
        for slot, spec in home.specs.items():
            if spec.home == "server":
                for name in (slot, *moments(slot)):
                    if name in self.shared.values:
                        home.slots.values[name] = select(
                            self.shared.values[name], FAR, home.slots.place
                        )

    def return_shared(self, home: Tenancy) -> None:
        """Writes what a tenancy changed in such slots back to the one copy, if it is finite."""
        for slot, spec in home.specs.items():
            if spec.home == "server":
                for name in (slot, *moments(slot)):
                    if name in home.slots.values:
                        mine = home.slots.values[name]
                        refuse_odd(home.client, {f"slot/{name}/{k}": v for k, v in mine.items()})
                        held = self.shared.values.get(name, {})
                        self.shared.values[name] = {**held, **mine}

    def _placer(self, seat: Seat) -> Callable[[str], Place]:
        return lambda name: self.body(seat).place(name, seat)

    def _everywhere(self, name: str) -> Place:
        return replace(self.backbone.place(name, uncut(self.backbone.depth)), side="far")
