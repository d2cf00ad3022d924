"""Turns of many clients side by side at one server: message by message, in one order for all.

No client waits for another. Which message comes next is told by a simulated clock, from what each
client's device and link are said to do, or by a recording. Only one client computes at a time, so
the order decides everything, and the same order gives the same adapters bit for bit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from flexp.engine.base import Arrival
from flexp.errors import FlexpError, LinkError
from flexp.link.messages import Answer, Link, Message
from flexp.link.wire import Wire, crossing_bytes
from flexp.strategies.base import ClientId
from flexp.tensors import Tensors
from flexp.threads import adopt

COMPUTES = ("forward", "backward")  # the two messages of a step that make both sides compute


@dataclass(frozen=True)
class Pace:
    """How fast one client is: seconds of a training step near and far, and of what crosses.

    ``up`` and ``down`` are seconds per byte, ``latency`` is there and back. Half of a step's
    seconds, near and far, go with its forward and half with its backward. ``wire`` is how the
    client's messages are packed.
    """

    near: float = 1.0
    far: float = 0.0
    up: float = 0.0
    down: float = 0.0
    latency: float = 0.0
    wire: Wire = "fp32"

    def bytes_of(self, tensors: Tensors) -> int:
        """Bytes that cross for the tensors of a message or an answer."""
        return sum(crossing_bytes(name, v, self.wire) for name, v in tensors.items())


@dataclass
class Line:
    """One client under way: a thread that stops before each of its messages."""

    client: ClientId
    pace: Pace
    flow: Flow
    now: float = 0.0
    arrival: Arrival | None = None
    thread: threading.Thread | None = None
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    back: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def begin(self, turn: Callable[[], Arrival]) -> None:
        """Starts a turn and returns when its first message waits, or when it has ended."""

        def work() -> None:
            adopt()
            try:
                self.arrival = turn()
            finally:
                self.back.release()

        self.arrival = None
        self.thread = threading.Thread(target=work, name=f"flexp-{self.client}", daemon=True)
        self.thread.start()
        self.back.acquire()

    def proceed(self) -> None:
        """Lets the waiting message through and returns when the next one waits, or at the end."""
        self.go.release()
        self.back.acquire()

    def send(self, message: Message, inner: Link) -> Answer:
        """Delivers a message when its place in the order has come, and moves the clock."""
        computes = message.key.phase in COMPUTES
        size = self.pace.bytes_of(message.tensors())
        self.now += self.pace.near / 2 if computes else 0.0
        self.now += self.pace.latency / 2 + size * self.pace.up
        self.back.release()
        self.go.acquire()
        if self.flow.over:
            raise LinkError("The run ended before this client's turn did.")
        self.now = self.flow.serve(self.now, self.pace.far / 2 if computes else 0.0)
        answer = inner.send(message)
        size = self.pace.bytes_of(answer.tensors)
        self.now += self.pace.latency / 2 + size * self.pace.down
        return answer


@dataclass(frozen=True)
class PacedLink:
    """A link whose messages wait for their place in the order."""

    inner: Link
    line: Line

    def send(self, message: Message) -> Answer:
        """Delivers one message in its turn and waits for the answer."""
        return self.line.send(message, self.inner)

    def close(self) -> None:
        """Closes the link inside."""
        self.inner.close()


@dataclass
class Flow:
    """All clients under way, and the order in which their messages were handled so far.

    ``give`` starts a client's next turn, or is None when it has no more. ``recorded`` replaces the
    clock: the clients in the order in which the server is to hear them.
    """

    paces: Mapping[ClientId, Pace]
    recorded: Sequence[ClientId] | None = None
    order: list[ClientId] = field(default_factory=list[ClientId])
    lines: dict[ClientId, Line] = field(default_factory=dict[ClientId, Line])
    free: float = 0.0  # when the server has done what it was given
    over: bool = False

    def __post_init__(self) -> None:
        self.lines = {c: Line(c, pace, self) for c, pace in sorted(self.paces.items())}

    def wrapped(self, client: ClientId, link: Link) -> Link:
        """The client's link, in the order of this flow."""
        return PacedLink(link, self.lines[client])

    def serve(self, arrives: float, seconds: float) -> float:
        """When the server has answered what arrives then; it does one thing after another."""
        self.free = max(self.free, arrives) + seconds
        return self.free

    def run(self, give: Callable[[ClientId], Callable[[], Arrival] | None]) -> Iterator[Arrival]:
        """Arrivals as they come; FlexpError if the recording does not fit."""
        waiting: dict[ClientId, Line] = {}
        free = list(self.lines)
        try:
            while free or waiting:
                for client in free:
                    turn = give(client)
                    if turn is not None:
                        waiting[client] = self.lines[client]
                        waiting[client].begin(turn)
                free = [c for c, line in waiting.items() if line.arrival is not None]
                if not free and waiting:
                    line = self._next(waiting)
                    self.order.append(line.client)
                    line.proceed()
                    free = [line.client] if line.arrival is not None else []
                for client in free:
                    line = waiting.pop(client)
                    if line.arrival is not None:
                        yield replace(line.arrival, clock=line.now)
        finally:
            self._stop(waiting)

    def _next(self, waiting: Mapping[ClientId, Line]) -> Line:
        if self.recorded is None:
            return min(waiting.values(), key=lambda line: (line.now, line.client))
        at = len(self.order)
        client = self.recorded[at] if at < len(self.recorded) else ""
        if client not in waiting:
            asked = f'"{client}"' if client else "nobody more"
            raise FlexpError(
                f"The recorded order does not fit: message {at} is to be of {asked}, but "
                f"{', '.join(waiting)} {'waits' if len(waiting) == 1 else 'wait'}. Replay with the "
                "recipe of the recording."
            )
        return waiting[client]

    def _stop(self, waiting: Mapping[ClientId, Line]) -> None:
        """Ends the threads of turns that are still under way."""
        self.over = True
        for line in waiting.values():
            while line.arrival is None and line.thread is not None and line.thread.is_alive():
                line.proceed()
