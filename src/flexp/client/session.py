"""A client's conversation with the server during one turn: keys, pending operations, egress."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from torch import Tensor

from flexp.link.messages import (
    Answer,
    Backward,
    Continue,
    Do,
    Fetch,
    Forward,
    Join,
    Leave,
    Link,
    Message,
    Phase,
    Put,
    StepKey,
    Submit,
)
from flexp.model.cut import Seat
from flexp.model.far import Ask
from flexp.model.ops import Assign, Op, Optim, Step
from flexp.parcel import Parcel
from flexp.privacy.egress import Egress
from flexp.selection import ALL, Where
from flexp.tensors import BlockScalars, Tensors, Wear


@dataclass
class Session:
    """One turn over a link. Operations wait and ride on the next forward, or go alone.

    ``window`` is how many parts of a batch may be under way at a time; more than one need a link
    that can post. ``posts``: the link can, and a forward may go out before the answers to the
    backwards in front of it are there. ``moves`` counts what was to change which part of a slot.
    """

    link: Link
    egress: Egress
    run: str
    round: int
    wave: int
    window: int = 1
    posts: bool = False
    step: int = 0
    call: int = 0
    talks: int = 0
    waiting: list[Op] = field(default_factory=list[Op])
    there: dict[int, int] = field(default_factory=dict[int, int])  # how rows go that were sent
    moves: Counter[tuple[str, Where]] = field(default_factory=Counter[tuple[str, Where]])

    def _key(self, phase: Phase, call: int | None = None) -> StepKey:
        if call is None:
            self.call += 1
            call = self.call
        return StepKey(self.run, self.round, self.wave, self.step, call, phase)

    def _send(self, message: Message, send: Callable[[Message], Answer] | None = None) -> Answer:
        self.egress.check(message.tensors())
        return (send or self.link.send)(message)

    def join(self, seat: Seat, optims: Mapping[str, Optim]) -> Answer:
        """Takes the seat; the answer names what was offered."""
        return self._send(Join(self._key("join"), seat, optims))

    def fetch(self, slot: str, *, far: bool = False, where: Where = ALL) -> Tensors:
        """Near tensors of an offered slot, or the client's own far tensors of one."""
        self.flush()
        answer = self._send(Fetch(self._key("fetch"), slot, far, where))
        stem = f"slot/{slot}/"
        return {k.removeprefix(stem): v for k, v in answer.tensors.items()}

    def move_out(self, slot: str) -> Tensors:
        """What the tenancy had of a slot until the client moved, and what is near now."""
        answer = self._send(Fetch(self._key("fetch"), slot, leaving=True))
        stem = f"slot/{slot}/"
        return {k.removeprefix(stem): v for k, v in answer.tensors.items()}

    def move_in(self, slot: str, values: Mapping[str, Tensor]) -> None:
        """Hands tensors of blocks that have become far to the tenancy."""
        self._send(Put(self._key("put"), slot, values))

    def forward(
        self,
        ask: Ask,
        hidden: Tensor,
        coefs: Sequence[Tensor],
        *,
        keep: bool,
        part: int = 0,
        send: Callable[[Message], Answer] | None = None,
    ) -> tuple[int, Tensor]:
        """One far forward; waiting operations run before it. ``send`` is another way to send.

        A row that the server keeps is not sent; if it does not keep it any more, all are, and that
        row is not to be kept in this turn.
        """
        ops, self.waiting = tuple(self.waiting), []
        rows = tuple(self.there.get(n, n) for n in ask.rows)
        here = [k for k, n in enumerate(rows) if n >= 0]
        message = Forward(
            self._key("forward"),
            ask.wear,
            ask.train,
            ask.until,
            hidden if len(here) == len(rows) else hidden[here],
            tuple(coefs),
            ask.shapes,
            ask.mask,
            ask.labels,
            ask.dropout,
            keep,
            ops,
            part,
            ask.wants,
            rows,
        )
        answer = self._send(message, send)
        if lacks := cast("list[int]", answer.facts.get("lacks", [])):
            self.there |= dict.fromkeys(lacks, 0)
            message = replace(message, key=self._key("forward"), hidden=hidden, ops=(), rows=())
            answer = self._send(message, send)
        self.there |= {n: -n for n in message.rows if n > 0}
        return message.key.call, answer.tensors[ask.until]

    def backward(
        self,
        call: int,
        grad: Tensor,
        *,
        hidden: bool,
        send: Callable[[Message], Answer] | None = None,
    ) -> tuple[Tensor | None, list[Tensor]]:
        """The far backward of a kept forward: the hidden state's gradient and the coefficients'."""
        answer = self._send(Backward(self._key("backward", call), grad, hidden), send)
        count = sum(1 for k in answer.tensors if k.startswith("coef/"))
        return answer.tensors.get("grad"), [answer.tensors[f"coef/{n}"] for n in range(count)]

    def begin_talk(self) -> int:
        """The number of a new conversation; waiting operations run before it."""
        self.flush()
        self.talks += 1
        return self.talks

    def proceed(
        self, talk: int, wear: Wear, hidden: Tensor, before: int, *, logits: bool
    ) -> Tensor:
        """The far part of a conversation's next positions."""
        self.next_step()
        message = Continue(self._key("continue"), talk, wear, hidden, before)
        return self._send(message).tensors["logits" if logits else "hidden"]

    def queue(self, *ops: Op) -> None:
        """Lets operations ride on the next forward."""
        self.waiting += ops
        self.moves.update((op.slot, op.where) for op in ops if isinstance(op, Assign | Step))

    def do(self, ops: Sequence[Op]) -> tuple[BlockScalars, ...]:
        """Runs waiting operations and these now, and returns the answers of their dots."""
        out, self.waiting = (*self.waiting, *ops), []
        return self._send(Do(self._key("do"), out)).scalars

    def flush(self) -> None:
        """Runs waiting operations now."""
        if self.waiting:
            self.do(())

    def next_step(self) -> None:
        """Begins the next step: of the steps before, only answers to backwards are needed."""
        self.step += 1

    def submit(self, reply: Parcel) -> None:
        """Hands in the reply of the turn."""
        self.flush()
        key = self._key("submit")
        self._send(Submit(key, reply.adapters, reply.far, reply.tensors, reply.facts))

    def leave(self) -> None:
        """Ends the turn."""
        self.flush()
        self._send(Leave(self._key("leave")))
