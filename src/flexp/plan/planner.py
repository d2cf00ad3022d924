"""Chooses each client's cut: a pure function of costs, devices and limits.

Called again with other devices it plans anew; it remembers nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Literal

import torch

from flexp.errors import PlanError
from flexp.plan.aims import Aims
from flexp.plan.costs import BlockCosts
from flexp.plan.devices import Device, Server, format_bytes
from flexp.plan.options import Limits, Option, fitting, trunk_bytes
from flexp.plan.prices import Item, Shared
from flexp.plan.reasons import Problem, how, problem_of, server_full, too_small, why
from flexp.plan.search import best
from flexp.plan.work import BlockWork

Goal = Literal["optimized", "memory_only", "static", "random"]
SCALE = 10**12  # scores are whole numbers: of equal plans, the order of a sum must not decide
ROOM = 1 << 24  # for near blocks, below a score


@dataclass(frozen=True)
class Choice:
    """A client's cut and how it trains there, the bytes and seconds of a step, and why.

    A batch goes in ``accumulate`` parts; the first ``recompute`` blocks compute activations again
    instead of keeping them. ``seconds`` is None where a speed is not known.
    """

    front: int
    back: int
    bytes: int
    reason: str
    accumulate: int = 1
    recompute: int = 0
    seconds: float | None = None


def plan(
    costs: BlockCosts,
    devices: Mapping[str, Device],
    limits: Limits,
    goal: Goal = "memory_only",
    generator: torch.Generator | None = None,
    *,
    work: BlockWork | None = None,
    server: Server = Server(),  # noqa: B008 frozen
    aims: Aims = Aims(),  # noqa: B008 frozen
) -> dict[str, Choice]:
    """A cut for every client, by name of the client.

    ``optimized``: the fleet's best by ``aims``, of all cuts, parts of a batch and recomputation
    that fit. ``memory_only``: as many blocks as fit, about a third of them at the back. ``static``:
    the same cut for all. ``random``: any cut that fits, drawn from ``generator`` in order of the
    clients' names. The last three recompute, and take a batch in parts, only where nothing fits
    without. PlanError where a device cannot hold even the smallest cut, or the goal's.
    """
    problem = problem_of(costs, devices, limits, work, server)
    if goal == "optimized":
        chosen = optimized(problem, aims)
    else:
        chosen = {c: _alone(problem, c, goal, generator) for c in sorted(devices)}
    return {client: chosen[client] for client in devices}


def default_goal(devices: Mapping[str, Device], server: Server) -> Goal:
    """``optimized`` where all speeds are known, else ``memory_only``."""
    timed = all(d.timed for d in devices.values()) and server.flops is not None
    return "optimized" if timed else "memory_only"


# ---- each client for itself


def _alone(problem: Problem, client: str, goal: Goal, generator: torch.Generator | None) -> Choice:
    limits, device = problem.limits, problem.devices[client]
    wanted = problem.options
    if goal == "static":
        wanted = [o for o in problem.options if o.cut == limits.static]
        if not wanted:
            raise PlanError(
                f"plan.static is {limits.static}, which the other limits forbid. "
                f"Choose a front of at least {limits.min_front}, a back of at least "
                f"{limits.min_back}, and together at most {limits.deepest(problem.costs.blocks)}."
            )
    fits = fitting(wanted, device.memory)
    if not fits:
        raise PlanError(too_small(problem, client, wanted))
    # The variants come from what costs least time on: the first that fits anything.
    first = min((o.quarters, o.accumulate) for o in fits)
    fits = [o for o in fits if (o.quarters, o.accumulate) == first]
    option, more = fits[0], ""
    if goal == "static":
        more = "the same cut for every client"
    elif goal == "random":
        if generator is None:
            raise PlanError("The goal random needs a generator. Pass one, as of a named dice.")
        option = fits[int(torch.randint(len(fits), (1,), generator=generator))]
        more = f"drawn from {len(fits)} cuts that fit"
    reason = (
        f"{option.depth} of {problem.costs.blocks} blocks fit into {format_bytes(device.memory)} "
        f"(needs {format_bytes(option.bytes)})"
    )
    parts = [reason, *how(problem, option), *([more] if more else [])]
    return choice(problem, option, device, "; ".join(parts))


def choice(problem: Problem, option: Option, device: Device, reason: str) -> Choice:
    """An option as what was chosen."""
    return Choice(
        *option.cut,
        option.bytes,
        reason,
        option.accumulate,
        option.recompute,
        problem.seconds(option, device),
    )


# ---- all clients together


def optimized(problem: Problem, aims: Aims) -> dict[str, Choice]:
    """The fleet's best plan by its aims; PlanError if a speed is missing or nothing fits."""
    clients = sorted(problem.devices)
    menus = _timed(problem, clients)
    slowest = max(s for options in menus.values() for _, s in options)
    items: dict[Device, list[Item]] = {}
    for client in clients:
        device = problem.devices[client]
        if device not in items:
            items[device] = [
                Item(
                    seconds,
                    0 if o.load is None else o.load.far_flops,
                    o.server_bytes,
                    score(problem, aims, o, seconds / slowest, o.bytes / device.memory),
                    n,
                )
                for n, (o, seconds) in enumerate(menus[device])
                if o.bytes <= device.memory
            ]
        if not items[device]:
            raise PlanError(too_small(problem, client, problem.options))
    shared = _shared(problem, aims, len(clients), slowest)
    found = best([items[problem.devices[c]] for c in clients], shared)
    if found is None:
        raise PlanError(server_full(problem, [items[problem.devices[c]] for c in clients]))
    out: dict[str, Choice] = {}
    for client, n in zip(clients, found, strict=True):
        device = problem.devices[client]
        option, seconds = menus[device][n]
        out[client] = choice(problem, option, device, why(problem, device, option, seconds))
    return out


def score(problem: Problem, aims: Aims, option: Option, time: float, memory: float) -> int:
    """What one client's option is worth, as a whole number; fewer near blocks decide a tie.

    ``time`` and ``memory`` are fractions: of the slowest option, and of the device.
    """
    accuracy = aims.accuracy_at(option.depth / problem.costs.blocks)
    worth = aims.accuracy * accuracy - aims.time / 2 * time - aims.memory * memory
    return round(SCALE * worth) * ROOM - option.depth


def _shared(problem: Problem, aims: Aims, clients: int, slowest: float) -> Shared:
    """The server, and what a round costs: every client waits for it."""
    memory = problem.server.memory
    free = None if memory is None else memory - trunk_bytes(problem.costs, problem.limits)

    weight = SCALE * clients * aims.time / 2 / slowest
    return Shared(problem.server.flops or 1.0, free, weight, ROOM)


def _timed(problem: Problem, clients: Sequence[str]) -> dict[Device, list[tuple[Option, float]]]:
    """Every option with its seconds on each device; PlanError for the first that is not known."""
    if problem.work is None:
        raise PlanError("The goal optimized needs the work of blocks. Pass work.")
    out: dict[Device, list[tuple[Option, float]]] = {}
    for client in clients:
        device = problem.devices[client]
        if device in out:
            continue
        held: list[tuple[Option, float]] = []
        for option in problem.options:
            seconds = problem.seconds(option, device)
            if seconds is None or not isfinite(seconds):
                what = "server" if device.timed else f'device "{device.name}"'
                keys = "gflops" if device.timed else "gflops, up_mbit and down_mbit"
                raise PlanError(
                    f"The goal optimized weighs time, but the speed of the {what} is not known. "
                    f"Declare {keys} there, or a profile; or choose goal: memory_only."
                )
            held.append((option, seconds))
        out[device] = held
    return out
