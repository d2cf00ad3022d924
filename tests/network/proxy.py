"""A TCP proxy that stands for a link between two machines, good or bad.

    with Proxy(("127.0.0.1", port), rate=12.5e6, delay=0.02) as link:
        ...  # connect to ("127.0.0.1", link.port)
        link.cut(5)

What can happen to it: a delay and its jitter, a rate, slices (``pieces``), a pause (``cut(5)``), a
black hole (``cut()``), or one in one direction (``drop``), a reset now or at byte n, a share of
packets that something is done to (``touch``), and a connection that comes once more (``replay``).

It knows bytes and connections, nothing of what they say. A link carries all connections of a proxy:
they share its rate. The clock of the link is worked out for every slice (when it leaves the
bottleneck, when it arrives), so that late wake-ups do not add up. Not emulated: slow start, loss of
single packets, and a handshake that fails while the link is dark (the kernel accepts, then nothing
comes). A process that computes holds up a proxy in the same process; give it one of its own:

    python tests/network/proxy.py --target 127.0.0.1:7143 --rate 12.5e6 --delay 0.02
    python tests/network/proxy.py --measure
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import random
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

Address = tuple[str, int]
Direction = Literal["up", "down"]
T = TypeVar("T")

SLICE_SECONDS = 0.002  # at most so long does one connection hold the link before another's turn
QUEUE_SECONDS = 0.05  # what waits before the bottleneck; beyond it, the sender waits
BUFFER = 4 << 20  # bytes on their way, beside what the rate and the delay keep on the link
TICK = 0.0005  # half of the event loop's millisecond: wake-ups are early as often as late


@dataclass(frozen=True)
class Touch:
    """What is done to a share of all packets: one of ``odds``, drawn from the seed of the link.

    "delay" and "split" let it through, later or in pieces. "reset" lets a part of it through and
    then ends the connection; "drop" lets nothing more through this way, and ends it a little later.
    Times are in seconds, at most.
    """

    share: float = 1 / 3
    odds: Mapping[str, float] = field(
        default_factory=lambda: {"delay": 9.0, "split": 9.0, "reset": 1.0, "drop": 1.0}
    )
    delay: float = 0.004
    dark: float = 0.03

    def draw(self, dice: random.Random) -> str:
        """What is done to the next packet; nothing for most."""
        if dice.random() >= self.share:
            return ""
        return dice.choices(list(self.odds), list(self.odds.values()))[0]


@dataclass
class Recording:
    """The bytes that passed on one connection."""

    up: bytearray = field(default_factory=bytearray)
    down: bytearray = field(default_factory=bytearray)


@dataclass
class Way:
    """One direction of the link. ``None`` as rate is no limit; times are in seconds."""

    rate: float | None = None
    delay: float = 0.0
    jitter: float = 0.0
    pieces: int | None = None
    touch: Touch = field(default_factory=lambda: Touch(0.0))
    free: float = 0.0  # when the bottleneck has passed on all that came before
    passed: int = 0
    packets: int = 0
    touched: Counter[str] = field(default_factory=Counter[str])
    reset_at: int | None = None
    open: asyncio.Event = field(default_factory=asyncio.Event)

    def size(self, dice: random.Random) -> int:
        """How many bytes the next slice may have."""
        most = 65536
        if self.rate is not None:
            most = max(1, min(most, int(self.rate * SLICE_SECONDS)))
        return most if self.pieces is None else min(most, dice.randint(1, self.pieces))

    def due(self, now: float, count: int, dice: random.Random) -> float:
        """When these bytes arrive, if they come to the bottleneck now."""
        self.free = max(self.free, now) + (count / self.rate if self.rate else 0.0)
        return self.free + self.delay + (dice.uniform(0.0, self.jitter) if self.jitter else 0.0)

    def room(self) -> float:
        """Bytes of one connection that may be on their way."""
        return BUFFER + 2 * (self.rate or 0.0) * (self.delay + self.jitter)


@dataclass
class Pipe:
    """Bytes of one connection on their way in one direction, with the time at which they arrive."""

    source: socket.socket
    sink: socket.socket
    way: Way
    dice: random.Random
    odds: random.Random  # of what is done to packets
    kept: bytearray | None = None
    queue: asyncio.Queue[tuple[float, bytes]] = field(default_factory=asyncio.Queue)
    waiting: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def read(self, wait: float) -> None:
        loop, way, last = asyncio.get_running_loop(), self.way, 0.0
        await asyncio.sleep(wait)
        while True:
            await way.open.wait()
            while self.waiting > way.room():
                self.changed.clear()
                await self.changed.wait()
            chunk = await loop.sock_recv(self.source, way.size(self.dice))
            await way.open.wait()
            now = loop.time()
            last = max(last, way.due(now, len(chunk), self.dice))  # jitter keeps the order
            self.waiting += len(chunk)
            self.queue.put_nowait((last, chunk))
            if not chunk:
                return
            if (ahead := way.free - now - QUEUE_SECONDS) > 0:
                await asyncio.sleep(ahead)

    async def write(self) -> None:
        loop, way = asyncio.get_running_loop(), self.way
        while True:
            at, chunk = await self.queue.get()
            if (early := at - loop.time() - TICK) > 0:
                await asyncio.sleep(early)
            await way.open.wait()
            if not chunk:
                self.sink.shutdown(socket.SHUT_WR)
                return
            left = math.inf if way.reset_at is None else way.reset_at - way.passed
            part = chunk if left >= len(chunk) else chunk[: int(left)]
            if left <= len(chunk):
                way.reset_at = None
            await self.send(part)
            if left <= len(chunk):
                while unread(self.sink):
                    await asyncio.sleep(0.001)
                raise ConnectionResetError("reset_after")
            self.waiting -= len(chunk)
            self.changed.set()

    async def send(self, part: bytes) -> None:
        """Passes bytes on, or does to them what is drawn."""
        way, dice, loop = self.way, self.odds, asyncio.get_running_loop()
        what = way.touch.draw(dice)
        way.packets += 1
        way.touched[what] += bool(what)
        if what == "drop":
            await asyncio.sleep(dice.uniform(0.0, way.touch.dark))
            raise ConnectionResetError("dropped")
        if what == "delay":
            await asyncio.sleep(dice.uniform(0.0, way.touch.delay))
        at = dice.randrange(len(part)) if what in ("split", "reset") else len(part)
        for piece in (part[:at],) if what != "split" else (part[:at], part[at:]):
            way.passed += len(piece)
            if self.kept is not None:
                self.kept += piece
            await loop.sock_sendall(self.sink, piece)
        if what == "reset":
            raise ConnectionResetError("reset")


def bound(port: int = 0) -> socket.socket:
    """A socket with a port of loopback that does not listen yet: who connects is refused."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setblocking(False)
    made.bind(("127.0.0.1", port))
    return made


