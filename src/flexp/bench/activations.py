"""What fused kernels and running blocks again save in memory, and cost in time (S10)."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flexp.bench.clock import in_turns
from flexp.bench.job import Scale, at_work
from flexp.bench.machine import Machine
from flexp.bench.rows import Gate, Row
from flexp.client.desk import Desk
from flexp.data.examples import Batch
from flexp.model.cut import uncut
from flexp.model.meter import Meter
from flexp.selection import ALL
from flexp.tensors import Tensors

CLOSE = 1e-5  # of two gradients, over the largest number of one


def activations(scale: Scale, machine: Machine) -> list[Row]:
    """All blocks forward and backward in fp32: the model's own code and fused kernels, with none,
    the first half or all of them run again.

    Own code that runs again has to give the same gradients to the bit, and so have fused kernels.
    """
    del machine
    job = scale.job
    batch, seat = job.batch(), uncut(job.depth)
    slope = torch.randn(job.rows, job.length, job.width, generator=torch.Generator().manual_seed(0))
    desks: dict[str, Desk] = {}
    with ExitStack() as stack:
        for code, fast in (("own", False), ("fused", True)):
            body = job.backbone("fp32", fast=fast)
            for way, recompute in (
                ("kept", 0),
                ("half again", job.depth // 2),
                ("again", job.depth),
            ):
                sits = replace(seat, recompute=recompute)
                place = at_work(job, body, seat=sits, adapter=job.adapted(body))
                desks[f"{code} {way}"] = stack.enter_context(place).desk
        works = {name: partial(descend, desk, batch, slope) for name, desk in desks.items()}
        took = in_turns(works, scale.rounds)
        sizes = {name: held(desk, batch) for name, desk in desks.items()}
        found = {name: work() for name, work in works.items()}
    twice = [
        (found[f"{code} kept"], found[f"{code}{way} again"])
        for code in ("own", "fused")
        for way in ("", " half")
    ]
    exact = max(apart(*pair) for pair in twice)
    close = apart(found["own kept"], found["fused kept"])
    what = f"gradients that run again differ by {exact}, of fused kernels by {close:.1e} ({CLOSE})"
    gate = Gate(what, max(exact / 1e-30, close / CLOSE), 1.0)
    details: dict[str, Any] = {
        "mib": {n: round(size / 2**20, 2) for n, size in sizes.items()},
        "cpu_seconds": {n: round(took[n].seconds, 4) for n in works},
        "time_of_own": {n: round(took[n].over(took["own kept"]), 3) for n in works},
    }
    rows: list[Row] = []
    for stem, name, how, least, most, limit in (
        ("activations", "fused again", "with blocks that run again", 16.0, 1.35, 1.27),
        ("activations.half", "fused half again", "with half of blocks that do", 3.0, 1.15, 1.14),
    ):
        saved = f"times fewer bytes kept for the backward than by the model's own code, {how}"
        longer = f"times the processor time of the model's own code, {how}"
        less, time = sizes["own kept"] / sizes[name], took[name].over(took["own kept"])
        rows += [
            Row(f"{stem}.bytes", less, "×", saved, least, gate=gate, details=details),
            Row(f"{stem}.time", time, "×", longer, most, limit, "lower", gate, details),
        ]
    return rows


def apart(one: Tensors, other: Tensors) -> float:
    """The largest difference of two gradients, over the largest number there."""
    most = max(float(v.abs().max()) for v in one.values())
    return max(float((one[k] - other[k]).abs().max()) for k in one) / most


def descend(desk: Desk, batch: Batch, slope: Tensor) -> Tensors:
    """All blocks forward and, from a gradient that is given, backward; what comes of it."""
    with desk.model.training({"personal": ALL}, None):
        desk.grad((desk.model.hidden(batch) * slope).sum(), ["personal"], ["personal@g"])
    return dict(desk.model.near["personal@g"])


def held(desk: Desk, batch: Batch) -> int:
    """Bytes that a forward leaves for its backward."""
    with desk.model.training({"personal": ALL}, None), Meter() as meter:
        out = desk.model.hidden(batch)
        size = meter.live
        del out
    desk.model.leaves = type(desk.model.leaves)()
    return size
