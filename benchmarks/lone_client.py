"""One client alone in its process: how much memory it takes to train a few steps."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from checkpoints import CLASSES
from transformers.utils import logging

from flexp.client.desk import Desk, Training
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
from flexp.model.quantize import Quantize
from flexp.model.skeleton import TaskKind, bare, read_config
from flexp.strategies.local import Local

STEPS = 3


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
    recompute: int = 0
    accumulate: int = 1
    threads: int = 1
    quantize: Literal["none", "int8", "nf4"] = "none"

    @property
    def seat(self) -> Seat:
        """The client's seat."""
        return Seat(
            Cut(*self.cut), self.labels, recompute=self.recompute, accumulate=self.accumulate
        )


def read_case(text: str) -> Case:
    """A case from the command line."""
    held: dict[str, Any] = json.loads(text)
    held["cut"] = tuple(held["cut"])
    return Case(**held)


def measured(case: Case) -> dict[str, Any]:
    """Bytes: resident after imports, and the peak above that after some steps."""
    give_back()
    torch.set_num_threads(case.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = read_config(case.source, case.task, CLASSES, None)
    depth = bare(config, case.task).depth  # imports the family's own module
    before = memory("VmRSS")
    client = opened(case, depth)
    held, opening = memory("VmRSS"), memory("VmHWM")
    desk = seated(client, case)
    began = time.monotonic()
    for step in range(STEPS):
        facts = desk.fit(batches=iter([batch(case, client.backbone.config.vocab_size, step)]))
        if facts["skipped"]:
            raise RuntimeError("A loss was not finite.")
    seconds = (time.monotonic() - began) / STEPS
    most = memory("VmHWM")
    return {
        "weights": sum(size(client.backbone).values()),
        "opened": held - before,
        "opening_peak": opening - before,
        "peak": most - before,
        "absolute_peak": most,
        "step_seconds": round(seconds, 2),
    }


def size(body: Backbone) -> dict[str, int]:
    """Bytes of a backbone's parameters and buffers, codes of quantized weights among them."""
    held = {id(t): t.nbytes for t in (*body.model.parameters(), *body.model.buffers())}
    inside = body.model.get_submodule(body.blocks_path)
    blocks = {id(t): t.nbytes for t in (*inside.parameters(), *inside.buffers())}
    return {"blocks": sum(blocks.values()), "outside": sum(held.values()) - sum(blocks.values())}


def seated(client: Client, case: Case) -> Desk:
    """The client's desk, with nobody at the other end."""
    strategy = Local()
    desk, _ = client.open(
        LocalLink("me", Mirror(case.labels)),
        case.seat,
        client.training.specs(strategy.slots),
        leaves=strategy.leaves,
        run="memory",
        round=0,
        wave=0,
    )
    return desk


def opened(case: Case, depth: int) -> Client:
    """The client with the blocks that are its own."""
    front, back = case.cut
    body = Backbone.open(
        case.source,
        task=case.task,
        classes=CLASSES,
        dtype=getattr(torch, case.dtype),
        blocks=frozenset([*range(front), *range(depth - back, depth)]),
        fast=case.mode == "fast",
        quantize=None if case.quantize == "none" else Quantize(case.quantize, Lora()),
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
            return Answer(facts={"offered": {}, "facts": {}, "moved": None})
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


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measured(read_case(sys.argv[1]))) + "\n")
