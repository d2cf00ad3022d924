"""A client that writes its messages by hand, at a server of its own."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from toys import backbone, batches_for, toy_task

from flexp.dice import Dice
from flexp.link.messages import Answer, Backward, Forward, Join, Phase, StepKey
from flexp.model.adapter import Lora
from flexp.model.backbone import Backbone
from flexp.model.cut import Cut, Seat
from flexp.model.ops import Assign, Optim, SlotSpec
from flexp.server.tenants import Tenants
from flexp.server.trunk import Trunk
from flexp.tensors import Tensors, Term

KIND = Lora(rank=3, alpha=6.0)
U, V = Seat(Cut(1, 1)), Seat(Cut(2), "loss")
DOUBLE = Assign("personal", (Term("personal", 2.0),))


@functools.cache
def body() -> Backbone:
    return backbone()


@functools.cache
def initial(spec: SlotSpec, rank: int | None = None) -> Tensors:
    """Random everywhere, so that every tensor has a gradient."""
    stream = Dice(7)("drawn")
    start = body().initial(spec.kind or KIND, Dice(0), rank)
    return {
        k: v + 0.1 * torch.randn(v.shape, generator=stream("tensor", name=k).generator())
        for k, v in start.items()
    }


@dataclass(eq=False)
class Wire:
    """A client that writes its messages by hand."""

    trunk: Trunk
    client: str
    seat: Seat
    calls: int = 0
    batch: Any = field(default_factory=lambda: batches_for(body(), 1)[0])

    def key(self, phase: Phase, step: int = 0, call: int | None = None) -> StepKey:
        if call is None:
            self.calls += 1
            call = self.calls
        return StepKey("run", 0, 0, step, call, phase)

    def send(self, message: Any, digest: str = "") -> Answer:
        return self.trunk.handle(self.client, message, digest)

    def join(self) -> Answer:
        return self.send(Join(self.key("join"), self.seat, {"personal": Optim("sgd", lr=0.5)}))

    def forward(self, step: int = 0, **changes: Any) -> Forward:
        inputs = dict(self.batch.inputs)
        with torch.no_grad():
            hidden = body().run(inputs, last=self.seat.cut.front)
        return replace(
            Forward(
                self.key("forward", step),
                "personal",
                None,
                "hidden" if self.seat.labels == "keep" else self.seat.labels,
                hidden,
                (),
                {k: tuple(v.shape) for k, v in inputs.items()},
                inputs["attention_mask"],
                self.batch.labels if self.seat.labels == "loss" else None,
                None,
                keep=True,
            ),
            **changes,
        )

    def backward(self, of: Forward, grad: Tensor, step: int | None = None) -> Backward:
        at = of.key.step if step is None else step
        return Backward(self.key("backward", at, of.key.call), grad, hidden=True)

    def held(self, slot: str = "personal") -> Tensors:
        return {k: v.clone() for k, v in self.trunk.tenants.take(self.client, [slot])[slot].items()}


def served(*seats: Seat, spec: SlotSpec = SlotSpec()) -> tuple[Trunk, list[Wire]]:  # noqa: B008
    """A server with a client at each of these seats."""
    tenants = Tenants(body(), initial)
    trunk = Trunk(body(), tenants, toy_task(body()))
    wires = [Wire(trunk, f"c{n}", seat) for n, seat in enumerate(seats)]
    for wire in wires:
        tenants.join(wire.client, wire.seat, {"personal": spec})
    return trunk, wires
