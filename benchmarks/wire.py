"""What a wire saves and what it costs: bytes, time, gradients, and the accuracy of a real run.

    .venv/bin/python benchmarks/wire.py

For each wire in one process: bytes of the hidden states and gradients of a run against fp32, the
time of packing and unpacking 1 MiB (process CPU time, median of interleaved repeats), the cosine of
a client's adapter gradients with those of fp32 (behind the fp32 run, same batch), and the scores of
recipes/quick.yaml in fp32, four clients, with the cuts of protocol.yaml. Two seeds, wires in turn.
Writes results/wire.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
import yaml
from protocol import HERE, Task, say
from torch.nn.functional import cosine_similarity
from transformers.utils import logging

from flexp import assets, commands
from flexp import run as running
from flexp.engine.base import assigned
from flexp.engine.local import LocalEngine
from flexp.events import Event, Stream, TurnEnded, TurnFailed
from flexp.link.metered import Ledger
from flexp.link.wire import PACKED, Wire, pack, unpack
from flexp.selection import ALL, FAR, NEAR, select
from flexp.stage import Stage, with_method
from flexp.tensors import Tensors

WIRES: tuple[Wire, ...] = get_args(Wire)
METHOD, TASK, SEEDS, REPEATS = "flexp", "quick", (0, 1), 15
CHANGES = {"model.dtype": "float32", "data.clients": 4}  # of the protocol's task
WIDTHS = (384, 512, 2048)  # of the tensors that are timed
MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "wire.json")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(asked.threads)
    began = time.monotonic()
    protocol = yaml.safe_load((HERE / "protocol.yaml").read_text("utf-8"))
    protocol["tasks"][TASK]["changes"] |= CHANGES
    task = Task(TASK, protocol, asked.out, assets.Cache(assets.default_root(os.environ)))
    found: dict[str, Any] = {
        "command": "python benchmarks/wire.py",
        "facts": commands.facts(),
        "task": TASK,
        "changes": CHANGES,
        "method": METHOD,
        "rounds": asked.rounds,
        "seeds": SEEDS,
        "milliseconds_per_mib": {str(width): timed(width) for width in WIDTHS},
        "runs": [],
        "gradients": [],
    }
    for seed in SEEDS:
        play(task, seed, asked.rounds, found)
    found["summary"] = {wire: summary(found, wire) for wire in WIRES}
    found["minutes"] = round((time.monotonic() - began) / 60, 2)
    asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    say(json.dumps({k: found[k] for k in ("milliseconds_per_mib", "summary", "minutes")}, indent=1))


def timed(width: int) -> dict[str, dict[str, float]]:
    """Milliseconds to pack and to unpack 1 MiB of fp32 rows, some of whose columns are outliers."""
    rows = torch.randn(4, MIB // (16 * width), width, generator=torch.Generator().manual_seed(0))
    rows[..., 7] *= 30
    spent: dict[str, dict[str, list[float]]] = {w: {"pack": [], "unpack": []} for w in WIRES}
    for _ in range(REPEATS):
        for wire in WIRES:
            parts = pack(rows, wire)
            spent[wire]["pack"].append(clocked(partial(pack, rows, wire)))
            spent[wire]["unpack"].append(clocked(partial(unpack, parts, wire, rows.dtype)))
    return {
        w: {what: round(statistics.median(t), 3) for what, t in held.items()}
        for w, held in spent.items()
    }


def clocked(work: Callable[[], object], times: int = 10) -> float:
    started = time.process_time()
    for _ in range(times):
        work()
    return 1e3 * (time.process_time() - started) / times


def play(task: Task, seed: int, rounds: int, found: dict[str, Any]) -> None:
    """One seed's runs, and the gradients of every client behind the one in fp32."""
    first, placed = task.stage(seed)
    for wire in WIRES:
        recipe = task.recipe(METHOD, seed, rounds=rounds, **placed, **{"link.wire": wire})
        stage, stream, crossed = with_method(first, recipe), Stream(), Crossed()
        stream.subscribe(crossed)
        result = running.run(stage, stream)
        run = {"wire": wire, "seed": seed, **scored(stage, result), **crossed.seen}
        found["runs"].append(run)
        say(str(run))
        if wire == "fp32":
            found["gradients"] += [{"seed": seed, **row} for row in gradients(stage, result)]
        stage.engine.close()
    first.engine.close()


