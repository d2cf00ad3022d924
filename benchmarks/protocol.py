"""Runs one task of protocol.yaml: every method tuned by the same search, on three seeds.

    make bench-protocol                                  # all tasks, about an hour on two cores
    .venv/bin/python benchmarks/protocol.py quick

Writes results/TASK.json after every run, and goes on from what is there already: runs of a method
are kept while task, seeds, cuts and the method's own settings are the same. tables.py renders the
README's tables from it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers.utils import logging

from flexp import assets, commands, evaluate, recipe_file
from flexp import run as running
from flexp.comparison import gains
from flexp.data.examples import Split
from flexp.engine.local import LocalEngine
from flexp.events import Event, Stream, TurnEnded
from flexp.recipe import Recipe
from flexp.stage import Stage, opened, survey, with_method
from flexp.strategies import build

HERE = Path(__file__).parent
Rows = list[dict[str, Any]]
FREE, AVERAGED, ALONE = "flexp-free", "fedavg", "local"


@dataclass(frozen=True)
class Task:
    """One task of the protocol, and where its results are."""

    name: str
    protocol: Mapping[str, Any]
    out: Path
    cache: assets.Cache

    @property
    def methods(self) -> list[str]:
        """The methods that are compared on this task."""
        return self.protocol["tasks"][self.name].get("methods", list(self.protocol["methods"]))

    @property
    def seeds(self) -> list[int]:
        """The seeds on whose test rows methods are scored."""
        return self.protocol["tasks"][self.name].get("seeds", self.protocol["seeds"])

    def recipe(self, method: str, seed: int, **more: Any) -> Recipe:
        """The recipe of one run."""
        task = self.protocol["tasks"][self.name]
        changes = {**task["changes"], **self.protocol["methods"][method], "seed": seed, **more}
        pairs = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
        return recipe_file.read(HERE.parent / task["recipe"], pairs)

    @property
    def plain(self) -> dict[str, Any]:
        """What all methods share, as the recipe says it; the cuts are the protocol's."""
        whole = self.recipe("base", 0).plain()
        return {k: v for k, v in whole.items() if k not in ("seed", "plan", "strategy")}

    def stage(self, seed: int) -> tuple[Stage[LocalEngine], dict[str, Any]]:
        """Data and model of one seed, opened once, and the cuts of its clients."""
        anywhere = self.recipe("base", seed, **{"plan.cut": [1, 0]})
        names = sorted(survey(anywhere, self.cache).placed)
        cuts = self.protocol["cuts"]
        placed = {"plan.cuts": {c: cuts[n % len(cuts)] for n, c in enumerate(names)}}
        return opened(survey(self.recipe("base", seed, **placed), self.cache)), placed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    text = (HERE / "protocol.yaml").read_text("utf-8")
    protocol = yaml.safe_load(text)
    parser.add_argument("task", choices=list(protocol["tasks"]))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(asked.threads)
    cache = assets.Cache(assets.default_root(os.environ))
    out: Path = asked.out or HERE / "results" / f"{asked.task}.json"
    task = Task(asked.task, protocol, out, cache)
    found = begun(task)
    for run in ("search", *task.seeds):
        play(task, found, run)
    say(json.dumps(found["summary"], indent=1))


def begun(task: Task) -> dict[str, Any]:
    """The results so far, of what the protocol still asks for."""
    seed, rates = task.protocol["search"]["seed"], task.protocol["tasks"][task.name]["rates"]
    plain: dict[str, Any] = {
        "command": f"python benchmarks/protocol.py {task.name}",
        "facts": commands.facts(),
        "recipe": task.plain,
        "settings": {m: settings(task.recipe(m, seed)) for m in task.methods},
        "cuts": task.protocol["cuts"],
        "seeds": task.seeds,
    }
    old: dict[str, Any] = json.loads(task.out.read_text("utf-8")) if task.out.exists() else {}
    same = all(old.get(key) == plain[key] for key in ("recipe", "cuts", "seeds"))
    known: dict[str, Any] = old["settings"] if same else {}
    kept = {m for m in task.methods if known.get(m) == plain["settings"][m]}

    def still(key: str, held: Mapping[str, Any]) -> Rows:
        return [row for row in held.get(key, []) if row["method"] in kept]

    trials = [t for t in still("trials", old.get("search", {})) if t["train.lr"] in rates]
    search = {"lr": rates, "trials": trials, "seed": seed}
    ran = {"rows": still("rows", old), "costs": still("costs", old)}
    return {**plain, "search": search, "chosen": {}, **ran, "minutes": old.get("minutes", 0.0)}


def settings(recipe: Recipe) -> dict[str, Any]:
    """A method's name and all of its options, those too that it has by default."""
    strategy = build(recipe.strategy.name, recipe.strategy.options)
    return {"name": strategy.name, **asdict(strategy)}  # pyright: ignore[reportArgumentType]


