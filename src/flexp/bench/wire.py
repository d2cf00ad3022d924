"""Bytes of a step by wire, what rounding does to a client's gradient, what packing takes (S7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import get_args

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from flexp.bench.clock import in_turns
from flexp.bench.job import Job, Scale, at_work, step
from flexp.bench.machine import Machine
from flexp.bench.rows import Gate, Row
from flexp.link.wire import Wire, pack, unpack
from flexp.model.backbone import Backbone
from flexp.model.cut import Seat
from flexp.selection import ALL, FAR, Where
from flexp.tensors import Tensors

WIRES: tuple[Wire, ...] = get_args(Wire)
EPOCHS, BATCHES = 3, 2
CACHE = 64 << 20  # bytes of hidden states, more than there are
CROSS = 4  # tensors in a step: hidden state and gradient, at both cuts


def wire(scale: Scale, machine: Machine) -> list[Row]:
    """Every wire against fp32, then int8 with a client that does not train, then the codec."""
    del machine
    job = scale.job
    body = job.backbone("fp32")
    found = {w: measured(job, body, w) for w in WIRES}
    plain, exact = found["fp32"]
    rows: list[Row] = []
    for w in WIRES[1:]:
        size, gradient = found[w]
        off = 1 - cosine(gradient, exact)
        aim = w == "int8"
        row = Row(
            f"wire.{w}",
            plain / size,
            "×",
            "times fewer bytes per step than fp32, both ways together",
            3.9 if aim else None,
            4 * job.width / (job.width + 2) if aim else None,
            gate=Gate("1 - cosine of the client's gradient with that of fp32", off, 1e-4),
            details={"bytes_per_step": size, "fp32_bytes_per_step": plain, "cosine": 1 - off},
        )
        rows.append(row)
    return [*rows, still(job, body), codec(scale, body)]


def measured(job: Job, body: Backbone, w: Wire) -> tuple[int, Tensors]:
    """Bytes that cross for a gradient, and the near part of that gradient."""
    batch, where = job.batch(), {"personal": ALL}
    with at_work(job, body, wire=w, adapter=job.adapted(body)) as place:
        desk, ledger = place.desk, place.ledger
        _ = desk.model.near["personal"]  # what is offered crosses at its first use
        before = ledger.sent + ledger.received
        with desk.model.training(where, None):
            desk.grad(desk.model.loss(batch), ["personal"], ["personal@g"])
        return ledger.sent + ledger.received - before, dict(desk.model.near["personal@g"])


def cosine(a: Tensors, b: Tensors) -> float:
    """Of two gradients."""
    flat = [torch.cat([held[k].double().flatten() for k in sorted(a)]) for held in (a, b)]
    return float(cosine_similarity(*flat, dim=0))


def still(job: Job, body: Backbone) -> Row:
    """Bytes of three epochs in fp32 against int8 where nothing of the client trains.

    The server has the head, so a step in fp32 is a hidden state up and a gradient down.
    """
    small = replace(job, rows=1, length=min(32, job.length))
    plain, _ = epochs(small, body, "fp32", ALL)
    often, wanted = epochs(small, body, "int8", FAR)
    frozen, found = epochs(small, body, "int8", FAR, cache=CACHE)
    off = max(float((found[k] - v).abs().max()) for k, v in wanted.items())
    return Row(
        "wire.frozen",
        plain / frozen,
        "×",
        f"times fewer bytes over {EPOCHS} epochs than fp32, with int8 and a client without adapter",
        20.0,
        24.0,
        gate=Gate("the adapter differs from that of rows that are sent in every epoch", off, 0.0),
        details={
            "fp32_bytes": plain,
            "int8_bytes": frozen,
            "int8_bytes_sent_in_every_epoch": often,
            "epochs": EPOCHS,
        },
    )


def epochs(
    job: Job, body: Backbone, w: Wire, where: Where, *, cache: int = 0
) -> tuple[int, Tensors]:
    """Bytes that cross in some epochs over the same batches, and the adapter after them."""
    batches = [job.batch(n) for n in range(BATCHES)]
    with at_work(job, body, wire=w, seat=Seat(job.seat.cut, "loss"), cache=cache) as place:
        before = place.ledger.sent + place.ledger.received
        for _ in range(EPOCHS):
            step(place.desk, *batches, train=where)
        return place.ledger.sent + place.ledger.received - before, place.desk.whole()


def codec(scale: Scale, body: Backbone) -> Row:
    """What packing and unpacking takes of a step."""
    job = scale.job
    stream = torch.Generator().manual_seed(0)
    hidden = torch.randn(job.rows, job.length, job.width, generator=stream)
    with at_work(job, body, wire="int8") as place:
        works = {
            "codec": partial(both_ways, [hidden] * CROSS),
            "step": partial(step, place.desk, job.batch()),
        }
        took = in_turns(works, scale.rounds)
    return Row(
        "wire.codec",
        100 * took["codec"].over(took["step"]),
        "%",
        "of the processor time of an fp32 step: packing and unpacking all that crosses as int8",
        0.5,
        better="lower",
        details={"cpu_ms": round(1e3 * took["codec"].seconds, 3)},
    )


def both_ways(tensors: Sequence[Tensor]) -> None:
    """Packs and unpacks."""
    for tensor in tensors:
        unpack(pack(tensor, "int8"), "int8", tensor.dtype)
