"""A server's trunk alone, and clients that send it random hidden states and gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flexp.bench.job import LR, TOKENIZER, Job
from flexp.data.tasks import CausalLM
from flexp.dice import Dice
from flexp.link.messages import Backward, Do, Forward, Leave, Phase, StepKey
from flexp.model.backbone import Backbone
from flexp.model.cut import Seat
from flexp.model.ops import Grad, Op, Optim, SlotSpec, Step
from flexp.selection import ALL
from flexp.server.tenants import Tenants
from flexp.server.trunk import Trunk
from flexp.tensors import Tensors

SPECS = {"personal": SlotSpec(lasts="run", moments="keep", optim=Optim(lr=LR))}
STEP: tuple[Op, ...] = (Grad(("personal",), ("personal@g",)), Step("personal", "personal@g"))


class Server:
    """Tenancies and a trunk; clients are numbers. ``begun`` is what all begin with."""

    def __init__(
        self,
        job: Job,
        body: Backbone,
        begun: Tensors,
        seats: Callable[[int], Seat] | None = None,
        *,
        together: bool = False,
    ) -> None:
        self.job, self.body, self.begun = job, body, begun
        self.seats: Callable[[int], Seat] = seats or self._where_the_job_says
        self.tenants = Tenants(body, lambda spec, rank: begun)
        self.trunk = Trunk(body, self.tenants, CausalLM(TOKENIZER), together=together)

    def _where_the_job_says(self, n: int) -> Seat:
        del n
        return self.job.seat

    def sits(self, n: int) -> None:
        """Opens a client's turn."""
        self.tenants.join(name(n), self.seats(n), SPECS, alpha=self.job.adapter.alpha)

    def forward(self, n: int, step: int, hidden: Tensor, ops: Sequence[Op] = ()) -> Tensor:
        """What the trunk makes of a hidden state."""
        shape = (int(hidden.shape[0]), int(hidden.shape[1]))
        message = Forward(
            key(step, "forward"),
            wear="personal",
            train={"personal": ALL},
            until="hidden",
            hidden=hidden,
            coefs=(),
            shapes={"input_ids": shape, "attention_mask": shape},
            mask=torch.ones(shape, dtype=torch.int64),
            labels=None,
            dropout=None,
            keep=True,
            ops=tuple(ops),
        )
        return self.trunk.handle(name(n), message).tensors["hidden"]

    def backward(self, n: int, step: int, slope: Tensor) -> Tensor:
        """The gradient of the hidden state, from that of the result."""
        message = Backward(key(step, "backward"), slope, hidden=True)
        return self.trunk.handle(name(n), message).tensors["grad"]

    def moves(self, n: int, step: int) -> None:
        """The optimizer's step."""
        self.trunk.handle(name(n), Do(key(step, "do"), STEP))

    def goes(self, n: int, step: int) -> None:
        """Ends a client's turn, and the round with it."""
        self.trunk.handle(name(n), Leave(key(step, "leave")))
        self.tenants.commit(name(n))
        self.trunk.commit()

    def drawn(self, n: int, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """A hidden state and a gradient; the same for the same client."""
        stream = Dice(0)("server", n=n).generator()
        shape = (rows, length, self.body.width)
        hidden, slope = (torch.randn(shape, generator=stream).to(self.body.dtype) for _ in "hg")
        return hidden, slope

    def place(self, tensor: str) -> Any:
        """Where a tensor sits, for the first client."""
        return self.body.place(tensor, self.seats(0))

    def close(self) -> None:
        """Stops the trunk's thread."""
        self.trunk.close()


def name(n: int) -> str:
    """A client's."""
    return f"c{n}"


def key(step: int, phase: Phase) -> StepKey:
    """A message's."""
    return StepKey("bench", 0, 0, step, 1, phase)