def play(task: Task, found: dict[str, Any], run: str | int) -> None:
    """The search, or all methods on one seed; what is there already is not run again."""
    seed = task.protocol["search"]["seed"] if run == "search" else int(run)
    wanted = trials(task, found) if run == "search" else finals(task, found, seed)
    if not wanted:
        return
    opened_stage, placed = task.stage(seed)
    for method, chosen in wanted:
        began = time.monotonic()
        stage = with_method(opened_stage, task.recipe(method, seed, **placed, **chosen))
        stream, sent = Stream(), Sent()
        stream.subscribe(sent)
        result = running.run(stage, stream)
        if run == "search":
            own, pooled = score(stage, result, "val")
            metric = stage.federation.task.metric
            trial = {"method": method, **chosen, "metric": metric, "own": own, "global": pooled}
            found["search"]["trials"].append(trial)
            say(f"tuning {trial}")
        else:
            found["rows"] += running.rows(result.scores, method, seed)
            found["costs"].append({"method": method, "seed": seed, **chosen, **sent.bytes})
            say(f"seed {seed} {method} {means(found['rows'], method, seed)} {sent.bytes}")
        stage.engine.close()
        found["minutes"] = round(found["minutes"] + (time.monotonic() - began) / 60, 2)
        keep(task, found)
    opened_stage.engine.close()


class Sent:
    """A sink that adds up what clients sent: everything, and adapters among it."""

    def __init__(self) -> None:
        self.bytes = {"sent": 0, "adapters_sent": 0}

    def __call__(self, event: Event) -> None:
        if isinstance(event, TurnEnded):
            self.bytes["sent"] += event.sent_bytes
            self.bytes["adapters_sent"] += int(str(event.kinds.get("up slot", 0)))


def trials(task: Task, found: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    done = {(t["method"], t["train.lr"]) for t in found["search"]["trials"]}
    methods = [m for m in task.methods if m != "base"]
    rates = task.protocol["tasks"][task.name]["rates"]
    return [(m, {"train.lr": lr}) for lr in rates for m in methods if (m, lr) not in done]


def finals(task: Task, found: dict[str, Any], seed: int) -> list[tuple[str, dict[str, float]]]:
    """What is to be run on a seed; what ran with other settings than the chosen is dropped."""
    found["chosen"] = chosen = best(found["search"]["trials"])
    done = {
        c["method"]
        for c in found["costs"]
        if c["seed"] == seed and c.items() >= chosen.get(c["method"], {}).items()
    }
    for key in ("rows", "costs"):
        found[key] = [r for r in found[key] if r["seed"] != seed or r["method"] in done]
    return [(m, chosen.get(m, {})) for m in task.methods if m not in done]


def best(tried: Rows) -> dict[str, dict[str, float]]:
    """Each method's best settings; perplexities as ratios, so that own and global count alike."""

    def good(t: dict[str, Any]) -> float:
        higher = t["metric"] == "accuracy"
        return t["own"] + t["global"] if higher else -math.log(t["own"] * t["global"])

    out: dict[str, dict[str, float]] = {}
    for method in dict.fromkeys(t["method"] for t in tried):
        top = max((t for t in tried if t["method"] == method), key=good)
        out[method] = {k: v for k, v in top.items() if "." in k}
    return out


def keep(task: Task, found: dict[str, Any]) -> None:
    """Writes what is known, with summary and verdict as far as they go."""
    rows: Rows = found["rows"]
    found["summary"] = {m: summary(rows, m) for m in dict.fromkeys(r["method"] for r in rows)}
    if {FREE, AVERAGED, ALONE} <= found["summary"].keys():
        found["verdict"] = {m: verdict(found, m) for m in found["summary"]}
    task.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def score(mine: Stage[LocalEngine], result: running.Result, split: Split) -> tuple[float, float]:
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


def means(rows: Rows, method: str, seed: int | None = None) -> dict[str, float]:
    picked = [r for r in main_rows(rows, method) if r["client"] == "all"]
    picked = [r for r in picked if seed in (None, r["seed"])]
    return {
        data: statistics.fmean(r["value"] for r in picked if f"/{data}/" in r["cell"])
        for data in ("own", "global")
    }


def main_rows(rows: Rows, method: str) -> Rows:
    """A method's rows of the main metric, which comes first."""
    metric = rows[0]["metric"]
    return [r for r in rows if r["method"] == method and r["metric"] == metric]


def summary(rows: Rows, method: str) -> dict[str, Any]:
    seeds = dict.fromkeys(r["seed"] for r in main_rows(rows, method))
    return {**means(rows, method), "seeds": {str(s): means(rows, method, s) for s in seeds}}


def verdict(found: dict[str, Any], method: str) -> dict[str, Any]:
    """How much of the room a method closes, and what it costs, in points or log-perplexity."""
    rows: Rows = found["rows"]
    accuracy = rows[0]["metric"] == "accuracy"
    compared = (method, FREE, AVERAGED, ALONE)
    every = [{int(r["seed"]) for r in main_rows(rows, m)} for m in compared]
    seeds = every[0].intersection(*every)

    def cells(name: str, data: str) -> dict[tuple[int, str], float]:
        held = (r for r in main_rows(rows, name) if f"/{data}/" in r["cell"] and r["seed"] in seeds)
        return {
            (r["seed"], r["client"]): 100 * r["value"] if accuracy else -math.log(r["value"])
            for r in held
            if r["client"] != "all"
        }

    def mean(name: str, data: str) -> float:
        return statistics.fmean(cells(name, data).values())

    mine, free = cells(method, "global"), cells(FREE, "global")
    both = sorted(mine)
    gain = gains([mine[k] for k in both], [free[k] for k in both], higher=True)
    room = mean(AVERAGED, "global") - mean(FREE, "global")
    return {
        "room": room,
        "closed": (mean(method, "global") - mean(FREE, "global")) / room if room else None,
        "global_gain": gain,
        "own_cost": mean(FREE, "own") - mean(method, "own"),
        "own_over_best_of_local_and_fedavg": mean(method, "own")
        - max(mean(ALONE, "own"), mean(AVERAGED, "own")),
    }


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
