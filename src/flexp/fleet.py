"""Who sits where, and who is there, round by round: a recipe's changes and its participation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from flexp.errors import PlanError, nearest
from flexp.model.cut import Seat
from flexp.plan.costs import BlockCosts, near_bytes
from flexp.plan.devices import Device, format_bytes
from flexp.plan.work import BlockWork
from flexp.recipe import PlanRecipe, Recipe
from flexp.recipe_clients import ChangeRecipe, ParticipationRecipe
from flexp.seating import Placed, devices_of, packed, place
from flexp.strategies.base import ClientId

BY_CLIENT = ("cuts", "assign", "slow", "ranks")  # of a plan


@dataclass(frozen=True)
class Move:
    """From this round on, a client sits elsewhere."""

    round: int
    client: ClientId
    placed: Placed


@dataclass(frozen=True)
class Fleet:
    """Everybody's place in round 0, who moves when, and who is there; rounds count from 0.

    ``solo``: whether clients may train alone with this method; else who would is just not there.
    """

    placed: Mapping[ClientId, Placed]
    moves: tuple[Move, ...] = ()
    presence: Mapping[ClientId, ParticipationRecipe] = field(
        default_factory=dict[ClientId, ParticipationRecipe]
    )
    solo: bool = True

    def placed_at(self, round: int) -> dict[ClientId, Placed]:
        """Where everybody sits in a round."""
        return {**self.placed, **{m.client: m.placed for m in self.moves if m.round <= round}}

    def seats_at(self, round: int) -> dict[ClientId, Seat]:
        """Everybody's seat in a round."""
        return {client: placed.seat for client, placed in self.placed_at(round).items()}

    def seatings(self) -> list[dict[ClientId, Seat]]:
        """The seats of the beginning, and those after each change."""
        return [self.seats_at(r) for r in sorted({0, *(m.round for m in self.moves)})]

    def present(self, round: int) -> list[ClientId]:
        """Who can be chosen in a round, in order of names."""
        return sorted(c for c in self.placed if self._is(c, round) == "here")

    def alone(self, round: int) -> list[ClientId]:
        """Who trains without the server in a round, in order of names."""
        return sorted(c for c in self.placed if self.solo and self._is(c, round) == "alone")

    def known(self, rounds: int) -> list[ClientId]:
        """Who could take part in one of the first ``rounds`` rounds, or was alone in one."""
        seen = {c for r in range(rounds) for c in (*self.present(r), *self.alone(r))}
        return sorted(seen)

    def _is(self, client: ClientId, round: int) -> str:
        held = self.presence.get(client)
        return "here" if held is None else held.at(round)


def fleet(
    recipe: Recipe,
    sized: Mapping[ClientId, BlockCosts],
    working: Callable[[], BlockWork] | None = None,
    workings: Mapping[ClientId, Callable[[], BlockWork]] | None = None,
) -> Fleet:
    """The fleet of a recipe; PlanError for a client, device or cut that cannot be.

    ``sized`` is what each client's model costs: those with a head or a wire of their own have
    others.
    ``working`` gives the work of blocks, as in ``place``; ``workings`` of clients with a model of
    their own.
    """
    clients, worked = list(sized), {c: (workings or {}).get(c, working) for c in sized}
    for where, named in (
        ("participation", recipe.participation),
        ("link.wires", recipe.link.wires),
    ):
        for client in named:
            if client not in clients:
                raise PlanError(f'{where}: no client "{client}". {nearest(client, clients)}')
    placed = _placed(recipe, recipe.plan, sized, worked)
    moves: list[Move] = []
    plans = [(0, recipe.plan)]
    for change in sorted(recipe.plan.changes, key=lambda c: (c.round, c.client)):
        asked = _changed(plans[-1][1], change, clients)
        there = _placed(recipe, asked, sized, worked)
        moves.append(Move(change.round, change.client, there[change.client]))
        plans.append((change.round, asked))
    for client, held in recipe.participation.items():
        for round in held.alone:
            asked = [plan for since, plan in plans if since <= round][-1]
            _fits_alone(client, devices_of(asked, clients)[client], sized[client], round)
    return Fleet(placed, tuple(moves), dict(recipe.participation))


def packed_costs(
    recipe: Recipe, usual: BlockCosts, own: Mapping[ClientId, BlockCosts]
) -> dict[ClientId, BlockCosts]:
    """The costs of clients with a wire of their own, one object for those that are alike."""
    made, out = dict[tuple[int, str], BlockCosts](), dict[ClientId, BlockCosts]()
    for client, wire in recipe.link.wires.items():
        base = own.get(client, usual)
        if wire != recipe.link.wire:
            key = id(base), wire
            made[key] = made.get(key) or packed(base, recipe, wire)
            out[client] = made[key]
    return out


def _placed(
    recipe: Recipe,
    asked: PlanRecipe,
    sized: Mapping[ClientId, BlockCosts],
    worked: Mapping[ClientId, Callable[[], BlockWork] | None],
) -> dict[ClientId, Placed]:
    """Everybody's place: those planned together who come in the same round and cost the same.

    So nobody who comes later changes where the others sit.
    """
    clients, found = list(sized), dict[ClientId, Placed]()
    joins = {c: held.joins for c, held in recipe.participation.items()}
    groups = dict[tuple[int, int], list[ClientId]]()
    for client in clients:
        groups.setdefault((joins.get(client, 0), id(sized[client])), []).append(client)
    if len(groups) == 1:
        first = clients[0]
        there = recipe.model_copy(update={"plan": asked})
        return place(there, clients, sized[first], worked[first])
    devices = devices_of(asked, clients)
    for some in groups.values():
        kept = {k: {c: v for c, v in getattr(asked, k).items() if c in some} for k in BY_CLIENT}
        if asked.devices:
            kept["assign"] = {c: devices[c].name for c in some}
        plan, cost = asked.model_copy(update=kept), sized[some[0]]
        there = recipe.model_copy(update={"plan": plan})
        found |= place(there, some, cost, worked[some[0]])
    return {c: found[c] for c in clients}


def _changed(asked: PlanRecipe, change: ChangeRecipe, clients: Sequence[ClientId]) -> PlanRecipe:
    """The plan after a change: the others stay as they are."""
    where = f"plan.changes, round {change.round}:"
    if change.client not in clients:
        raise PlanError(f'{where} no client "{change.client}". {nearest(change.client, clients)}')
    devices = [d.name or d.profile or "" for d in asked.devices]
    assign, cuts = dict(asked.assign), dict(asked.cuts)
    if change.device is not None:
        if change.device not in devices:
            hint = nearest(change.device, devices) if devices else "plan.devices has none."
            raise PlanError(f'{where} no device "{change.device}". {hint}')
        assign[change.client] = change.device
    if asked.cut is not None:  # a cut of everybody's would hold for the one that changes as well
        cuts = {client: cuts.get(client, asked.cut) for client in clients}
    if change.cut is None:
        cuts.pop(change.client, None)
    else:
        cuts[change.client] = change.cut
    return asked.model_copy(update={"assign": assign, "cuts": cuts, "cut": None})


def _fits_alone(client: ClientId, device: Device, sized: BlockCosts, round: int) -> None:
    needed = near_bytes(sized, sized.blocks, 0, head_near=True)["total"]
    if needed > device.memory:
        raise PlanError(
            f'participation: client "{client}" cannot be alone in round {round}: the whole model '
            f'needs {format_bytes(needed)}, and "{device.name}" has {format_bytes(device.memory)}, '
            f"{format_bytes(needed - device.memory)} ({needed - device.memory} bytes) too little."
        )
