"""What a plan follows from, and what people are told: why a cut was chosen, or what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flexp.plan.clock import seconds_of
from flexp.plan.costs import BlockCosts
from flexp.plan.devices import Device, Server, format_bytes, format_seconds
from flexp.plan.options import Limits, Option, fitting, menu, trunk_bytes
from flexp.plan.prices import Item
from flexp.plan.work import BlockWork


@dataclass(frozen=True)
class Problem:
    """Everything that a plan follows from."""

    costs: BlockCosts
    devices: Mapping[str, Device]
    limits: Limits
    work: BlockWork | None
    server: Server
    options: Sequence[Option]

    def seconds(self, option: Option, device: Device) -> float | None:
        """Of one step, if all speeds are known."""
        if option.load is None:
            return None
        return seconds_of(option.load, device, self.server.flops)


def problem_of(
    costs: BlockCosts,
    devices: Mapping[str, Device],
    limits: Limits,
    work: BlockWork | None,
    server: Server,
) -> Problem:
    """The problem with all its options."""
    return Problem(costs, devices, limits, work, server, menu(costs, work, limits))


def how(problem: Problem, option: Option) -> list[str]:
    """How a client trains, if not on a part of the model, a whole batch at a time, all kept."""
    out: list[str] = []
    if problem.limits.head_near and option.depth == problem.costs.blocks:
        out.append("the whole model, so it learns from others only by a method that uploads")
    if option.accumulate > 1:
        rows = -(-problem.costs.batch // option.accumulate)
        out.append(f"{rows} of {problem.costs.batch} rows at a time")
    if option.recompute:
        which = "" if option.recompute == option.depth else f" of {option.recompute} blocks"
        out.append(f"activations{which} are computed again, not kept")
    return out


def too_small(problem: Problem, client: str, wanted: Sequence[Option]) -> str:
    """What a device lacks for the least of some options, and which of the fleet's would do."""
    device = problem.devices[client]
    least = min(wanted, key=lambda o: (o.bytes, o.depth))
    missing = least.bytes - device.memory
    able = [d for d in problem.devices.values() if d.memory >= least.bytes]
    smallest = min(able, key=lambda d: (d.memory, d.name)) if able else None
    hint = f'; of these devices the smallest that would do is "{smallest.name}"' if smallest else ""
    way = "".join(f", {one}" for one in how(problem, least))
    return (
        f'Client "{client}" on "{device.name}" has {format_bytes(device.memory)} '
        f"({device.memory} bytes), but a front of {least.cut[0]} and a back of {least.cut[1]} "
        f"blocks need {format_bytes(least.bytes)} ({least.bytes} bytes{way}): "
        f"{format_bytes(missing)} are missing. A device with {least.bytes} bytes would do{hint}. "
        "Or choose a smaller batch, shorter rows or a smaller model."
    )


def server_full(problem: Problem, lists: Sequence[Sequence[Item]]) -> str:
    """What a server lacks for all clients at the cuts that leave it least."""
    frozen = trunk_bytes(problem.costs, problem.limits)
    least = frozen + sum(min(i.held for i in items) for items in lists)
    memory = problem.server.memory or 0
    return (
        f"The server has {format_bytes(memory)} ({memory} bytes), but its blocks and "
        f"{len(lists)} clients at their deepest cuts need {format_bytes(least)} ({least} bytes): "
        f"{format_bytes(least - memory)} are missing. Give plan.server more memory, the clients "
        "larger devices, or take fewer clients."
    )


def why(problem: Problem, device: Device, option: Option, seconds: float) -> str:
    """What a device's owner should know: what it takes, and what kept it from more or less."""
    blocks, limits = problem.costs.blocks, problem.limits
    out = [
        f"{option.depth} of {blocks} blocks, {format_bytes(option.bytes)} of "
        f"{format_bytes(device.memory)}, {format_seconds(seconds)} a step",
        *how(problem, option),
    ]
    deeper = [o for o in problem.options if o.depth > option.depth]
    fits = fitting(deeper, device.memory)
    if option.depth == sum(limits.floor):
        out.append("no fewer are allowed")
    if not deeper:
        out.append("no more are allowed")
    elif not fits:
        least = min(o.bytes for o in deeper)
        out.append(f"memory is the limit, one more needs {format_bytes(least)}")
    else:
        quickest = min(problem.seconds(o, device) or 0.0 for o in fits)
        limit = "more would fit, but "
        limit += (
            f"a step would take {format_seconds(quickest)}"
            if quickest > seconds
            else "would not be worth it"
        )
        out.append(limit)
    return "; ".join(out)
