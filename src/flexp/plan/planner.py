"""Chooses each client's cut: a pure function of costs, devices and limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from flexp.errors import PlanError
from flexp.plan.costs import BlockCosts, near_bytes
from flexp.plan.devices import Device, format_bytes

Goal = Literal["memory_only", "static", "random"]
Cut = tuple[int, int]


@dataclass(frozen=True)
class Limits:
    """What every cut of a plan must keep to.

    ``max_depth`` is the largest front + back (None: all blocks), ``static`` the cut of the goal
    ``static``. With ``head_near`` False the server has the head, so ``back`` is 0.
    """

    min_front: int = 1
    max_depth: int | None = None
    min_back: int = 0
    static: Cut = (1, 0)
    head_near: bool = True


@dataclass(frozen=True)
class Choice:
    """A client's cut, the bytes that it needs there, and why it was chosen."""

    front: int
    back: int
    bytes: int
    reason: str


def plan(
    costs: BlockCosts,
    devices: Mapping[str, Device],
    limits: Limits,
    goal: Goal = "memory_only",
    generator: torch.Generator | None = None,
) -> dict[str, Choice]:
    """A cut for every client, by name of the client.

    ``memory_only``: as many blocks as fit, about a third of them at the back. ``static``: the same
    cut for all. ``random``: any cut that fits, drawn from ``generator`` in order of the clients'
    names. PlanError where a device cannot hold even the smallest cut, or the goal's.
    """
    cuts = _legal(costs, limits)
    if goal == "random" and generator is None:
        raise PlanError("The goal random needs a generator. Pass one, as of a named dice.")
    choices: dict[str, Choice] = {}
    for client in sorted(devices):
        device = devices[client]
        if goal == "static":
            cut = limits.static
            if cut not in cuts:
                raise PlanError(
                    f"plan.static is {cut}, which the other limits forbid. "
                    f"Choose a front of at least {limits.min_front}, a back of at least "
                    f"{limits.min_back}, and together at most {_deepest(costs, limits)}."
                )
            _check_fit(costs, cut, client, devices, limits)
            why = "the same cut for every client"
        else:
            _check_fit(costs, (limits.min_front, limits.min_back), client, devices, limits)
            fitting = [c for c in cuts if _needed(costs, c, limits) <= device.memory]
            cut, why = fitting[0], ""
            if goal == "random" and generator is not None:
                pick = int(torch.randint(len(fitting), (1,), generator=generator))
                cut, why = fitting[pick], f"drawn from {len(fitting)} cuts that fit"
        choices[client] = _choice(costs, cut, device, limits, why)
    return {client: choices[client] for client in devices}


def _deepest(costs: BlockCosts, limits: Limits) -> int:
    return costs.blocks if limits.max_depth is None else limits.max_depth


def _legal(costs: BlockCosts, limits: Limits) -> list[Cut]:
    """All cuts within the limits: deepest first, then the back nearest to a third of the depth."""
    deepest = _deepest(costs, limits)
    if deepest > costs.blocks:
        raise PlanError(
            f"plan.max_depth is {deepest}, but the model has {costs.blocks} blocks. "
            f"Set it to {costs.blocks} or less."
        )
    if limits.min_back > 0 and not limits.head_near:
        raise PlanError(
            f"plan.min_back is {limits.min_back}, but with shared labels the server has the head. "
            "Set it to 0, or keep the labels."
        )
    if min(limits.min_front, limits.min_back) < 0 or limits.min_front + limits.min_back > deepest:
        raise PlanError(
            f"No cut has a front of at least {limits.min_front}, a back of at least "
            f"{limits.min_back} and at most {deepest} blocks. "
            "Lower plan.min_front or plan.min_back, or raise plan.max_depth."
        )
    cuts = [
        (depth - back, back)
        for depth in range(deepest + 1)
        for back in range(limits.min_back, depth - limits.min_front + 1)
        if limits.head_near or back == 0
    ]
    return sorted(cuts, key=lambda cut: (-sum(cut), abs(cut[1] - sum(cut) // 3), cut[1]))


def _needed(costs: BlockCosts, cut: Cut, limits: Limits) -> int:
    return near_bytes(costs, *cut, head_near=limits.head_near)["total"]


def _check_fit(
    costs: BlockCosts, cut: Cut, client: str, devices: Mapping[str, Device], limits: Limits
) -> None:
    """PlanError if the client's device cannot hold the cut."""
    device, needed = devices[client], _needed(costs, cut, limits)
    if needed <= device.memory:
        return
    able = [d for d in devices.values() if d.memory >= needed]
    smallest = min(able, key=lambda d: (d.memory, d.name)) if able else None
    hint = f'; of these devices the smallest that would do is "{smallest.name}"' if smallest else ""
    raise PlanError(
        f'Client "{client}" on "{device.name}" has {format_bytes(device.memory)} '
        f"({device.memory} bytes), but a front of {cut[0]} and a back of {cut[1]} blocks need "
        f"{format_bytes(needed)} ({needed} bytes). A device with {needed} bytes would do{hint}. "
        "Or choose a smaller batch, shorter rows or a smaller model."
    )


def _choice(costs: BlockCosts, cut: Cut, device: Device, limits: Limits, why: str) -> Choice:
    """The cut with its bytes and a sentence of why."""
    needed = _needed(costs, cut, limits)
    reason = (
        f"{sum(cut)} of {costs.blocks} blocks fit into {format_bytes(device.memory)} "
        f"(needs {format_bytes(needed)})"
    )
    return Choice(*cut, needed, f"{reason}; {why}" if why else reason)