def scored(stage: Stage[LocalEngine], result: running.Result) -> dict[str, float]:
    """The mean accuracy after training, on own and on everybody's test rows."""
    metric = stage.federation.task.metric
    means = {s.cell: s.value for s in result.scores if (s.client, s.metric) == ("all", metric)}
    return {data: means[f"personal/{data}/after"] for data in ("own", "global")}


class Crossed:
    """A sink that adds up bytes of training turns: what is packed, and everything."""

    def __init__(self) -> None:
        self.seen = {"packed_bytes": 0, "all_bytes": 0, "steps": 0, "failures": 0}

    def __call__(self, event: Event) -> None:
        if isinstance(event, TurnEnded):
            packed = (int(str(v)) for k, v in event.kinds.items() if k.split()[1] in PACKED)
            self.seen["packed_bytes"] += sum(packed)
            self.seen["steps"] += event.steps
            self.seen["all_bytes"] += event.sent_bytes + event.received_bytes
        self.seen["failures"] += isinstance(event, TurnFailed)


def gradients(stage: Stage[LocalEngine], result: running.Result) -> list[dict[str, Any]]:
    """Cosines of each client's gradients, near and far, with those of fp32 on the same batch."""
    rows: list[dict[str, Any]] = []
    for client in sorted(stage.placed):
        exact = gradient(stage, result, client, "fp32")
        for wire in WIRES[1:]:
            other = gradient(stage, result, client, wire)
            sides = {side: cosine(exact[side], other[side]) for side in exact}
            rows.append({"client": client, "wire": wire, **sides})
    return rows


def gradient(
    stage: Stage[LocalEngine], result: running.Result, client: str, wire: Wire
) -> dict[str, Tensors]:
    engine = stage.engine
    engine.wires = {client: wire}
    work = assigned(stage.strategy, engine, result.state, client, result.turn)
    with engine.visit(stage.strategy, work, result.turn, Ledger()) as (desk, _):
        batch = next(iter(desk.batches(steps=1)))
        with desk.model.training({"personal": ALL}, None):
            desk.grad(desk.model.loss(batch, "personal"), ["personal"], ["personal@g"])
        whole, place = desk.whole("personal@g"), desk.model.near.place
        return {"near": select(whole, NEAR, place), "far": select(whole, FAR, place)}


def cosine(a: Tensors, b: Tensors) -> float:
    flat = [torch.cat([held[k].double().flatten() for k in sorted(a)]) for held in (a, b)]
    return float(cosine_similarity(*flat, dim=0))


def summary(found: dict[str, Any], wire: Wire) -> dict[str, Any]:
    """Means over seeds, and against fp32."""
    runs = [r for r in found["runs"] if r["wire"] == wire]
    plain = [r for r in found["runs"] if r["wire"] == "fp32"]
    rows = [g for g in found["gradients"] if g["wire"] == wire]
    out: dict[str, Any] = {
        f"{what}_ratio": sum(r[what] for r in runs) / sum(r[what] for r in plain)
        for what in ("packed_bytes", "all_bytes")
    }
    out["packed_bytes_per_step"] = sum(r["packed_bytes"] for r in runs) / sum(
        r["steps"] for r in runs
    )
    for what in ("own", "global"):
        out[what] = statistics.fmean(r[what] for r in runs)
        out[f"{what}_minus_fp32"] = out[what] - statistics.fmean(r[what] for r in plain)
    for side in ("near", "far") if rows else ():
        out[f"{side}_cosine"] = {
            "least": min(r[side] for r in rows),
            "median": statistics.median(r[side] for r in rows),
        }
    return out


if __name__ == "__main__":
    main()
