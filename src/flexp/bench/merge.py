"""Averaging many adapters, against reading them once and against the usual loop (S12)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from flexp.bench.clock import in_turns
from flexp.bench.job import Scale
from flexp.bench.machine import Machine
from flexp.bench.rows import Gate, Row
from flexp.dice import Dice
from flexp.model.adapter import Layout
from flexp.tensors import Tensors, mean_by_name


def merge(scale: Scale, machine: Machine) -> list[Row]:
    """The weighted mean that every method merges with, over adapters of the whole model."""
    del machine
    job, count = scale.job, scale.adapters
    shapes = job.backbone("fp32").layout(job.adapter)
    items = [drawn(shapes, n) for n in range(count)]
    weights = [1.0 + n % 7 for n in range(count)]
    size = sum(v.nbytes for v in items[0].values())
    flat = torch.ones(count * size // 4)
    works = {
        "ours": partial(mean_by_name, items, weights),
        "loop": partial(by_loop, items, weights),
        "sum": flat.sum,
        "most": flat.amax,
    }
    took = in_turns(works, scale.rounds)
    read = min((took["sum"], took["most"]), key=lambda one: one.seconds)
    gate = Gate("off the mean in double precision, relative", off(items, weights), 1e-5)
    details = {
        "adapters": count,
        "megabytes": round(count * size / 1e6, 1),
        "cpu_ms": {name: round(1e3 * held.seconds, 2) for name, held in took.items()},
        "read_gb_per_second": round(count * size / read.seconds / 1e9, 1),
        "spread": took["loop"].spread(took["ours"]),
    }
    ours = took["ours"]
    once = f"times the processor time of reading {count} adapters once"
    loop = f"times less than copying {count} adapters and adding them up in a loop"
    return [
        Row("merge.read", ours.over(read), "×", once, 1.5, 1.0, "lower", gate, details),
        Row("merge.loop", took["loop"].over(ours), "×", loop, 30.0, None, "higher", gate, details),
    ]


def drawn(shapes: Layout, n: int) -> Tensors:
    """A random adapter."""
    stream = Dice(0)("adapter", n=n).generator()
    return {name: torch.randn(shape, generator=stream) for name, shape in shapes.items()}


def by_loop(items: Sequence[Tensors], weights: Sequence[float]) -> Tensors:
    """As it is usually written: deep copies, then a loop over names and clients."""
    total = sum(weights)
    given = [copy.deepcopy(item) for item in items]
    out = copy.deepcopy(given[0])
    for name in out:
        out[name] = out[name] * (weights[0] / total)
        for item, weight in zip(given[1:], weights[1:], strict=True):
            out[name] += item[name] * (weight / total)
    return out


def off(items: Sequence[Tensors], weights: Sequence[float]) -> float:
    """How far the mean is from the one in double precision, at its worst tensor."""
    found = mean_by_name(items, weights)
    shares = [weight / sum(weights) for weight in weights]
    worst = 0.0
    for name, value in found.items():
        right = torch.zeros(value.shape, dtype=torch.float64)
        for item, share in zip(items, shares, strict=True):
            right += item[name].double() * share
        worst = max(worst, distance(value, right))
    return worst


def distance(value: Tensor, right: Tensor) -> float:
    """Relative, by length."""
    off = (value.double() - right).square().sum() / right.double().square().sum()
    return float(off) ** 0.5
