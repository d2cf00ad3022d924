"""This program against what people run today, in turns: processor time of one thread.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/speed/peers.py

``throughput``: against split LoRA as it is usually written (naive.py), which counts only if it does
0.70 to 0.90 of PEFT's tokens in the same run: it must be no straw man.
``lengths``: the same with texts as long as Shakespeare's speeches, which it pads to 512 or to 128.
``peft``: against PEFT as it comes, and under autocast. Then runs `flexp bench all`. Writes
results/speed.json, of which tables.py makes docs/explanation/speed.md.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from naive import Split
from stacks import Peft
from transformers.utils import logging

from flexp import assets
from flexp.bench import machine as machines
from flexp.bench.clock import Samples, Work, in_turns
from flexp.bench.job import DTYPES, STANDARD, Job, at_work, step
from flexp.bench.rows import Gate, Row
from flexp.data import sources
from flexp.data.examples import IGNORED, Batch, Examples, pad
from flexp.data.tokens import open_tokenizer
from flexp.dice import Dice

ROOT = Path(__file__).resolve().parents[2]
CLIENTS, ROUNDS, TEXTS = 4, 5, 8
STEPS = 20  # of the comparison with eager PyTorch
LEAST, MOST = 0.70, 0.90  # of PEFT's tokens, for a baseline that counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "speed.json")
    parser.add_argument("--only", choices=["peers", "program"])
    asked = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"command": "make bench-speed", "parts": {}}
    if asked.out.is_file():
        found = json.loads(asked.out.read_text("utf-8"))
    for name, work in {"peers": peers, "program": program}.items():
        if asked.only in (None, name):
            begun, at = facts(), time.monotonic()
            rows = work()
            machine = rows[0]["machine"]
            for row in rows:
                del row["machine"]
            minutes = round((time.monotonic() - at) / 60, 1)
            part = {**begun, "minutes": minutes, "machine": machine, "rows": rows}
            found["parts"][name] = part
            asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def facts() -> dict[str, Any]:
    """What a result depends on: commit, date and load."""
    commit, changed = (
        subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for words in (
            ["rev-parse", "HEAD"],
            ["status", "--porcelain", "--untracked-files=no", "src", "benchmarks/speed"],
        )
    )
    return {
        "commit": commit.strip(),
        "changed": bool(changed),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "load": [round(n, 2) for n in os.getloadavg()],
        "job": STANDARD.told,
    }


def program() -> list[dict[str, Any]]:
    """`flexp bench all`, in a process of its own."""
    command = [sys.executable, "-m", "flexp.cli", "bench", "all", "--json"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)["rows"]


def peers() -> list[dict[str, Any]]:
    """Rows against others."""
    machine = machines.measured()
    rows = [row.plain(machine) for row in [*equal_shape(STANDARD), *lengths(STANDARD)]]
    for row in rows:
        print(row["name"], row["value"], row["target"], row["ok"], row["details"], flush=True)
    return rows


# ---- S1 and S3: equal shapes


def equal_shape(job: Job) -> list[Row]:
    """Four clients, a step each, in all programs."""
    batches = [job.batch(n) for n in range(CLIENTS)]
    naive, plain = Split(job, CLIENTS), Peft(job, CLIENTS)
    tuned = Peft(job, CLIENTS, bf16=True)
    with ExitStack() as stack:
        works: dict[str, Work] = {
            "naive": partial(all_of, [partial(of_naive, naive, n, b) for n, b in each(batches)]),
            "peft": partial(all_of, [partial(plain.step, n, b) for n, b in each(batches)]),
            "autocast": partial(all_of, [partial(tuned.step, n, b) for n, b in each(batches)]),
        }
        for dtype in DTYPES:
            place = stack.enter_context(at_work(job, job.backbone(dtype), CLIENTS))
            pairs = zip(place.desks.values(), batches, strict=True)
            works[dtype] = partial(all_of, [partial(step, desk, batch) for desk, batch in pairs])
        took = in_turns(works, ROUNDS)
    tokens = CLIENTS * job.tokens
    details: dict[str, Any] = {
        "tokens_per_cpu_second": {k: round(tokens / held.seconds, 1) for k, held in took.items()},
        "tokens_per_wall_second": {
            k: round(tokens / held.wall_seconds, 1) for k, held in took.items()
        },
    }
    details["limit"] = limits(job)
    share = 1 / took["naive"].over(took["peft"])
    details["naive_of_peft"] = round(share, 3)
    details["valid"] = LEAST <= share <= MOST
    right, counts = as_eager(job), naive_gate(share)
    gate = Gate(f"{right.what}; {counts.what}", max(right.value / right.most, counts.value), 1.0)
    split = "times the tokens of split LoRA as usually written, equal shapes, {}"
    stock = "times the tokens of PEFT as it comes, {}"
    return [
        against(
            "throughput.bf16", took, "naive", "bf16", (split, 6.2, 8.2), gate=gate, details=details
        ),
        against(
            "throughput.fp32", took, "naive", "fp32", (split, 3.1, 4.1), gate=gate, details=details
        ),
        against("peft.bf16", took, "peft", "bf16", (stock, 5.0, 6.6), gate=right, details=details),
        against("peft.fp32", took, "peft", "fp32", (stock, 2.5, 3.3), gate=right, details=details),
        against(
            "peft.autocast",
            took,
            "autocast",
            "bf16",
            ("times the tokens of PEFT under bf16 autocast, {}", 2.1, 2.8),
            gate=right,
            details=details,
        ),
    ]


def each(batches: Sequence[Batch]) -> list[tuple[int, Batch]]:
    return list(enumerate(batches))


def all_of(works: Sequence[Callable[[], object]]) -> None:
    for work in works:
        work()


def of_naive(naive: Split, client: int, batch: Batch) -> float:
    return naive.step(client, batch.inputs["input_ids"], batch.labels)


def against(
    name: str,
    took: Mapping[str, Samples],
    other: str,
    ours: str,
    told: tuple[str, float, float],
    *,
    gate: Gate,
    details: Mapping[str, Any],
) -> Row:
    """How many times as much we do in the same time."""
    what, target, floor = told
    limit = details["limit"][ours] / details["tokens_per_cpu_second"][other]
    more = {
        "limit_here": round(limit, 2),
        "wall_ratio": round(took[other].wall_over(took[ours]), 3),
        "spread": took[other].spread(took[ours]),
    }
    ratio = took[other].over(took[ours])
    shown = what.format(ours)
    return Row(name, ratio, "×", shown, target, floor, gate=gate, details={**details, **more})


def limits(job: Job) -> dict[str, float]:
    """Tokens per second of steps that are nothing but multiplying, as fast as that goes here."""
    peak = machines.peaks(ROUNDS)
    return {d: round(machines.fastest(peak, d) * job.tokens / job.flops, 1) for d in DTYPES}


def naive_gate(share: float) -> Gate:
    """Whether the baseline is neither a straw man nor faster than what it stands for."""
    middle, half = (LEAST + MOST) / 2, (MOST - LEAST) / 2
    what = f"the baseline does {share:.2f} of PEFT's tokens ({LEAST} to {MOST} counts)"
    return Gate(what, abs(share - middle) / half, 1.0)


def as_eager(job: Job) -> Gate:
    """Adapters after some steps in fp32, against PEFT's from the same beginning."""
    small = replace(job, rows=1, length=64)
    body, plain = small.backbone("fp32"), Peft(small, 1)
    plain.put("c0", body.initial(small.adapter, Dice(0)("initial")))
    with at_work(small, body) as place:
        for n in range(STEPS):
            step(place.desk, small.batch(n))
            plain.step(0, small.batch(n))
        mine = place.desk.whole()
    theirs = plain.held("c0")
    worst = max(float((mine[k] - theirs[k].detach()).abs().max()) for k in mine)
    what = f"parameters after {STEPS} steps off eager PyTorch's by {worst:.1e} (most 1e-05)"
    return Gate(what, worst, 1e-5)


