"""Peak memory of a client that holds 4 of 30 blocks, against one that holds them all.

    .venv/bin/python benchmarks/partial.py

Fresh processes, in turn (whole, part, whole, ...). Each opens the backbone in fp32 and runs one
forward and backward through every weight it holds, because a mapped file costs memory only once it
is read. Both wear LoRA; the part feeds its tail with what its own front gave. Writes
results/partial.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers.utils import logging

from flexp import assets, commands
from flexp.dice import Dice
from flexp.model.adapter import Lora
from flexp.model.backbone import Backbone
from flexp.model.worn import read

HERE = Path(__file__).parent
MODEL, CUT = "smollm2-135m", (2, 2)
ROWS, LENGTH, ROUNDS = 2, 64, 3
MB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", choices=["nothing", "whole", "part"])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "partial.json")
    asked = parser.parse_args()
    if asked.child:
        sys.stdout.write(json.dumps(measure(asked.child)) + "\n")
        return
    order = ["nothing", *["whole", "part"] * ROUNDS, "whole"]
    runs = [fresh(name) for name in order]
    floor = runs[0]["peak_mb"]
    peak = {name: median(runs, name, "peak_mb") for name in ("whole", "part")}
    result = {
        "command": "python benchmarks/partial.py",
        "facts": commands.facts(),
        "model": MODEL,
        "dtype": "float32",
        "cut": CUT,
        "batch": [ROWS, LENGTH],
        "peak_mb": peak,
        "libraries_mb": floor,
        "peak_ratio": round(peak["part"] / peak["whole"], 3),
        "peak_ratio_above_libraries": round((peak["part"] - floor) / (peak["whole"] - floor), 3),
        "parameters_mb": {name: median(runs, name, "parameters_mb") for name in peak},
        "open_seconds": {name: median(runs, name, "open_seconds") for name in peak},
        "runs": runs,
    }
    asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.stderr.write(json.dumps({k: v for k, v in result.items() if k != "runs"}, indent=1) + "\n")


def median(runs: list[dict[str, Any]], name: str, what: str) -> float:
    return round(statistics.median(run[what] for run in runs if run["name"] == name), 2)


def fresh(name: str) -> dict[str, Any]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--child", name]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(name: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    found: dict[str, Any] = {"name": name}
    if name != "nothing":
        folder = assets.fetch(MODEL, assets.Cache(assets.default_root(os.environ)))
        found |= step(folder, name == "part")
    resident = psutil.Process().memory_info().rss / MB
    return {**found, "peak_mb": round(peak(), 1), "resident_mb": round(resident, 1)}


def step(folder: Path, partial: bool) -> dict[str, Any]:
    """Opens the backbone and runs what it holds, forwards and backwards."""
    began, (front, back) = time.monotonic(), CUT
    depth = int(json.loads((folder / "config.json").read_text("utf-8"))["num_hidden_layers"])
    held = frozenset([*range(front), *range(depth - back, depth)]) if partial else None
    body = Backbone.open(folder, task="causal-lm", blocks=held)
    opened = time.monotonic() - began
    begun = body.initial(Lora(), Dice(0))
    leaves = {k: v.requires_grad_() for k, v in begun.items() if body.block_of(k) in body.held}
    worn = read(leaves, 16.0)
    ids = torch.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) % 1000 + 1
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if partial:
        hidden = body.run(inputs, worn, last=front)
        logits = body.run(inputs, worn, first=depth - back, feed=hidden)
    else:
        logits = body.run(inputs, worn)
    logits.square().mean().backward()  # pyright: ignore[reportUnknownMemberType]
    touched = sum(float(p.sum()) for p in body.model.parameters())
    size = sum(p.numel() * p.element_size() for p in body.model.parameters())
    return {
        "blocks": len(body.held),
        "open_seconds": round(opened, 2),
        "parameters_mb": round(size / MB, 1),
        "finite": touched == touched and bool(torch.isfinite(logits).all()),
    }


def peak() -> float:
    """The largest resident memory so far, in MB.

    A child inherits its parent's peak, which here is that of the libraries, so never above its own.
    """
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KB elsewhere
    return most / MB if sys.platform == "darwin" else most / 1024


if __name__ == "__main__":
    main()
