"""The demos' methods, each tuned by the same search, on three seeds.

    make bench                                       # both, about an hour on two cores
    .venv/bin/python benchmarks/demos.py quick
    .venv/bin/python benchmarks/demos.py shakespeare

Search: every method tries the same learning rates (flexp also its alignment) on a seed of its own;
the best own and global *validation* score together wins. Test rows are scored once, at the end, on
other seeds. Same clients, data, cuts and number of steps for all. Writes results/NAME.json, from
which tables.py renders the README's tables.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
TUNING_SEED, SEEDS = 100, (0, 1, 2)


@dataclass(frozen=True)
class Search:
    """What is searched, on how many rows, and how many runs share the machine."""

    lrs: tuple[float, ...]
    align: tuple[float, ...]
    sizes: tuple[str, ...]
    side_by_side: int
    threads: int


SEARCHES = {
    "quick": Search(
        (5e-4, 1e-3, 2e-3),
        (0.1,),
        ("data.rows=160", "data.split=[0.375, 0.25, 0.375]", "evaluate.global_rows=12"),
        side_by_side=2,
        threads=1,
    ),
    "shakespeare": Search(
        (2e-3, 5e-3, 1e-2),
        (0.1,),
        ("data.rows=72", "data.split=[0.5, 0.17, 0.33]", "evaluate.global_rows=4"),
        side_by_side=1,
        threads=2,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", choices=list(SEARCHES))
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    demo: str = asked.demo
    out: Path = asked.out or HERE / "results" / f"{demo}.json"
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(SEARCHES[demo].threads)
    cache = assets.Cache(assets.default_root(os.environ))
    began = time.monotonic()
    trials, best = tune(demo, cache)
    rows = [row for seed in SEEDS for row in final(demo, cache, seed, best)]
    search = SEARCHES[demo]
    result = {
        "command": f"python benchmarks/demos.py {demo}",
        "facts": commands.facts(),
        "recipe": recipe(demo, ["strategy.name=flexp"]).plain(),
        "search": {
            "lr": search.lrs,
            "align": search.align,
            "seed": TUNING_SEED,
            "trials": trials,
        },
        "chosen": best,
        "seeds": SEEDS,
        "summary": summary(rows),
        "minutes": round((time.monotonic() - began) / 60, 1),
        "rows": rows,
    }
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    say(json.dumps(result["summary"], indent=1))


def recipe(demo: str, pairs: list[str]) -> Recipe:
    path = demonstration.shipped(f"{demo}.yaml")
    return recipe_file.read(path, [*SEARCHES[demo].sizes, *pairs])


def tune(
    demo: str, cache: assets.Cache
) -> tuple[list[dict[str, Any]], dict[str, dict[str, float]]]:
    """Every trial with its validation scores, and each method's best settings."""
    search = SEARCHES[demo]
    opened = prepare(recipe(demo, [f"seed={TUNING_SEED}"]), cache)
    wanted: list[tuple[str, dict[str, float]]] = []
    for lr in search.lrs:
        wanted += [(method, {"train.lr": lr}) for method in ("local", "fedavg")]
        wanted += [("flexp", {"train.lr": lr, "strategy.align": align}) for align in search.align]
    stages = [staged(demo, opened, method, chosen, TUNING_SEED) for method, chosen in wanted]

    def trial(n: int) -> dict[str, Any]:
        method, chosen = wanted[n]
        own, pooled = score(stages[n], running.run(stages[n], Stream()), "val")
        found = {"method": method, **chosen, "own": own, "global": pooled}
        say(f"tuning {found}")
        return found

    with ThreadPoolExecutor(search.side_by_side) as pool:
        trials = list(pool.map(trial, range(len(wanted))))
    for stage in (opened, *stages):
        stage.engine.close()
    # Perplexities are compared as ratios, so that own and global count alike.
    higher = opened.federation.task.higher_is_better

    def good(t: dict[str, Any]) -> float:
        own, pooled = t["own"], t["global"]
        return own + pooled if higher else -math.log(own * pooled)

    best: dict[str, dict[str, float]] = {}
    for method in ("local", "fedavg", "flexp"):
        top = max((t for t in trials if t["method"] == method), key=good)
        best[method] = {k: v for k, v in top.items() if "." in k}
    return trials, best


def final(
    demo: str, cache: assets.Cache, seed: int, best: dict[str, dict[str, float]]
) -> list[dict[str, Any]]:
    """Test scores of every method and client for one seed."""
    opened = prepare(recipe(demo, [f"seed={seed}"]), cache)
    stages = {m: staged(demo, opened, m, best.get(m, {}), seed) for m in ("base", *best)}

    def one(method: str) -> list[dict[str, Any]]:
        result = running.run(stages[method], Stream())
        found = running.rows(result.scores, method, seed)
        say(f"seed {seed} {method} {means(found, method, seed)}")
        return found

    with ThreadPoolExecutor(SEARCHES[demo].side_by_side) as pool:
        rows = [row for found in pool.map(one, stages) for row in found]
    for stage in (opened, *stages.values()):
        stage.engine.close()
    return rows


def staged(demo: str, opened: Stage, method: str, chosen: dict[str, float], seed: int) -> Stage:
    pairs = [f"seed={seed}", f"strategy.name={method}"]
    pairs += [f"{key}={value}" for key, value in chosen.items()]
    return with_method(opened, recipe(demo, pairs))


def score(mine: Stage, result: running.Result, split: Split) -> tuple[float, float]:
    """Mean own and global score on a split, by the task's main metric."""
    metric = mine.federation.task.metric
    scores = evaluate.evaluate(
        mine.engine,
        mine.strategy,
        result.state,
        result.turn,
        when="after",
        global_rows=mine.recipe.evaluate.global_rows,
        split=split,
    )
    found = {s.cell: s.value for s in scores if s.client == "all" and s.metric == metric}
    return found["personal/own/after"], found["personal/global/after"]


def means(rows: list[dict[str, Any]], method: str, seed: int | None = None) -> dict[str, float]:
    out: dict[str, float] = {}
    metric = rows[0]["metric"]  # the main one comes first
    for data in ("own", "global"):
        values = [
            row["value"]
            for row in rows
            if row["method"] == method
            and row["client"] == "all"
            and row["metric"] == metric
            and row["cell"] == f"personal/{data}/after"
            and seed in (None, row["seed"])
        ]
        out[data] = statistics.fmean(values)
    return out


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean own and global score per method, and per seed."""
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