# ---- S2: lengths of real texts


def lengths(job: Job) -> list[Row]:
    """Texts as long as speeches: what the program does with them, against padding them."""
    held, known = speeches()
    examples = encoded(job, held)
    real = sum(held)
    padded = {size: padded_to(job, examples, size) for size in (512, 128)}
    naive, gate = Split(replace(job, length=512), 1), Gate("", 1.0, 0.0)
    with ExitStack() as stack:
        works: dict[str, Work] = {
            f"pad {size}": partial(all_of, [partial(of_naive, naive, 0, b) for b in batches])
            for size, batches in padded.items()
        }
        for dtype in DTYPES:
            place = stack.enter_context(at_work(job, job.backbone(dtype), texts=examples))
            place.desk.training = replace(place.desk.training, group_by_length=True)
            works[dtype] = partial(an_epoch, place.desk)
            if dtype == "fp32":
                gate = same_loss(naive, place.desk, examples, padded[128])
        took = in_turns(works, ROUNDS)
    details = {
        "texts": known,
        "lengths": held,
        "tokens_per_cpu_second": {k: round(real / t.seconds, 1) for k, t in took.items()},
        "limit": limits(job),
    }
    what = "times the real tokens of the same baseline, texts padded to {}, {{}}"
    return [
        against(
            f"lengths.{dtype}_{size}",
            took,
            f"pad {size}",
            dtype,
            (what.format(size), target, floor),
            gate=gate,
            details=details,
        )
        for dtype, size, target, floor in (
            ("bf16", 512, 60.0, 95.0),
            ("fp32", 512, 35.0, 48.0),
            ("bf16", 128, 13.0, 20.0),
        )
    ]


