"""Peers that are no program of ours: sockets that say nothing, or just enough of TLS and HTTP/2."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar

T = TypeVar("T")
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RESET, SETTINGS, PING, GOAWAY = 0, 1, 3, 4, 6, 7
ACK, END_HEADERS = 1, 4
# The first bytes of a TLS handshake record that never comes.
HALF_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(20)


def h2(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    """A frame of HTTP/2."""
    head = len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big")
    return head + payload


def request(stream: int, path: str) -> bytes:
    """Opens a stream as gRPC does: POST, over http, with the names that must be there."""

    def text(value: str) -> bytes:
        return bytes([len(value)]) + value.encode()

    fields = b"\x83\x86\x04" + text(path) + b"\x01" + text("x")
    fields += b"\x0f\x10" + text("application/grpc") + b"\x00\x02\x74\x65" + text("trailers")
    return h2(HEADERS, END_HEADERS, stream, fields)


def silent(port: int, count: int, first: bytes = b"") -> list[socket.socket]:
    """Connections that say this and nothing else."""
    made = [socket.create_connection(("127.0.0.1", port), 20) for _ in range(count)]
    for one in made:
        one.sendall(first)
    return made


def closed(socks: list[socket.socket], patience: float) -> float:
    """Seconds until the other end has closed all of these."""
    begin = time.monotonic()
    for one in socks:
        one.settimeout(max(0.1, begin + patience - time.monotonic()))
        with contextlib.suppress(ConnectionError):
            while one.recv(4096):
                pass
        one.close()
    return time.monotonic() - begin


class Crowd:
    """Connections over HTTP/2 that never ask for anything; ``polite`` ones answer pings.

    Those that were let in, and had the server's first words, are ``open``.
    """

    def __init__(
        self, port: int, count: int, context: ssl.SSLContext | None = None, *, polite: bool = True
    ) -> None:
        self.port, self.count, self.context, self.polite = port, count, context, polite
        self.let_in = self.over = 0
        self._tried = 0

    @property
    def open(self) -> int:
        """How many there are now."""
        return self.let_in - self.over

    def __enter__(self) -> Self:
        self._loop = asyncio.SelectorEventLoop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="crowd")
        self._thread.start()
        self._few = self._do(self._semaphore())
        self._tasks = [self._loop.create_task(self._one()) for _ in range(self.count)]
        self._loop.call_soon_threadsafe(lambda: None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, what: BaseException | None, at: TracebackType | None
    ) -> None:
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def tried(self) -> bool:
        """Whether all have had their answer: let in, or closed."""
        return self._tried == self.count

    def _do(self, what: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(what, self._loop).result()

    async def _semaphore(self) -> asyncio.Semaphore:
        return asyncio.Semaphore(32)

    async def _end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _one(self) -> None:
        inside = False
        writer: asyncio.StreamWriter | None = None
        try:
            async with self._few:
                reader, writer = await asyncio.open_connection(
                    "127.0.0.1", self.port, ssl=self.context
                )
                writer.write(PREFACE + h2(SETTINGS))
                head = await reader.readexactly(9)  # the server's settings come first
            inside = True
            self.let_in += 1
            self._tried += 1
            while True:
                payload = await reader.readexactly(int.from_bytes(head[:3], "big"))
                kind, flags = head[3], head[4]
                if kind == GOAWAY:
                    return
                if kind in (SETTINGS, PING) and not flags & ACK and (self.polite or kind != PING):
                    writer.write(h2(kind, ACK, 0, payload if kind == PING else b""))
                head = await reader.readexactly(9)
        except (OSError, EOFError, ssl.SSLError):
            pass
        finally:
            if inside:
                self.over += 1
            else:
                self._tried += 1
            if writer is not None:
                writer.transport.abort()
