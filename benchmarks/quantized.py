"""What quantized linear maps save, take and cost: bytes, seconds and scores of both demos' models.

    .venv/bin/python benchmarks/quantized.py --json      (12 minutes; --quick: 3)

``memory``: a client alone in a fresh process, with the blocks of a cut or all of them, as in
benchmarks/memory.py: bytes of its weights, resident memory after opening, at the peak of opening
and of three steps, all above that after imports, and the peak that is predicted from the config.
``step``: training steps of the whole model in one process on one thread, the forms in turns (A B C
A B C); medians of processor seconds, which other work on the machine disturbs less than the clock.
``score``: the demo's recipe in float32 with fewer clients and rounds, before and after.
Writes results/quantized.json, of which tables.py makes a table of docs/how-to/cuts.md. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from lone_client import Case, batch, opened, seated, size
from memory import compared
from transformers.utils import logging

from flexp import assets, commands
from flexp import run as running
from flexp.demonstration import variants
from flexp.events import Stream
from flexp.model.skeleton import skeleton
from flexp.recipe import Recipe
from flexp.recipe_file import make, override
from flexp.stage import opened as prepared
from flexp.stage import survey, with_method

HERE = Path(__file__).parent
FORMS: tuple[Literal["none", "int8", "nf4"], ...] = ("none", "int8", "nf4")


@dataclass(frozen=True)
class Job:
    """A model with a client's case, and the demo that is scored, with what is changed in it."""

    case: Case
    demo: str
    changes: tuple[str, ...]
    quick: tuple[str, ...]


def jobs(cache: assets.Cache) -> dict[str, Job]:
    """The demos' models; shapes of batches are the demos'."""
    minilm, smol = (str(assets.fetch(name, cache)) for name in ("minilm", "smollm2-135m"))
    return {
        "minilm": Job(
            Case("minilm", minilm, "classification", (2, 1), 8, 24),
            "quick",
            ("rounds=8", "data.clients=8"),
            ("rounds=3", "data.clients=4"),
        ),
        "smollm2-135m": Job(
            Case("smollm2-135m", smol, "causal-lm", (2, 1), 4, 64, mode="fast"),
            "shakespeare",
            ("rounds=2", "data.biggest=4", "model.dtype=float32"),
            ("rounds=1", "data.biggest=2", "model.dtype=float32"),
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="models whose name has this")
    parser.add_argument("--quick", action="store_true", help="fewer steps, clients and rounds")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "quantized.json")
    parser.add_argument("--json", action="store_true", help="print the result as well")
    asked = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    began, load = time.monotonic(), os.getloadavg()
    found: dict[str, Any] = {}
    text, command = "", "python benchmarks/quantized.py"
    command += (" --quick" if asked.quick else "") + (f" --only {asked.only}" if asked.only else "")
    for name, job in jobs(assets.Cache(assets.default_root(os.environ))).items():
        if asked.only not in name:
            continue
        changes = job.quick if asked.quick else job.changes
        found[name] = {
            "changes": changes,
            "step": steps(job.case, 5 if asked.quick else 15),
            "score": scores(job.demo, changes),
            "memory": memory(job.case),
        }
        result = {
            "command": command,
            "facts": commands.facts(),
            "load": load,
            "models": found,
            "minutes": round((time.monotonic() - began) / 60, 1),
        }
        text = json.dumps(result, indent=1)
        asked.out.write_text(text + "\n", encoding="utf-8")
    if asked.json:
        sys.stdout.write(text + "\n")


def memory(case: Case) -> dict[str, Any]:
    """Each form at the case's cut, and with the whole model."""
    whole = replace(case, cut=(skeleton(case.source, case.task).depth, 0))
    return {
        where: {form: compared(replace(at, quantize=form)) for form in FORMS}
        for where, at in (("cut", case), ("whole", whole))
    }


def steps(case: Case, count: int) -> dict[str, Any]:
    """Seconds of a training step of the whole model, and its bytes, of each form."""
    depth = skeleton(case.source, case.task).depth
    case = replace(case, cut=(depth, 0))
    clients = {form: opened(replace(case, quantize=form), depth) for form in FORMS}
    desks = {form: seated(client, case) for form, client in clients.items()}
    each: dict[str, list[float]] = {form: [] for form in FORMS}
    vocabulary = int(clients["none"].backbone.config.vocab_size)
    for step in range(count + 1):  # the first warms up
        given = batch(case, vocabulary, step)
        for form, desk in desks.items():
            began = time.process_time()
            desk.fit(batches=iter([given]))
            each[form] += [time.process_time() - began] if step else []
    seconds = {form: statistics.median(taken) for form, taken in each.items()}
    return {
        form: {
            "bytes": size(clients[form].backbone),
            "seconds": seconds[form],
            "ratio": seconds[form] / seconds["none"],
            "each": each[form],
        }
        for form in FORMS
    }


def scores(demo: str, changes: tuple[str, ...]) -> dict[str, Any]:
    """Means over clients, on own and everybody's test rows: of the base model, and trained."""
    plain = variants(demo, 0)["flexp"].plain()
    found: dict[str, Any] = {}
    for form in FORMS:
        recipe = make(override(plain, [*changes, f"model.quantize={form}"]), demo)
        stage = prepared(survey(recipe, assets.Cache(assets.default_root(os.environ))))
        base = make(override(recipe.plain(), ["strategy={name: base}", "rounds=1"]), demo)
        found[form] = {
            "before": played(with_method(stage, base), base),
            "after": played(stage, recipe),
        }
        stage.engine.close()
    return found


def played(stage: Any, recipe: Recipe) -> dict[str, float]:
    """The mean of every metric after a run."""
    result = running.run(stage, Stream())
    assert result.stage.recipe.strategy.name == recipe.strategy.name
    return {
        f"{s.cell.split('/')[1]} {s.metric}": s.value for s in result.scores if s.client == "all"
    }


if __name__ == "__main__":
    main()
