"""A client that says what no client of this program would: frames over a real channel."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import grpc
import torch
from msgspec import structs

from flexp.identity import Credentials
from flexp.link import frame
from flexp.link.control import PROTOCOL, Hello, Measured, Problem, Ready, Refused, Welcome
from flexp.link.dial import channel_to
from flexp.link.frame import Body, Joiner
from flexp.link.grpc import METHOD

PATIENCE = 30.0
T = TypeVar("T")


def hello(name: str, **changes: Any) -> Hello:
    """First words."""
    plain = Hello(PROTOCOL, "0", str(torch.__version__), name, f"{name}'s fake")
    return structs.replace(plain, **changes)


class Fake:
    """One stream. What comes is kept by kind; what was sent, lazily, is counted in ``taken``."""

    def __init__(self, port: int, credentials: Credentials | None = None, host: str = "") -> None:
        self.channel = channel_to(f"{host or '127.0.0.1'}:{port}", credentials, "lan")
        self.out: SimpleQueue[bytes | None] = SimpleQueue()
        self.heard: SimpleQueue[frame.Frame | None] = SimpleQueue()
        self.number, self.taken, self.error = 0, 0, ""
        self.early: list[Body] = []
        self.thread = threading.Thread(target=self._listen, daemon=True)
        self.thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, what: BaseException | None, at: TracebackType | None
    ) -> None:
        self.out.put(None)
        self.channel.close()
        self.thread.join(PATIENCE)

    def raw(self, *pieces: bytes) -> None:
        """Pieces as they are."""
        for piece in pieces:
            self.out.put(piece)

    def say(self, body: Body) -> None:
        """A proper frame."""
        self.number += 1
        self.raw(*frame.chunks(frame.encode(self.number, body)))

    def ask(self, body: Body) -> Body:
        """The answer to it; what was told in between waits for ``told``."""
        self.say(body)
        return self.answer()

    def answer(self) -> Body:
        """The answer to what was said last."""
        while (found := self._next()).number != self.number:
            self.early.append(found.body)
            if isinstance(found.body, Refused):
                break
        return found.body

    def told(self, kind: type[T]) -> T:
        """What the server tells unasked, of that kind."""
        while True:
            body = self.early.pop(0) if self.early else self._next().body
            if isinstance(body, kind):
                return body

    def come_in(self, name: str) -> Welcome:
        """Hello, device and ready, as a proper client has it."""
        welcome = cast("Welcome", self.ask(hello(name)))
        self.ask(Measured(1 << 30))
        space = "classification", "negative", "positive"
        self.ask(Ready(welcome.hash, (12, 4, 4), space))
        return welcome

    def refusal(self) -> str:
        """Why the server ends this stream, or does not do what was asked."""
        found = self.answer()
        assert isinstance(found, Refused | Problem), found
        return found.text

    def _next(self) -> frame.Frame:
        try:
            found = self.heard.get(timeout=PATIENCE)
        except Empty:
            raise AssertionError("the server says nothing") from None
        assert found is not None, f"the stream has ended: {self.error}"
        return found

    def _pieces(self) -> Iterator[bytes]:
        while (piece := self.out.get()) is not None:
            self.taken += len(piece)
            yield piece

    def _listen(self) -> None:
        joiner = Joiner()
        stream: Any = self.channel.stream_stream(METHOD)
        with suppress(ValueError):  # a channel that was closed at once
            try:
                for piece in stream(self._pieces()):
                    if (data := joiner.add(piece)) is not None:
                        self.heard.put(frame.decode(data))
            except grpc.RpcError as problem:
                self.error = str(cast("Any", problem).details())
        self.heard.put(None)
