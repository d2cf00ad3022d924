"""Devices of one server that compute and send side by side, against one after another (S9)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from flexp.bench.clock import Work, in_turns
from flexp.bench.job import Job, Scale
from flexp.bench.machine import Machine
from flexp.bench.rows import Gate, Row
from flexp.bench.server import STEP, Server
from flexp.bench.tenants import CLOSE, apart, spread
from flexp.model.backbone import Backbone
from flexp.threads import adopt

MOST_ROUNDS = 5
STEPS = 8  # of each device side by side; in turn one is enough


@dataclass(frozen=True)
class Devices:
    """Emulated devices: seconds that parts of a step take there; ``rate`` in bits per second."""

    count: int = 8
    front: float = 0.060
    tail: float = 0.040
    back_tail: float = 0.060
    back_front: float = 0.090
    trip: float = 0.040
    rate: float = 50e6

    def crosses(self, tensor: Tensor) -> None:
        """Half of a trip, with that tensor on board."""
        time.sleep(self.trip / 2 + 8 * tensor.nbytes / self.rate)

    @property
    def told(self) -> str:
        """These devices, for people."""
        compute = self.front + self.tail, self.back_tail + self.back_front
        forward, backward = (round(1e3 * seconds) for seconds in compute)
        return (
            f"{self.count} devices ({forward} + {backward} ms of their own, "
            f"{self.trip * 1e3:.0f} ms there and back, {self.rate / 1e6:.0f} Mbit/s)"
        )


def overlap(scale: Scale, machine: Machine) -> list[Row]:
    """Real work of a server; its devices sleep for as long as they would compute and send."""
    small = scale.rounds == 1
    devices = Devices(2, *(0.002,) * 5) if small else Devices()
    body = scale.job.backbone(machine.faster)
    gate = Gate("joint gradients off those alone in fp32, relative", apart(scale.job), CLOSE)
    with closing(Fleet(scale.job, body, devices)) as fleet:
        works: dict[str, Work] = {
            "one": partial(fleet.play, [0], STEPS),
            "turns": lambda: [fleet.play([n], 1) for n in range(devices.count)],
            "beside": partial(fleet.play, range(devices.count), STEPS),
        }
        took = in_turns(works, min(MOST_ROUNDS, scale.rounds))
    one, turns, beside = (took[name] for name in works)
    bounds = list(map(max, beside.cpu, one.wall))
    over = [wall / bound for wall, bound in zip(beside.wall, bounds, strict=True)]
    times = [STEPS * a / b for a, b in zip(turns.wall, beside.wall, strict=True)]
    details = {
        "tokens": fleet.tokens,
        "steps": STEPS,
        "wall_seconds": {name: round(held.wall_seconds, 3) for name, held in took.items()},
        "server_seconds": {name: round(held.seconds, 3) for name, held in took.items()},
        "spread": [round(min(over), 3), round(max(over), 3)],
        "spread_of_times": [round(min(times), 3), round(max(times), 3)],
    }
    bound, against = "times the longer of server's work and slowest device's way", devices.told
    ratio = f"times as fast as one after another, {against}"
    once, often = statistics.median(over), statistics.median(times)
    return [
        Row("overlap.bound", once, "×", f"{bound}, {against}", 1.15, 1.0, "lower", gate, details),
        Row("overlap.turns", often, "×", ratio, 5.5, 7.0, "higher", gate),
    ]


class Fleet:
    """Devices of one server that computes together what waits; one row of 64 tokens each."""

    def __init__(self, job: Job, body: Backbone, devices: Devices) -> None:
        self.devices, self.tokens = devices, min(64, job.length)
        self.server = Server(job, body, job.adapted(body), partial(spread, job), together=True)
        self.drawn = [self.server.drawn(n, 1, self.tokens) for n in range(devices.count)]
        self.steps = [0] * devices.count
        self.threads = ThreadPoolExecutor(devices.count, initializer=adopt)
        for n in range(devices.count):
            self.server.sits(n)

    def play(self, who: Sequence[int], steps: int) -> None:
        """So many steps of these devices, side by side, at each one's own pace."""
        list(self.threads.map(partial(self._device, count=steps), who))

    def _device(self, n: int, count: int) -> None:
        devices, (hidden, slope) = self.devices, self.drawn[n]
        for _ in range(count):
            self.steps[n] += 1
            step = self.steps[n]
            time.sleep(devices.front)
            devices.crosses(hidden)
            out = self.server.forward(n, step, hidden, STEP if step > 1 else ())
            devices.crosses(out)
            time.sleep(devices.tail + devices.back_tail)
            devices.crosses(slope)
            devices.crosses(self.server.backward(n, step, slope))
            time.sleep(devices.back_front)

    def close(self) -> None:
        """Ends threads and server."""
        self.threads.shutdown()
        self.server.close()
