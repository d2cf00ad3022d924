"""The share of whole rounds' processor time that is spent inside the model (S13)."""

from __future__ import annotations

import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any, cast

from flexp import assets, libraries, recipe_file
from flexp import run as running
from flexp.bench.job import Job, Scale
from flexp.bench.machine import Machine
from flexp.bench.rows import Gate, Row
from flexp.bench.watch import watched
from flexp.dice import Dice
from flexp.events import Event, Stream, TurnEnded, TurnFailed
from flexp.stage import prepare

STEPS, BATCH, LENGTH = 2, 4, 32
# Rows of a client and their words. Everybody is tested on everybody's rows, so these are short.
SPLITS = {"train": (STEPS * BATCH, LENGTH - 1), "validation": (1, 7), "test": (1, 7)}
WHAT = "of the processor time of whole rounds is inside the model, with {} clients"


def simulate(scale: Scale, machine: Machine) -> list[Row]:
    """Runs of `flexp`, the method: sampling, training, merging, a checkpoint, evaluation."""
    dtype = {"bf16": "bfloat16", "fp32": "float32"}[machine.faster]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        written(scale.job, folder / "model")
        return [rounds(scale.job, folder, clients, dtype) for clients in scale.fleets]


def rounds(job: Job, folder: Path, clients: int, dtype: str) -> Row:
    """One round of so many clients."""
    texts(job, folder / f"data-{clients}", clients)
    recipe = recipe_file.make(plain(job, folder, clients, dtype), "bench")
    stage = prepare(recipe, assets.Cache(folder / "assets"))
    stream, turns = Stream(), Turns()
    stream.subscribe(turns)
    try:
        with watched() as watch:
            wall, cpu = time.perf_counter(), time.process_time()
            result = running.run(stage, stream, out=folder / f"run-{clients}")
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    finally:
        stage.engine.close()
    odd = sum(not math.isfinite(s.value) for s in result.scores)
    gate = Gate(
        "turns that failed or are missing, and odd scores", turns.missing(clients) + odd, 0.0
    )
    details = {
        "method": recipe.strategy.name,
        "batch": f"{BATCH} x {LENGTH} tokens, {STEPS} steps",
        "dtype": str(stage.backbone.dtype).removeprefix("torch."),
        "cpu_seconds": round(cpu, 2),
        "wall_seconds": round(wall, 2),
        "cpu_seconds_per_client": round(cpu / clients, 4),
    }
    share = 100 * watch.seconds / cpu
    name, what = f"simulate.{clients}", WHAT.format(clients)
    return Row(name, share, "%", what, 90.0, 100.0, gate=gate, details=details)


class Turns:
    """A sink that counts turns that ended and turns that failed."""

    def __init__(self) -> None:
        self.ended = self.failed = 0

    def __call__(self, event: Event) -> None:
        self.ended += isinstance(event, TurnEnded)
        self.failed += isinstance(event, TurnFailed)

    def missing(self, clients: int) -> int:
        """Turns that failed or never were, of one round of so many clients."""
        return self.failed + abs(clients - self.ended)


def plain(job: Job, folder: Path, clients: int, dtype: str) -> dict[str, Any]:
    """The recipe."""
    return {
        "name": f"bench-{clients}",
        "rounds": 1,
        "mode": "fast",
        "data": {"path": str(folder / f"data-{clients}")},
        "task": {"kind": "causal-lm", "max_length": min(LENGTH, job.length)},
        "model": {"source": str(folder / "model"), "dtype": dtype},
        "adapter": {"rank": job.rank, "alpha": 2.0 * job.rank, "targets": ["c_attn"]},
        "train": {"steps": STEPS, "batch": BATCH, "lr": 1e-3},
        "plan": {"cut": [job.cut, 0]},
        "evaluate": {"global_rows": 1},
        "out": str(folder / "runs"),
    }


def written(job: Job, folder: Path) -> None:
    """The model in a folder, with a tokenizer of one word per id."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    cast(Any, job.model()).save_pretrained(folder)
    words = ["[END]", "[UNK]", *(f"w{n}" for n in range(job.vocabulary - 2))]
    ids = {word: n for n, word in enumerate(words)}
    made: Any = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    kind = libraries.transformers().PreTrainedTokenizerFast
    ends = {"eos_token": "[END]", "pad_token": "[END]", "unk_token": "[UNK]"}
    kind(tokenizer_object=made, **ends).save_pretrained(folder)


def texts(job: Job, folder: Path, clients: int) -> None:
    """Random words, a folder for each client."""
    for n in range(clients):
        mine = folder / f"c{n:03}"
        mine.mkdir(parents=True)
        for split, (rows, words) in SPLITS.items():
            lines = [spoken(job, Dice(0)(split, n=n, row=row), words) for row in range(rows)]
            (mine / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def spoken(job: Job, dice: Dice, words: int) -> str:
    """A row of so many words."""
    picked = dice.shuffle(job.vocabulary - 2)
    return json.dumps({"text": " ".join(f"w{picked[at % len(picked)]}" for at in range(words))})
