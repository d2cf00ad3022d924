"""Where to cut: simulated time to the same quality, by the goal that the planner follows.

    .venv/bin/python benchmarks/splits.py

The same training on each fleet of protocol.yaml with the cuts of each goal, scored after every
round; the clock is the simulated one of `flexp compare`. The quality that counts is the best that
the worst of the goals reaches. Writes results/splits.json.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
import yaml
from protocol import HERE, Task, say
from transformers.utils import logging

from flexp import assets, commands
from flexp import run as running
from flexp.comparison.table import AFTER, work_of
from flexp.events import Event, Scored, Stream, TurnEnded
from flexp.plan.clock import run_seconds
from flexp.plan.declared import devices_of, server_of
from flexp.seating import dtype_name
from flexp.stage import opened, survey

METHOD = "flexp"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "splits.json")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(asked.threads)
    protocol = yaml.safe_load((HERE / "protocol.yaml").read_text("utf-8"))
    wanted = protocol["splits"]
    cache = assets.Cache(assets.default_root(os.environ))
    task = Task(wanted["task"], protocol, asked.out, cache)
    result: dict[str, Any] = {
        "command": "python benchmarks/splits.py",
        "facts": commands.facts(),
        "splits": wanted,
        "fleets": {},
    }
    for fleet in wanted["fleets"]:
        runs = {goal: play(task, wanted, fleet, goal) for goal in wanted["goals"]}
        result["fleets"][fleet] = {"runs": runs, "reached": reached(runs)}
        asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        say(json.dumps({fleet: result["fleets"][fleet]["reached"]}, indent=1))


def play(task: Task, wanted: dict[str, Any], fleet: str, goal: str) -> dict[str, Any]:
    """One run: its cuts, and time and scores after every round."""
    kinds = wanted["fleets"][fleet]["devices"]
    devices = [{"name": f"{n}-{d}", "profile": d} for n, d in enumerate(kinds)]
    server = wanted["fleets"][fleet]["server"]
    plan = {"plan.devices": devices, "plan.server": server, "plan.goal": goal}
    recipe = task.recipe(METHOD, wanted["seed"], **wanted["changes"], **plan)
    stage = opened(survey(recipe, task.cache))
    stage.engine.measures = True
    stream, seen = Stream(), list[Event]()
    stream.subscribe(seen.append)
    running.run(stage, stream)
    stage.engine.close()
    known = devices_of(recipe.plan, list(stage.placed), dtype_name(recipe))
    speed = server_of(recipe.plan, dtype_name(recipe)).flops
    turns = [e for e in seen if isinstance(e, TurnEnded)]
    metric = stage.federation.task.metric
    rounds: list[dict[str, Any]] = []
    for n in range(recipe.rounds):
        scores = [e for e in seen if isinstance(e, Scored) and e.round == n and e.client == "all"]
        found = {e.cell.split("/")[1]: e.value for e in scores if e.metric == metric}
        spent = run_seconds((work_of(t) for t in turns if t.round <= n), known, speed)
        rounds.append({"seconds": spent, **{data: found[data] for data in AFTER}})
    cuts = {c: [p.seat.cut.front, p.seat.cut.back] for c, p in stage.placed.items()}
    say(f"{fleet} {goal} {cuts} {rounds[-1]}")
    return {"metric": metric, "cuts": cuts, "rounds": rounds}


def reached(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Seconds to the quality that every goal reaches, on own and on everybody's data."""
    out: dict[str, Any] = {}
    for data in AFTER:
        quality = max(min(r[data] for r in run["rounds"]) for run in runs.values())
        seconds = {
            goal: next(r["seconds"] for r in run["rounds"] if r[data] <= quality)
            for goal, run in runs.items()
        }
        ratios = {goal: s / seconds["optimized"] for goal, s in seconds.items()}
        out[data] = {"perplexity": quality, "seconds": seconds, "ratios": ratios}
    return out


if __name__ == "__main__":
    main()
