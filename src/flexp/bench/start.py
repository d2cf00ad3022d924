"""Processor seconds from the start of a process to its first finished step (S11)."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, cast

from flexp.bench.job import Scale
from flexp.bench.machine import Machine
from flexp.bench.rows import Gate, Row

Launch = Callable[[Scale, str], dict[str, Any]]
ALIKE = 1e-4  # of two losses, relative


def start(
    scale: Scale, machine: Machine, *, launch: Mapping[str, Launch] | None = None
) -> list[Row]:
    """Fresh processes in turns: ours with client and server in one, and the plain PEFT stack."""
    del machine
    launch = launch or {"flexp": ours, "peft": plain}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in launch}
    with tempfile.TemporaryDirectory() as folder:
        cast(Any, scale.job.model()).save_pretrained(folder)
        for _ in range(scale.starts):
            for name, begin in launch.items():
                found[name].append(begin(scale, folder))
    cpu, wall, losses = (
        {name: [float(one[what]) for one in all_] for name, all_ in found.items()}
        for what in ("cpu", "wall", "loss")
    )
    pairs = list(zip(cpu["flexp"], cpu["peft"], strict=True))
    off = abs(losses["flexp"][0] - losses["peft"][0]) / abs(losses["peft"][0])
    middle = statistics.median
    return [
        Row(
            "start",
            middle(a / b for a, b in pairs),
            "×",
            "processor seconds from the start of a process to its first step, of the PEFT stack's",
            0.7,
            0.34,
            "lower",
            Gate("both first losses, relative", off, ALIKE),
            {
                "cpu_seconds": {name: round(middle(held), 2) for name, held in cpu.items()},
                "wall_seconds": {name: round(middle(held), 2) for name, held in wall.items()},
                "spread": [
                    round(min(a / b for a, b in pairs), 3),
                    round(max(a / b for a, b in pairs), 3),
                ],
            },
        )
    ]


def ours(scale: Scale, folder: str) -> dict[str, Any]:
    """This program in a fresh process."""
    from flexp.bench.child import launched

    return launched("start", scale, folder=folder)


def plain(scale: Scale, folder: str) -> dict[str, Any]:
    """The plain stack in a fresh process."""
    from flexp.bench.child import started

    job = scale.job
    drawn: Any = job.batch().inputs["input_ids"]
    asked = {"folder": folder, "rank": job.rank, "alpha": job.adapter.alpha, "ids": drawn.tolist()}
    return started("flexp.bench.plain", asked)
