"""The simulated clock: how long a run would take on the devices that its recipe declares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby

from flexp.plan.devices import Device


@dataclass(frozen=True)
class Work:
    """What one client's turn took: operations near and far, bytes each way, messages."""

    round: int
    wave: int
    client: str
    near_flops: int
    far_flops: int
    sent: int
    received: int
    messages: int


def turn_seconds(work: Work, device: Device, server: float | None) -> float | None:
    """Seconds of a turn, nothing overlapping; None if a speed that it needs is not declared.

    ``server`` is the server's speed in floating point operations per second.
    """
    if device.flops is None or (work.far_flops and server is None):
        return None
    crosses = work.sent + work.received
    if crosses and (device.uplink is None or device.downlink is None):
        return None
    far = work.far_flops / server if server else 0.0
    if not crosses:
        return work.near_flops / device.flops
    up, down = work.sent / (device.uplink or 1.0), work.received / (device.downlink or 1.0)
    return work.near_flops / device.flops + far + up + down + work.messages * device.latency


def run_seconds(
    turns: Iterable[Work], devices: Mapping[str, Device], server: float | None
) -> float | None:
    """Seconds of a run: waves one after another, the clients of a wave side by side.

    A wave takes as long as its slowest client, and at least as long as the server needs for all of
    it together. None if any turn's time is not known.
    """
    total = 0.0
    for _, group in groupby(turns, key=lambda w: (w.round, w.wave)):
        wave = list(group)
        found = [turn_seconds(w, devices[w.client], server) for w in wave]
        known = [seconds for seconds in found if seconds is not None]
        if len(known) < len(wave):
            return None
        far = sum(w.far_flops for w in wave) / server if server else 0.0
        total += max(*known, far)
    return total
