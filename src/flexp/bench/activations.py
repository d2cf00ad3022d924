"""What running blocks again in the backward saves in memory, and costs in time (S10)."""

from __future__ import annotations

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


def activations(scale: Scale, machine: Machine) -> list[Row]:
    """All blocks forward and backward, with and without ``recompute``, in fp32."""
    del machine
    job, body = scale.job, scale.job.backbone("fp32")
    batch, seat = job.batch(), uncut(job.depth)
    slope = torch.randn(job.rows, job.length, job.width, generator=torch.Generator().manual_seed(0))
    adapter = job.adapted(body)
    with (
        at_work(job, body, seat=seat, adapter=adapter) as kept,
        at_work(job, body, seat=replace(seat, recompute=True), adapter=adapter) as again,
    ):
        works = {
            "kept": partial(descend, kept.desk, batch, slope),
            "again": partial(descend, again.desk, batch, slope),
        }
        took = in_turns(works, scale.rounds)
        bytes_ = {n: held(place.desk, batch) for n, place in (("kept", kept), ("again", again))}
        exact, found = (descend(place.desk, batch, slope) for place in (kept, again))
    worst = max(float((exact[k] - found[k]).abs().max()) for k in exact)
    gate = Gate("the gradients differ", worst if exact.keys() == found.keys() else 1.0, 0.0)
    time = took["again"].over(took["kept"])
    details: dict[str, Any] = {
        "mib": {n: round(size / 2**20, 2) for n, size in bytes_.items()},
        "cpu_seconds": {n: round(took[n].seconds, 4) for n in works},
        "spread": {"time": took["again"].spread(took["kept"])},
    }
    saved = "times fewer bytes kept for the backward, with blocks that run again"
    longer = "times the processor time, with blocks that run again"
    less = bytes_["kept"] / bytes_["again"]
    return [
        Row("activations.bytes", less, "×", saved, 16.0, gate=gate, details=details),
        Row("activations.time", time, "×", longer, 1.35, 1.27, "lower", gate, details),
    ]


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
