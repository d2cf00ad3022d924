"""From the plan of a recipe to devices, a server, limits and aims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from flexp.errors import PlanError
from flexp.plan.aims import Aims
from flexp.plan.costs import Form
from flexp.plan.devices import Device, Server, parse_bytes
from flexp.plan.options import Limits
from flexp.plan.profiles import profile
from flexp.recipe import DeviceRecipe, PlanRecipe

HERE = "this machine"
FORMS: Mapping[str, Form] = {"keep": "u", "logits": "logits", "loss": "loss"}  # by labels


def limits_of(asked: PlanRecipe, blocks: int) -> Limits:
    """What a recipe's cuts must keep to."""
    keep = asked.labels == "keep"
    back = max(asked.min_back, 1 if keep and blocks > asked.min_front + 1 else 0)
    return Limits(
        asked.min_front,
        asked.max_depth,
        asked.min_back,
        asked.static or (asked.min_front, back),
        FORMS[asked.labels],
    )


def aims_of(asked: PlanRecipe) -> Aims:
    """What a recipe's plan is to be good at."""
    return Aims(**asked.weights, measured=asked.accuracy)


def device_of(d: DeviceRecipe, dtype: str) -> Device:
    """A recipe's device: what is declared, else its profile's. PlanError names device and field."""
    base = None if d.profile is None else profile(d.profile).device(d.name, dtype)
    name = d.name or (base.name if base else "")
    if not name:
        raise PlanError("plan.devices: a device has no name. Give name, or profile.")
    if d.memory is not None:
        try:
            memory = parse_bytes(d.memory)
        except PlanError as problem:
            raise PlanError(f'Device "{name}", memory: {problem}') from problem
    elif base is not None:
        memory = base.memory
    else:
        raise PlanError(f'Device "{name}" has no memory. Give memory, or profile.')
    base = base or Device(name, memory)
    speeds = {
        field: value * unit
        for field, value, unit in (
            ("flops", d.gflops, 1e9),
            ("uplink", d.up_mbit, 1e6 / 8),
            ("downlink", d.down_mbit, 1e6 / 8),
            ("latency", d.latency_ms, 1e-3),
        )
        if value is not None
    }
    return replace(base, memory=memory, **speeds)


def server_of(asked: PlanRecipe, dtype: str = "float32") -> Server:
    """What a recipe knows of its server."""
    d = asked.server
    if d is None:
        return Server()
    base = None if d.profile is None else device_of(d, dtype)
    memory = parse_bytes(d.memory) if d.memory is not None else base.memory if base else None
    flops = d.gflops * 1e9 if d.gflops is not None else base.flops if base else None
    return Server(flops, memory)


def devices_of(
    asked: PlanRecipe, clients: Sequence[str], dtype: str = "float32"
) -> dict[str, Device]:
    """What every client runs on; PlanError if a device is named that the recipe does not have.

    ``dtype`` is that of the backbone: profiles are faster in some.
    """
    kinds: dict[str, Device] = {}
    for d in asked.devices:
        device = device_of(d, dtype)
        if device.name in kinds:
            raise PlanError(f'plan.devices: there are two "{device.name}". Give one another name.')
        kinds[device.name] = device
    if not kinds:
        return {c: Device(HERE, 1 << 60) for c in clients}
    names = list(kinds)
    out: dict[str, Device] = {}
    for n, client in enumerate(sorted(clients)):
        name = asked.assign.get(client, names[n % len(names)])
        if name not in kinds:
            raise PlanError(
                f'plan.assign: there is no device "{name}". Devices: {", ".join(names)}.'
            )
        slow = asked.slow.get(client, 1.0)
        out[client] = kinds[name] if slow == 1 else kinds[name].slowed(slow)
    return out