def unread(sock: socket.socket) -> int:
    """Bytes that the other end's kernel has not taken yet: RST would overtake them."""
    import fcntl  # not on Windows; only who resets after a count needs it
    import termios

    (count,) = struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))
    return count


def abort(sock: socket.socket) -> None:
    """Close with RST instead of FIN."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def abort_after(sock: socket.socket, _: asyncio.Task[None]) -> None:
    abort(sock)


class Proxy:
    """A link to ``target``: ``up`` is towards it, ``down`` is back.

    ``rate`` is in bytes per second, or a pair (up, down). ``delay`` is one way; setting up a
    connection costs a round trip. ``jitter`` adds up to so much to every slice, ``pieces`` makes
    pieces of 1 to so many bytes; both are drawn from ``seed``, the number of the connection and the
    direction, as is what ``touch`` does. With ``record`` the bytes of every connection
    are kept in ``recordings``, by its number. Methods can be called from any thread and return when
    what they say is so.
    """

    def __init__(
        self,
        target: Address | None,
        *,
        rate: float | tuple[float | None, float | None] | None = None,
        delay: float = 0.0,
        jitter: float = 0.0,
        pieces: int | None = None,
        record: bool = False,
        seed: int = 0,
    ) -> None:
        rates = rate if isinstance(rate, tuple) else (rate, rate)
        self.up, self.down = (Way(r, delay, jitter, pieces) for r in rates)
        self.recordings: dict[int, Recording] = {}
        self._record = record
        self.connections = 0  # all that were accepted so far
        self._target = target
        self._seed = seed
        self._tasks: set[asyncio.Task[None]] = set()
        self._light: asyncio.TimerHandle | None = None
        self._dropped: set[Direction] = set()

    def __enter__(self) -> Self:
        self._listener = bound()
        self.port: int = self._listener.getsockname()[1]
        self._loop = asyncio.SelectorEventLoop()  # on Windows, too
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"link {self.port}")
        self._thread.start()
        self.heal()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # ---- what can be done to the link

    @property
    def open(self) -> int:
        """Connections at present."""
        return len(self._tasks)

    def cut(self, seconds: float = math.inf, *, reset: bool = False) -> None:
        """Nothing passes either way for so long; then all goes on, or is reset. Does not wait."""
        self._do(self._cut(seconds, reset))

    def drop(self, direction: Direction) -> None:
        """A black hole one way, until ``heal``. What is sent into it waits, as TCP would repeat."""
        self._do(self._drop(direction))

    def refuse(self) -> None:
        """New connections are refused until ``heal``; those that are open stay."""
        self._do(self._refuse())

    def heal(self) -> None:
        """Ends what cut, drop and refuse have begun."""
        self._do(self._heal())

    def reset(self) -> None:
        """RST to both ends of all connections."""
        self._do(self._reset())

    def reset_after(self, count: int, direction: Direction = "up") -> None:
        """RST to both ends of the connection that carries the last of ``count`` more bytes.

        Its receiver has them all, in its kernel at least; one that never reads delays the RST.
        """
        self._do(self._reset_after(count, direction))

    def touch(self, touch: Touch) -> None:
        """From now on this is done to a share of all packets."""
        self.up.touch = self.down.touch = touch

    def replay(self, number: int, patience: float = 10.0) -> bytes:
        """Sends the target what a connection has sent it, on a new one; what it says to that."""
        assert self._target is not None
        said = bytearray()
        with contextlib.suppress(OSError), socket.create_connection(self._target) as again:
            again.settimeout(patience)
            again.sendall(self.recordings[number].up)
            again.shutdown(socket.SHUT_WR)
            while data := again.recv(65536):
                said += data
        return bytes(said)

    # ---- in the thread of the link

    def _do(self, what: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(what, self._loop).result()

    async def _cut(self, seconds: float, reset: bool) -> None:
        self._stay_dark()
        self.up.open.clear()
        self.down.open.clear()
        if seconds < math.inf:
            self._light = self._loop.call_later(seconds, self._lit, reset)

    def _lit(self, reset: bool) -> None:
        if reset:
            for task in self._tasks:
                task.cancel()
        for name, way in (("up", self.up), ("down", self.down)):
            if name not in self._dropped:
                way.open.set()

    def _stay_dark(self) -> None:
        if self._light is not None:
            self._light.cancel()

    async def _drop(self, direction: Direction) -> None:
        self._dropped.add(direction)
        (self.up if direction == "up" else self.down).open.clear()

    async def _refuse(self) -> None:
        if self._loop.remove_reader(self._listener):
            self._listener.close()
            self._listener = bound(self.port)

    async def _heal(self) -> None:
        self._stay_dark()
        self._dropped.clear()
        self._lit(reset=False)
        # Listening twice changes nothing.
        self._listener.listen(1024)
        self._loop.add_reader(self._listener, self._accept)

    async def _reset(self) -> None:
        await self._ended(set(self._tasks))

    async def _reset_after(self, count: int, direction: Direction) -> None:
        way = self.up if direction == "up" else self.down
        way.reset_at = way.passed + count

    async def _close(self) -> None:
        self._stay_dark()
        self._loop.remove_reader(self._listener)
        self._listener.close()
        await self._ended(set(self._tasks))
        await self._loop.shutdown_default_executor()

    async def _ended(self, tasks: set[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _accept(self) -> None:
        """Not a task around `sock_accept`, which loses a connection when it is cancelled late."""
        try:
            near, _ = self._listener.accept()
        except OSError:
            return  # gone before its turn
        near.setblocking(False)
        near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connections += 1
        task = self._loop.create_task(self._carry(near, self.connections))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # One that is cancelled before its first step never comes to its `finally`.
        task.add_done_callback(partial(abort_after, near))

    async def _carry(self, near: socket.socket, number: int) -> None:
        far = socket.socket()
        far.setblocking(False)
        far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        end = abort
        try:
            await asyncio.sleep(self.up.delay)
            await self.up.open.wait()
            await self._reach(near, far)
            kept = Recording()
            if self._record:
                self.recordings[number] = kept
            async with asyncio.TaskGroup() as group:
                for name, way, source, sink, wait, tape in (
                    ("up", self.up, near, far, self.down.delay, kept.up),
                    ("down", self.down, far, near, 0.0, kept.down),
                ):
                    seed = f"{self._seed}/{number}/{name}"
                    dice, odds = random.Random(seed), random.Random(f"{seed}/touch")
                    pipe = Pipe(source, sink, way, dice, odds, tape if self._record else None)
                    group.create_task(pipe.read(wait))
                    group.create_task(pipe.write())
            end = socket.socket.close
        except* OSError:
            pass  # one end is gone, or the target is not there: the other end sees RST
        finally:
            end(near)
            end(far)

    async def _reach(self, near: socket.socket, far: socket.socket) -> None:
        assert self._target is not None
        await self._loop.sock_connect(far, self._target)


class ConnectProxy(Proxy):
    """The least HTTP proxy: opens tunnels for ``CONNECT host:port``, answers 405 to all else.

    ``routes`` leads a ``host:port`` elsewhere, so that a name need not resolve. ``tunnels`` are
    those that were opened, by what was asked for.
    """

    def __init__(self, routes: Mapping[str, Address] | None = None) -> None:
        super().__init__(None)
        self.tunnels: list[str] = []
        self._routes = routes or {}

    async def _reach(self, near: socket.socket, far: socket.socket) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            # Byte by byte: what follows the head belongs to the tunnel.
            byte = await self._loop.sock_recv(near, 1)
            if not byte or len(head) > 8192:
                raise ConnectionAbortedError("no request")
            head += byte
        verb, _, rest = head.decode("latin-1").partition(" ")
        asked = rest.split(" ")[0]
        host, _, port = asked.rpartition(":")
        if verb != "CONNECT" or not port.isdigit():
            await self._answer(near, "405 Method Not Allowed")
            raise ConnectionAbortedError("not CONNECT")
        try:
            await self._loop.sock_connect(far, self._routes.get(asked, (host, int(port))))
        except OSError:
            await self._answer(near, "502 Bad Gateway")
            raise
        self.tunnels.append(asked)
        await self._answer(near, "200 Connection established")

    async def _answer(self, near: socket.socket, status: str) -> None:
        await self._loop.sock_sendall(near, f"HTTP/1.1 {status}\r\n\r\n".encode())


# ---- how true the link is


class Sink:
    """Takes connections one after the other, answers every byte that it is asked to."""

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: Address = self._listener.getsockname()[:2]
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                taken, _ = self._listener.accept()
                with taken, contextlib.suppress(OSError):
                    taken.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    self._serve(taken)

    def _serve(self, taken: socket.socket) -> None:
        """A request: 8 bytes to be sent back, 8 bytes that come first."""
        while len(head := taken.recv(16, socket.MSG_WAITALL)) == 16:
            back, there = struct.unpack("!QQ", head)
            while there:
                there -= len(taken.recv(min(there, 1 << 20)))
            taken.sendall(bytes(back))


def exchange(sock: socket.socket, there: int, back: int) -> float:
    """Seconds of a request with so many bytes each way."""
    payload = struct.pack("!QQ", back, there) + bytes(there)
    begin = time.perf_counter()
    sock.sendall(payload)
    while back:
        got = len(sock.recv(min(back, 1 << 20)))
        if not got:
            raise ConnectionError("the sink is gone")
        back -= got
    return time.perf_counter() - begin


def measure() -> None:
    """Prints, for some links and requests, how long they should take and how long they do."""
    print("Mbit/s  RTT ms     there      back   should ms   median ms   error   worst")
    links = [(None, 0.0), (100, 0.04), (100, 0.0), (20, 0.1), (1000, 0.005)]
    for mbit, trip in links:
        rate = None if mbit is None else mbit * 1e6 / 8
        for there, back in [(1, 1), (250_000, 1), (5_000_000, 1), (1, 5_000_000)]:
            if rate and there + back > rate * 2:
                continue
            with (
                Sink() as sink,
                Proxy(sink.address, rate=rate, delay=trip / 2) as link,
                socket.create_connection(("127.0.0.1", link.port)) as sock,
            ):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                exchange(sock, 1, 1)
                took = [exchange(sock, there, back) for _ in range(9)]
            should = trip + (there + 16 + back) / rate if rate else trip
            errors = [t / should - 1 for t in took] if should else []
            off = (
                f"{median(took) / should - 1:+7.1%} {max(errors, key=abs):+7.1%}" if should else ""
            )
            print(
                f"{mbit or '-':>6} {trip * 1e3:7.1f} {there:9d} {back:9d} {should * 1e3:11.2f} "
                f"{median(took) * 1e3:11.2f} {off}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description="A link to a TCP port, until standard input ends")
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--target", help="HOST:PORT")
    parser.add_argument("--rate", type=float, help="bytes per second, each way")
    parser.add_argument("--down", type=float, help="the same back, where it is another rate")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds, one way")
    parser.add_argument("--jitter", type=float, default=0.0, help="seconds")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if asked.measure:
        measure()
    elif asked.target:
        host, _, port = asked.target.rpartition(":")
        options = {k: getattr(asked, k) for k in ("delay", "jitter", "seed")}
        rate = asked.rate, asked.down or asked.rate
        with Proxy((host, int(port)), rate=rate, **options) as link:
            print(link.port, flush=True)
            sys.stdin.read()
            print(link.up.passed, link.down.passed, flush=True)
    else:
        parser.error("--measure or --target")


if __name__ == "__main__":
    main()
