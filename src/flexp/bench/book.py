"""All benchmarks by name, and the one document that comes of running them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flexp.bench import machine as machines
from flexp.bench.activations import activations
from flexp.bench.anatomy import anatomy
from flexp.bench.client import client
from flexp.bench.job import FULL, Scale
from flexp.bench.machine import Machine
from flexp.bench.memory import memory
from flexp.bench.merge import merge
from flexp.bench.overlap import overlap
from flexp.bench.roofline import roofline
from flexp.bench.rows import Row
from flexp.bench.simulate import simulate
from flexp.bench.start import start
from flexp.bench.tenants import tenants
from flexp.bench.wire import wire
from flexp.errors import FlexpError, nearest

Bench = Callable[[Scale, Machine], list[Row]]

BOOK: Mapping[str, tuple[str, Bench]] = {
    "roofline": ("a training step against the GEMM peak of this machine", roofline),
    "anatomy": ("where a training step goes, part by part", anatomy),
    "tenants": ("rows of many clients in one pass of the server", tenants),
    "overlap": ("devices of one server side by side, against one after another", overlap),
    "memory": ("a server's memory per further client", memory),
    "wire": ("bytes of a step, and what rounding does to a gradient", wire),
    "client": ("a client that trains its last block, or nothing", client),
    "activations": ("memory saved, and time taken, by running blocks again", activations),
    "start": ("processor seconds until the first step, against plain PEFT", start),
    "merge": ("averaging 1,000 adapters", merge),
    "simulate": ("what of whole rounds is spent inside the model", simulate),
}


def listing() -> list[dict[str, str]]:
    """Every benchmark and what it measures."""
    return [{"name": name, "what": what} for name, (what, _) in BOOK.items()]


def chosen(name: str) -> list[str]:
    """The names that are asked for; FlexpError for one that is not there."""
    if name == "all":
        return list(BOOK)
    if name not in BOOK:
        raise FlexpError(
            f'There is no benchmark "{name}". {nearest(name, list(BOOK))} '
            f"All: {', '.join(BOOK)}; or all of them with: all"
        )
    return [name]


def bench(
    names: Sequence[str], scale: Scale = FULL, *, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Runs benchmarks on one thread: their rows, with the machine as it was measured first."""
    load = [round(n, 2) for n in os.getloadavg()] if hasattr(os, "getloadavg") else []
    began = time.monotonic()
    machine = machines.measured(scale.rounds)
    rows: list[dict[str, Any]] = []
    for name in names:
        at = time.monotonic()
        rows += [row.plain(machine) for row in BOOK[name][1](scale, machine)]
        say(f"{name}: {time.monotonic() - at:.0f} s")
    return {
        "job": scale.job.told,
        "load": load,
        "seconds": round(time.monotonic() - began, 1),
        "rows": rows,
    }
