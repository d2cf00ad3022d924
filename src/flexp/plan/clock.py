"""The simulated clock: how long work takes on the devices that a recipe declares.

It knows operations, bytes and messages, and never the time of day, so it says the same on any
machine. For one client nothing overlaps: it computes, sends, waits for the server, receives. The
server does one thing after another, so clients of one wave also wait for each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import groupby

from flexp.plan.costs import BlockCosts, Form, crossing_bytes, step_bytes
from flexp.plan.devices import Device
from flexp.plan.work import BlockWork, far_flops, near_flops


@dataclass(frozen=True)
class Load:
    """What a step or a turn takes: operations near and far, bytes each way, messages."""

    near_flops: int
    far_flops: int
    sent: int
    received: int
    messages: int


@dataclass(frozen=True)
class Work:
    """One client's turn. One that failed has what it took until then; an absent client has none."""

    round: int
    wave: int
    client: str
    load: Load


def step_load(
    costs: BlockCosts,
    work: BlockWork,
    cut: tuple[int, int],
    form: Form = "u",
    *,
    recompute: int = 0,
    accumulate: int = 1,
) -> Load:
    """What one training step of one batch takes at a cut: a forward and a backward message a part.

    Parts change how much is held at a time, and how many messages go, and nothing else. Parts that
    are under way together wait for their messages together, so they count once. With
    ``costs.ahead`` a backward and the next forward wait together as well; that a turn's first
    forward has none to wait with, and that anything is computed meanwhile, is not counted.
    """
    front, back = cut
    head_near = form == "u"
    near = near_flops(work, front, back, head_near=head_near, recompute=recompute)
    if head_near and front + back == costs.blocks:
        return Load(near, 0, 0, 0, 0)
    far = far_flops(work, front, back, head_near=head_near)
    hidden, returned = (crossing_bytes(costs, at) for at in (front, costs.blocks - back))
    sent = hidden + {"u": returned, "logits": costs.logits_bytes, "loss": costs.label_bytes}[form]
    both = step_bytes(costs, form, work.first < front, cut)
    waits = -(-max(accumulate, costs.window) // costs.window)
    return Load(near, far, sent, both - sent, waits if costs.ahead else 2 * waits)


def seconds_of(load: Load, device: Device, server: float | None) -> float | None:
    """Seconds of a step or turn, nothing overlapping; None if a speed that it needs is not known.

    ``server`` is the server's speed in floating point operations per second.
    """
    if device.flops is None or (load.far_flops and server is None):
        return None
    crosses = load.sent + load.received
    if crosses and (device.uplink is None or device.downlink is None):
        return None
    far = load.far_flops / server if server else 0.0
    if not crosses:
        return load.near_flops / device.flops
    up, down = load.sent / (device.uplink or 1.0), load.received / (device.downlink or 1.0)
    return load.near_flops / device.flops + far + up + down + load.messages * device.latency


def step_seconds(
    costs: BlockCosts,
    work: BlockWork,
    cut: tuple[int, int],
    device: Device,
    server: float | None,
    *,
    form: Form = "u",
    recompute: int = 0,
    accumulate: int = 1,
) -> float | None:
    """Seconds of one training step of one client at its cut, while the server has no other."""
    load = step_load(costs, work, cut, form, recompute=recompute, accumulate=accumulate)
    return seconds_of(load, device, server)


def run_seconds(
    turns: Iterable[Work], devices: Mapping[str, Device], server: float | None
) -> float | None:
    """Seconds of a run: waves one after another, the clients of a wave side by side.

    A wave ends with its last client; the server answers its messages one by one, as they come. None
    if any turn's time is not known.
    """
    total = 0.0
    for _, group in groupby(turns, key=lambda w: (w.round, w.wave)):
        wave = list(group)
        found = [seconds_of(w.load, devices[w.client], server) for w in wave]
        known = [seconds for seconds in found if seconds is not None]
        if len(known) < len(wave):
            return None
        total += max(*known, _side_by_side(wave, devices, server))
    return total


def _side_by_side(
    wave: Sequence[Work], devices: Mapping[str, Device], server: float | None
) -> float:
    """When the server has answered all messages of a wave and the last answer is there.

    Each turn's work is spread evenly over its messages: the client computes and sends, the server
    takes what has come first, and the client goes on when the answer is back.
    """
    calls = [w for w in wave if w.load.far_flops and w.load.messages]
    if not calls or not server:
        return 0.0
    spans: list[tuple[float, float]] = []  # at the server, and elsewhere, of each message
    for w in calls:
        far = w.load.far_flops / server
        whole = seconds_of(w.load, devices[w.client], server) or far
        spans.append((far / w.load.messages, (whole - far) / w.load.messages))
    # The way back counts with the next message's way there: the sum is the same.
    coming: list[tuple[float, int, int]] = []  # when, whose, and how many there are from then on
    for n, w in enumerate(calls):
        heappush(coming, (spans[n][1], n, w.load.messages))
    free = 0.0
    while coming:
        arrives, n, left = heappop(coming)
        free = max(free, arrives) + spans[n][0]
        if left > 1:
            heappush(coming, (free + spans[n][1], n, left - 1))
    return free


def finish_times(
    turns: Iterable[Work], devices: Mapping[str, Device], server: float | None
) -> list[float] | None:
    """When each turn ends, in the order given, if nobody waits for others (no barrier).

    A client begins its next turn when its last one ends. The server answers one turn after
    another, in the order in which they would end if each had it alone, so no turn ends before the
    server has done its part of all that come before it. None if any turn's time is not known.
    """
    listed, clocks, alone = list(turns), dict[str, float](), list[float]()
    for turn in listed:
        seconds = seconds_of(turn.load, devices[turn.client], server)
        if seconds is None:
            return None
        clocks[turn.client] = clocks.get(turn.client, 0.0) + seconds
        alone.append(clocks[turn.client])
    out, busy = [0.0] * len(listed), 0.0
    for n in sorted(range(len(listed)), key=lambda n: (alone[n], listed[n].client, n)):
        busy += _served([listed[n]], server)
        out[n] = max(alone[n], busy)
    return out


def _served(turns: Iterable[Work], server: float | None) -> float:
    return sum(w.load.far_flops for w in turns) / server if server else 0.0
