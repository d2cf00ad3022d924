"""A server without a model: lets in everybody, answers at once, and remembers what it was told.

As a program of its own, whose memory can be looked at from outside, until standard input ends:

    python tests/network/lobby.py --clients 600 --identity FOLDER
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flexp.identity import Credentials, credentials
from flexp.link.control import PROTOCOL, Bye, Data, Echo, Hello, Noted, Welcome
from flexp.link.dial import GrpcLink
from flexp.link.frame import Body
from flexp.link.listen import Bounds, Call, Listener

LIMIT = 1 << 20  # bytes of a frame


class Lobby:
    """A reception: knows whoever it has seen before; a goodbye makes it fail."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.bodies: list[Body] = []
        self.why: list[str] = []
        self.lost: list[tuple[str, float]] = []  # who has gone, and when

    def answer(self, call: Call, body: Body, digest: str) -> Body:
        self.bodies.append(body)
        if isinstance(body, Hello):
            call.name = body.name
            self.calls.append(call)
            return Welcome("lobby", resumed=body.server == "lobby")
        if isinstance(body, Bye):
            raise KeyError("a fault of the program")
        return Data(bytes(body.back)) if isinstance(body, Echo) else Noted()

    def refused(self, call: Call, text: str) -> None:
        self.why.append(text)

    def gone(self, call: Call) -> None:
        self.lost.append((call.name, time.monotonic()))


def listening(
    desk: Lobby, port: int = 0, shown: Credentials | None = None, *, limit: int = LIMIT, **how: Any
) -> Listener:
    """A server on a port of loopback."""
    return Listener(desk, f"127.0.0.1:{port}", shown, limit=limit, **how)


@contextmanager
def lobby(credentials: Credentials | None = None, **how: Any) -> Generator[tuple[Lobby, Listener]]:
    """The same for as long as a test needs it."""
    desk = Lobby()
    made = listening(desk, 0, credentials, **how)
    try:
        yield desk, made
    finally:
        made.stop(0)


@contextmanager
def guest(
    port: int, name: str = "anna", shown: Credentials | None = None, **how: Any
) -> Generator[GrpcLink]:
    """An honest client of it, which has been let in."""

    def hello(server: str, order: int) -> Hello:
        return Hello(PROTOCOL, "0", "0", name, f"{name}'s process", server, order)

    link = GrpcLink(f"127.0.0.1:{port}", hello, shown, **how)
    try:
        assert isinstance(link.next(30), Welcome)
        yield link
    finally:
        link.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="A server without a model")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--identity", type=Path)
    asked = parser.parse_args()
    shown = None if asked.identity is None else credentials.load(asked.identity, role="server")
    with lobby(shown, clients=asked.clients, bounds=Bounds()) as (_, listener):
        print(listener.port, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
