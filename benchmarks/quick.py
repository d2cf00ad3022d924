"""The quick demo's methods, each tuned by the same search, on three seeds.

    make bench                              # about half an hour on two cores
    .venv/bin/python benchmarks/quick.py

Search: every method tries the same learning rates (flexp also its alignment) on a seed of its own;
the best mean of own and global *validation* accuracy wins. Test rows are scored once, at the end,
on other seeds. Same clients, data, cuts and number of steps for all. Writes
results/quick.json and the README's table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from flexp import assets, commands, demonstration, evaluate, recipe_file
from flexp import run as running
from flexp.data.examples import Split
from flexp.events import Stream
from flexp.recipe import Recipe
from flexp.stage import Stage, prepare, with_method

HERE = Path(__file__).parent
LRS = (5e-4, 1e-3, 2e-3)
ALIGN = (0.1,)
TUNING_SEED, SEEDS = 100, (0, 1, 2)
SIZES = ("data.rows=160", "data.split=[0.375, 0.25, 0.375]", "evaluate.global_rows=12")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "quick.json")
    out: Path = parser.parse_args().out
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    cache = assets.Cache(assets.default_root(os.environ))
    began = time.monotonic()
    trials, best = tune(cache)
    rows = [row for seed in SEEDS for row in final(cache, seed, best)]
    result = {
        "command": "python benchmarks/quick.py",
        "facts": commands.facts(),
        "recipe": recipe(["strategy.name=flexp"]).plain(),
        "search": {"lr": LRS, "align": ALIGN, "seed": TUNING_SEED, "trials": trials},
        "chosen": best,
        "seeds": SEEDS,
        "summary": summary(rows),
        "minutes": round((time.monotonic() - began) / 60, 1),
        "rows": rows,
    }
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    say(json.dumps(result["summary"], indent=1))


def recipe(pairs: list[str]) -> Recipe:
    path = demonstration.shipped("quick.yaml")
    return recipe_file.read(path, [*SIZES, *pairs])


def tune(cache: assets.Cache) -> tuple[list[dict[str, Any]], dict[str, dict[str, float]]]:
    """Every trial with its validation accuracies, and each method's best settings."""
    opened = prepare(recipe([f"seed={TUNING_SEED}"]), cache)
    wanted: list[tuple[str, dict[str, float]]] = []
    for lr in LRS:
        wanted += [(method, {"train.lr": lr}) for method in ("local", "fedavg")]
        wanted += [("flexp", {"train.lr": lr, "strategy.align": align}) for align in ALIGN]
    stages = [staged(opened, method, chosen, TUNING_SEED) for method, chosen in wanted]

    def trial(n: int) -> dict[str, Any]:
        method, chosen = wanted[n]
        own, pooled = score(stages[n], running.run(stages[n], Stream()), "val")
        found = {"method": method, **chosen, "own": own, "global": pooled}
        say(f"tuning {found}")
        return found

    with ThreadPoolExecutor(2) as pool:
        trials = list(pool.map(trial, range(len(wanted))))
    for stage in (opened, *stages):
        stage.engine.close()
    best: dict[str, dict[str, float]] = {}
    for method in ("local", "fedavg", "flexp"):
        mine = [t for t in trials if t["method"] == method]
        top = max(mine, key=lambda t: t["own"] + t["global"])
        best[method] = {k: v for k, v in top.items() if "." in k}
    return trials, best


def final(
    cache: assets.Cache, seed: int, best: dict[str, dict[str, float]]
) -> list[dict[str, Any]]:
    """Test scores of every method and client for one seed."""
    opened = prepare(recipe([f"seed={seed}"]), cache)
    stages = {m: staged(opened, m, best.get(m, {}), seed) for m in ("base", *best)}

    def one(method: str) -> list[dict[str, Any]]:
        result = running.run(stages[method], Stream())
        found = running.rows(result.scores, method, seed)
        say(f"seed {seed} {method} {means(found, method, seed)}")
        return found

    with ThreadPoolExecutor(2) as pool:
        rows = [row for found in pool.map(one, stages) for row in found]
    for stage in (opened, *stages.values()):
        stage.engine.close()
    return rows


def staged(opened: Stage, method: str, chosen: dict[str, float], seed: int) -> Stage:
    pairs = [f"seed={seed}", f"strategy.name={method}"]
    pairs += [f"{key}={value}" for key, value in chosen.items()]
    return with_method(opened, recipe(pairs))


def score(mine: Stage, result: running.Result, split: Split) -> tuple[float, float]:
    """Mean own and global accuracy on a split."""
    scores = evaluate.evaluate(
        mine.engine,
        mine.strategy,
        result.state,
        result.turn,
        when="after",
        global_rows=mine.recipe.evaluate.global_rows,
        split=split,
    )
    found = {s.cell: s.value for s in scores if s.client == "all" and s.metric == "accuracy"}
    return found["personal/own/after"], found["personal/global/after"]


def means(rows: list[dict[str, Any]], method: str, seed: int | None = None) -> dict[str, float]:
    out: dict[str, float] = {}
    for data in ("own", "global"):
        values = [
            row["value"]
            for row in rows
            if row["method"] == method
            and row["client"] == "all"
            and row["metric"] == "accuracy"
            and row["cell"] == f"personal/{data}/after"
            and seed in (None, row["seed"])
        ]
        out[data] = statistics.fmean(values)
    return out


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean own and global accuracy per method, and per seed."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    return {
        method: {**means(rows, method), "seeds": {s: means(rows, method, s) for s in SEEDS}}
        for method in methods
    }


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
