"""A link that keeps a ledger of every tensor that crosses another link, both ways."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from flexp.link.messages import Answer, Link, Message, Posting, Reply
from flexp.link.wire import Wire, crossing_bytes

Way = Literal["up", "down"]


@dataclass(frozen=True)
class Crossing:
    """One tensor that crossed: ``way`` "up" leaves the client, "down" reaches it.

    ``dtype`` and ``shape`` are the tensor's own, ``bytes`` those of what it was packed into.
    """

    way: Way
    phase: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass
class Ledger:
    """Bytes and messages of one client, in total and per kind of tensor."""

    sent: int = 0
    received: int = 0
    messages: int = 0
    kinds: dict[tuple[Way, str], int] = field(default_factory=dict[tuple[Way, str], int])
    names: dict[tuple[Way, str], int] = field(default_factory=dict[tuple[Way, str], int])
    crossings: list[Crossing] | None = None

    def up(self, message: Message, wire: Wire = "fp32") -> None:
        """Counts a message on its way."""
        self.messages += 1
        for name, tensor in message.tensors().items():
            self.note("up", message.key.phase, name, tensor, wire=wire)

    def down(self, message: Message, answer: Answer, wire: Wire = "fp32") -> None:
        """Counts the answer to it."""
        for name, tensor in answer.tensors.items():
            self.note("down", message.key.phase, name, tensor, wire=wire)

    def note(self, way: Way, phase: str, name: str, tensor: Tensor, *, wire: Wire = "fp32") -> None:
        """Counts one tensor, payload bytes only."""
        size = crossing_bytes(name, tensor, wire)
        if way == "up":
            self.sent += size
        else:
            self.received += size
        kind = name.split("/", 1)[0]
        self.kinds[way, kind] = self.kinds.get((way, kind), 0) + size
        self.names[way, name] = self.names.get((way, name), 0) + size
        if self.crossings is not None:
            dtype = str(tensor.dtype).removeprefix("torch.")
            self.crossings.append(Crossing(way, phase, name, dtype, tuple(tensor.shape), size))


@dataclass(frozen=True)
class MeteredLink:
    """Counts what crosses ``inner``; ``crossings`` in the ledger also keeps each tensor's row.

    ``wire`` is how ``inner`` packs; it is the outermost link, which sees tensors unpacked.
    """

    inner: Link
    ledger: Ledger
    wire: Wire = "fp32"

    def send(self, message: Message) -> Answer:
        """Delivers one message, counting it and its answer."""
        self.ledger.up(message, self.wire)
        return self._down(message, self.inner.send(message))

    def begin(self, message: Message) -> Reply:
        """Sends one message, counting it now and its answer when that is taken."""
        self.ledger.up(message, self.wire)
        if not isinstance(self.inner, Posting):
            done: Future[Answer] = Future()
            done.set_result(self._down(message, self.inner.send(message)))
            return Reply(done, done.result)
        reply = self.inner.begin(message)
        return Reply(reply.future, lambda: self._down(message, reply.take()))

    def _down(self, message: Message, answer: Answer) -> Answer:
        self.ledger.down(message, answer, self.wire)
        return answer

    def close(self) -> None:
        """Closes the link inside."""
        self.inner.close()
