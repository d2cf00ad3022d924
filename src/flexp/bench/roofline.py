"""The share of what this machine multiplies at most that a real training step reaches (S4)."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch

from flexp.bench.clock import Work, in_turns
from flexp.bench.job import DTYPES, Job, Place, Scale, at_work, step
from flexp.bench.machine import Machine, fastest, gemms, operations
from flexp.bench.rows import Gate, Row
from flexp.data.examples import Batch
from flexp.model.backbone import Backbone
from flexp.model.meter import Meter

WHAT = "share of the GEMM peak, measured in the same run, of a training step through a cut model"
ALIKE = {"fp32": 1e-5, "bf16": 1e-2}  # of two losses
COUNTED = 0.05  # of two counts of operations


def roofline(scale: Scale, machine: Machine) -> list[Row]:
    """Steps of two sizes at two precisions, in turns with products of matrices."""
    del machine
    job = scale.job
    sizes = [job, replace(job, rows=1, length=max(4, job.length // 2))]
    works: dict[str, Work] = {}
    cases: list[tuple[str, str, Job, Gate, int]] = []
    with ExitStack() as stack:
        for dtype in DTYPES:
            body = job.backbone(dtype)
            for size in sizes:
                place = stack.enter_context(at_work(size, body))
                batch = size.batch()
                gate, flops = begun(size, body, place, batch, dtype)
                name = f"{dtype}.{size.rows}x{size.length}"
                works[name] = partial(step, place.desk, batch)
                cases.append((name, dtype, size, gate, flops))
        products = gemms()
        took = in_turns(works | {f"{w} {n}": p for (w, n), p in products.items()}, scale.rounds)
    ways = dict.fromkeys(way for way, _ in products)
    peak: dict[str, float | None] = {
        way: max(operations(n) / took[f"{w} {n}"].seconds for w, n in products if w == way)
        for way in ways
    }
    rows: list[Row] = []
    for name, dtype, size, gate, flops in cases:
        seconds, most = took[name].seconds, fastest(peak, dtype)
        details = {
            "job": size.told,
            "tokens_per_cpu_second": round(size.tokens / seconds, 1),
            "tokens_per_wall_second": round(size.tokens / took[name].wall_seconds, 1),
            "gflops": round(flops / seconds / 1e9, 1),
            "peak_gflops": round(most / 1e9, 1),
            "mflop_per_token": round(flops / size.tokens / 1e6, 1),
            "cpu_seconds": round(seconds, 4),
        }
        target = 75.0 if size is job else 65.0
        share = 100 * flops / seconds / most
        rows.append(
            Row(f"roofline.{name}", share, "%", WHAT, target, 100.0, gate=gate, details=details)
        )
    return rows


def begun(job: Job, body: Backbone, place: Place, batch: Batch, dtype: str) -> tuple[Gate, int]:
    """A first step: whether it computes what it should, and its operations on both sides.

    An adapter that has just begun changes nothing, so its loss must be that of the plain model. The
    count must be the one by hand: a kernel that is not counted would show as a slow one.
    """
    desk, trunk = place.desk, place.engine.trunk
    with torch.no_grad():
        logits = body.model(**batch.inputs).logits
        plain = float(desk.task.loss(logits, batch.labels))
    off = abs(step(desk, batch) - plain) / plain
    trunk.flops = {}
    with Meter() as meter:
        step(desk, batch)
    flops = meter.flops + sum(trunk.flops.values())
    trunk.flops = None
    counted = abs(flops - job.flops) / job.flops
    worst = max(off / ALIKE[dtype], counted / COUNTED)
    what = (
        f"loss off the plain model's by {off:.1e} (most {ALIKE[dtype]:.0e}), operations off those "
        f"by hand by {100 * counted:.1f} % (most {100 * COUNTED:.0f} %)"
    )
    return Gate(what, worst, 1.0), flops
