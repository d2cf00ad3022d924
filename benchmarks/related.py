"""The seven related systems beside local and fedavg, each by its own recipe.

    .venv/bin/python benchmarks/related.py [--only pfsl-1,phsfl] [--seeds 0]

Runs `flexp compare` on every recipe of recipes/methods, one after another, and keeps what the table
is made of, and the scores of the method's own runs after each round that was scored. Writes
results/related.json after each recipe; what is there stays if a recipe is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from protocol import HERE, say

from flexp import commands, recipe_file
from flexp.evaluate import EVERYBODY
from flexp.events import Scored, read_timed

RECIPES = HERE.parent / "recipes" / "methods"
OUT = HERE / "results" / "related.json"
OWN = "/own/"
KEPT = ("own", "global", "own_loss", "global_loss", "gain", "gain_global", "sent_bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="names of recipes, with commas")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--runs", type=Path, default=HERE.parent / "runs" / "related")
    asked = parser.parse_args()
    files = {file.stem: file for file in sorted(RECIPES.glob("*.yaml"))}
    wanted = asked.only.split(",") if asked.only else list(files)
    if unknown := set(wanted) - set(files):
        parser.error(f"no recipe in recipes/methods is called {', '.join(sorted(unknown))}")
    for name in wanted:
        found = compared(files[name], asked.seeds, asked.runs / name)
        held: dict[str, Any] = {}
        if OUT.exists():
            held = json.loads(OUT.read_text("utf-8"))["recipes"]
        whole = {
            "command": f"python benchmarks/related.py --seeds {asked.seeds}",
            "facts": commands.facts(),
            "recipes": dict(sorted({**held, name: found}.items())),
        }
        OUT.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        say(json.dumps({name: {m: row["own"]["mean"] for m, row in found["summary"].items()}}))


def compared(file: Path, seeds: str, out: Path) -> dict[str, Any]:
    """What a recipe's method, local and fedavg came to, and how the method got there."""
    method = recipe_file.read(file).strategy.name
    command = [
        *(str(Path(sys.executable).parent / "flexp"), "compare", str(file), "--json", "--resume"),
        *("--methods", f"local,fedavg,{method}", "--seeds", seeds, "--jobs", "2", f"out={out}"),
    ]
    document = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    whole = Path(document["out"])
    runs = [whole / method / f"seed-{seed}" for seed in document["seeds"]]
    return {
        "method": method,
        "seeds": document["seeds"],
        "metric": document["metric"],
        "summary": {
            label: {key: row[key] for key in KEPT} for label, row in document["summary"].items()
        },
        "seconds": statistics.fmean(seconds(run) for run in runs),
        "rounds": scored(runs),
    }


def seconds(run: Path) -> float:
    """From a run's first event to its last."""
    times = [at for at, _ in read_timed(next(run.rglob("events.jsonl")))]
    return times[-1] - times[0]


def scored(runs: list[Path]) -> dict[str, dict[str, float]]:
    """Mean over runs of what was scored on own data, the mean over clients, by round and metric."""
    values: dict[int, dict[str, list[float]]] = {}
    for run in runs:
        for _, event in read_timed(next(run.rglob("events.jsonl"))):
            if isinstance(event, Scored) and event.client == EVERYBODY and OWN in event.cell:
                cell = values.setdefault(event.round, {}).setdefault(event.metric, [])
                cell.append(event.value)
    return {
        str(at): {metric: statistics.fmean(held) for metric, held in sorted(each.items())}
        for at, each in sorted(values.items())
    }


if __name__ == "__main__":
    main()
