"""Whole rounds in one process, on all cores, with and without what mode fast does beside them.

    .venv/bin/python benchmarks/speed/rounds.py

``abreast``: clients abreast and the trunk's joint passes. ``wide``: bfloat16 weights multiplied in
float32 where the processor is faster that way. ``before``: neither. The ways take turns (A B C A B
C); seconds are medians of the rounds' wall time. The jobs are the recipes of both demos, with fewer
rounds. Writes results/rounds.json, of which tables.py makes a table of docs/explanation/speed.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from flexp import assets, commands, precision
from flexp import run as running
from flexp.demonstration import variants
from flexp.events import Event, Merged, RoundStarted, Stream
from flexp.recipe import Recipe
from flexp.stage import opened, survey

ROOT = Path(__file__).resolve().parents[2]
WAYS = {"before": (False, False), "abreast": (True, False), "abreast, wide": (True, True)}


@contextmanager
def wide(allowed: bool) -> Generator[None]:
    """Within this, products are made in float32 where that is faster, or never."""
    plain = precision.wide_is_faster
    if not allowed:
        precision.wide_is_faster = lambda: False  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        precision.wide_is_faster = plain


def played(recipe: Recipe, way: str) -> dict[str, Any]:
    """Seconds of each round, of the scoring at the end, and the scores."""
    abreast, widens = WAYS[way]
    stage = opened(survey(recipe, assets.Cache(assets.default_root(os.environ))))
    stage.engine.trunk.together = abreast
    marks: list[float] = []

    def note(event: Event) -> None:
        if isinstance(event, RoundStarted | Merged):
            marks.append(time.perf_counter())

    stream = Stream()
    stream.subscribe(note)
    with wide(allowed=widens):
        result = running.run(stage, stream)
    over = time.perf_counter()
    stage.engine.close()
    rounds = [b - a for a, b in zip(marks[::2], marks[1::2], strict=True)]
    mean = {s.metric: s.value for s in result.scores if s.client == "all" and "own" in s.cell}
    return {"rounds": rounds, "scoring": over - marks[-1], "scores": mean}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "rounds.json")
    parser.add_argument("--repeats", type=int, default=2)
    asked = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(os.cpu_count() or 1)
    jobs = {
        name: variants(name, 0)["flexp"].model_copy(update={"rounds": rounds})
        for name, rounds in (("quick", 3), ("shakespeare", 1))
    }
    found: dict[str, Any] = {
        "command": "python benchmarks/speed/rounds.py",
        "facts": commands.facts(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
        "jobs": {},
    }
    began = time.monotonic()
    for job, recipe in jobs.items():
        held: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for _ in range(asked.repeats):
            for way, runs in held.items():
                runs.append(played(recipe, way))
        first = _seconds(held["before"])
        found["jobs"][job] = {
            way: {
                "round_seconds": _seconds(runs),
                "ratio": first[0] / _seconds(runs)[0],
                "scoring_ratio": first[1] / _seconds(runs)[1],
                "scores": runs[-1]["scores"],
                "each": [run["rounds"] for run in runs],
            }
            for way, runs in held.items()
        }
    found["minutes"] = round((time.monotonic() - began) / 60, 1)
    asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _seconds(runs: list[dict[str, Any]]) -> tuple[float, float]:
    """Of a round, and of scoring everybody: medians."""
    rounds = [seconds for run in runs for seconds in run["rounds"]]
    return statistics.median(rounds), statistics.median(run["scoring"] for run in runs)


if __name__ == "__main__":
    main()
