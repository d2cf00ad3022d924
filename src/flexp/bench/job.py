"""The standard job that all speeds are told of, and clients at work on it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from flexp import libraries
from flexp.client.desk import Desk, Training
from flexp.data.examples import Batch, Examples, Shard
from flexp.data.tasks import CausalLM
from flexp.dice import Dice
from flexp.engine.base import Assignment
from flexp.engine.local import LocalEngine
from flexp.link.messages import Link
from flexp.link.metered import Ledger
from flexp.link.wire import Wire
from flexp.model.adapter import Lora
from flexp.model.backbone import Backbone
from flexp.model.cut import Cut, Seat
from flexp.model.ops import Optim
from flexp.parcel import Parcel
from flexp.strategies.base import Turn
from flexp.strategies.local import Local
from flexp.tensors import Tensors

DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
LR = 1e-4
TOKENIZER: Any = SimpleNamespace(pad_token_id=0, eos_token_id=0)  # texts come encoded

Wrap = Callable[[str, Link], Link]


@dataclass(frozen=True)
class Job:
    """A decoder with random weights, LoRA on its attention's projections, and one batch's shape.

    The client runs the first ``cut`` blocks and the head; the server runs the rest.
    """

    depth: int = 8
    width: int = 512
    heads: int = 8
    vocabulary: int = 8192
    rank: int = 8
    cut: int = 2
    rows: int = 4
    length: int = 128

    @property
    def tokens(self) -> int:
        """Tokens of a step of one client."""
        return self.rows * self.length

    @property
    def seat(self) -> Seat:
        """Where the client sits."""
        return Seat(Cut(self.cut))

    @property
    def adapter(self) -> Lora:
        """What is trained."""
        return Lora(self.rank, 2.0 * self.rank, targets=("c_attn",))

    @property
    def told(self) -> str:
        """The job in a line."""
        return (
            f"{self.depth} blocks of width {self.width}, vocabulary {self.vocabulary}, LoRA rank "
            f"{self.rank}, cut ({self.cut}, 0), {self.rows} x {self.length} tokens, AdamW"
        )

    @property
    def flops(self) -> int:
        """Operations of a step by hand: forward and the gradient of activations, no weight's.

        Attention is counted as the kernel does it, whole squares of T x T, five products backward.
        """
        maps = self.depth * 12 * self.width**2 + self.vocabulary * self.width
        attention = self.depth * (2 + 5) * 2 * self.length * self.width
        return self.tokens * (4 * maps + attention)

    def model(self) -> nn.Module:
        """The plain model; its weights are the same every time."""
        hf = libraries.transformers()
        config = hf.GPT2Config(
            vocab_size=self.vocabulary,
            n_embd=self.width,
            n_layer=self.depth,
            n_head=self.heads,
            n_positions=max(1024, self.length),
            bos_token_id=0,
            eos_token_id=0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        kept = torch.get_rng_state()  # what it draws is drawn over
        model: nn.Module = hf.GPT2LMHeadModel(config)
        torch.set_rng_state(kept)
        drawn(model, Dice(0)("weights"))
        return model.eval()

    def backbone(self, dtype: str = "fp32", *, fast: bool = True) -> Backbone:
        """The frozen model as the program holds it in its fast mode."""
        model = self.model().to(DTYPES[dtype])
        return Backbone(model, task="causal-lm", name=self.told, fast=fast)

    def batch(self, n: int = 0) -> Batch:
        """Random tokens; other ``n``, other tokens."""
        stream = Dice(0)("batch", n=n).generator()
        ids = torch.randint(1, self.vocabulary, (self.rows, self.length), generator=stream)
        return Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids)

    def adapted(self, body: Backbone) -> Tensors:
        """An adapter in the middle of training: both factors of its pairs are there."""
        begun = body.initial(self.adapter, Dice(0)("initial"))
        return {
            k: 0.02 * torch.randn(v.shape, generator=Dice(0)("far", name=k).generator())
            if ".lora_B." in k
            else v
            for k, v in begun.items()
        }


def drawn(model: nn.Module, dice: Dice) -> None:
    """Fills a model: matrices normal, gains one, biases zero."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() > 1:
                value.normal_(0.0, 0.02, generator=dice("fill", name=name).generator())
            else:
                value.fill_(1.0 if name.endswith("weight") else 0.0)


STANDARD = Job()
SMALL = Job(depth=4, width=32, heads=2, vocabulary=64, rank=2, cut=1, rows=2, length=8)


@dataclass(frozen=True)
class Scale:
    """How much is measured: the job, interleaved rounds, and numbers of clients and adapters."""

    job: Job = STANDARD
    rounds: int = 7
    fleets: tuple[int, ...] = (8, 32, 128)
    tenants: int = 1000
    adapters: int = 1000
    starts: int = 5


FULL = Scale()
TINY = Scale(SMALL, rounds=1, fleets=(2,), tenants=12, adapters=20, starts=1)


@dataclass(frozen=True)
class Place:
    """Clients at their desks, all at the same time, over one engine."""

    engine: LocalEngine
    desks: Mapping[str, Desk] = field(default_factory=dict[str, Desk])
    ledgers: Mapping[str, Ledger] = field(default_factory=dict[str, Ledger])

    @property
    def desk(self) -> Desk:
        """The desk of the only client."""
        (desk,) = self.desks.values()
        return desk

    @property
    def ledger(self) -> Ledger:
        """What crossed the link of the only client."""
        (ledger,) = self.ledgers.values()
        return ledger


@contextmanager
def at_work(
    job: Job,
    body: Backbone,
    clients: int = 1,
    *,
    seat: Seat | None = None,
    wrap: Wrap = lambda client, link: link,
    wire: Wire = "fp32",
    adapter: Tensors | None = None,
    texts: Examples | None = None,
    cache: int = 0,
) -> Generator[Place]:
    """Opens the turns of some clients, who all have these ``texts``, if any.

    ``adapter`` is what all begin with, else the beginning. ``cache``: bytes of ``train.cache``.
    """
    names = [f"c{n}" for n in range(clients)]
    engine = LocalEngine(
        body,
        CausalLM(TOKENIZER),
        {name: Shard(texts or Examples()) for name in names},
        kind=job.adapter,
        training=Training(Optim(lr=LR), batch=job.rows, cache=cache),
        dice=Dice(0),
        profile="open",
        wrap=wrap,
        wires=dict.fromkeys(names, wire),
    )
    seats = dict.fromkeys(names, seat or job.seat)
    turn = Turn(0, 1, 0, True, seats, {}, body.block_of, body.depth)
    offer = Parcel() if adapter is None else Parcel({"personal": adapter})
    desks, ledgers = dict[str, Desk](), {name: Ledger() for name in names}
    try:
        with ExitStack() as stack:
            for name in names:
                work = Assignment(name, seats[name], offer)
                visit = engine.visit(Local(), work, turn, ledgers[name])
                desks[name] = stack.enter_context(visit)[0]
            yield Place(engine, desks, ledgers)
    finally:
        engine.close()


def step(desk: Desk, *batches: Batch, **how: Any) -> float:
    """One training step for each batch; the mean loss."""
    return float(str(desk.fit(batches=iter(batches), **how)["loss"]))