def an_epoch(desk: Any) -> None:
    """All texts once, in the batches that the program makes of them."""
    desk.fit(batches=desk.batches(epochs=1))


def same_loss(naive: Split, desk: Any, examples: Examples, padded: Sequence[Batch]) -> Gate:
    """Whether both say the same of all texts before they have learned anything."""
    with torch.no_grad():
        every = desk.task.collate(examples, range(len(examples)))
        mine = float(desk.model.loss(every))
        ids = torch.cat([batch.inputs["input_ids"] for batch in padded])
        labels = torch.cat([batch.labels for batch in padded])
        theirs = float(naive.back(naive.fronts[0](ids), labels))
    return Gate("losses before training, relative", abs(mine - theirs) / theirs, 1e-5)


def speeches() -> tuple[list[int], dict[str, Any]]:
    """Lengths of a few speeches that stand for all: those in the middle of equal parts of them."""
    cache = assets.Cache(assets.default_root(os.environ))
    path = assets.resolve("shakespeare", cache, kind="data")
    rows = sources.shipped("shakespeare", path)
    tokenizer: Any = open_tokenizer(assets.resolve("smollm2-135m", cache))
    texts = [f"{row.fields.get('cue') or ''} {row.fields['text']}" for row in rows[:20000]]
    counts = sorted(len(ids) for ids in tokenizer(texts)["input_ids"])
    some = [n for n in counts if 4 <= n <= 128]
    picked = [some[int((n + 0.5) / TEXTS * len(some))] for n in range(TEXTS)]
    facts = {
        "from": "Shakespeare's speeches after their cues in tokens of SmolLM2, 4 to 128 of them",
        "speeches": len(some),
        "mean": round(sum(some) / len(some), 1),
        "mean_of_picked": sum(picked) / TEXTS,
    }
    return picked, facts


def encoded(job: Job, held: Sequence[int]) -> Examples:
    """Random tokens, as many as there are."""
    ids = [
        tuple(1 + i % (job.vocabulary - 1) for i in Dice(0)("text", n=n).shuffle(size))
        for n, size in enumerate(held)
    ]
    return Examples(tuple(ids), tuple(ids), tuple(f"speech {n}" for n in range(len(ids))))


def padded_to(job: Job, examples: Examples, size: int) -> list[Batch]:
    """Batches in the same order of size, padded to a fixed length."""
    order = Dice(0)("padded").shuffle(len(examples))
    out: list[Batch] = []
    for at in range(0, len(order), job.rows):
        held = [examples.ids[n] for n in order[at : at + job.rows]]
        filled = [(*ids, *([0] * (size - len(ids)))) for ids in held]
        labels = [(*ids, *([IGNORED] * (size - len(ids)))) for ids in held]
        out.append(Batch(pad(filled, 0, "right"), torch.tensor(labels)))
    return out


if __name__ == "__main__":
    main()
