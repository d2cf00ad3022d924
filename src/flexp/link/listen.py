"""The server's end of the streams: a port that clients dial, and a call for each that does.

Nothing here can be made to hold more than a few frames of anybody: who does not read is not read
from, who sends faster than a network does is read more slowly, and who stands still is let go.
"""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, cast

import grpc

from flexp.errors import FlexpError, LinkError
from flexp.identity.credentials import Credentials
from flexp.link import frame
from flexp.link.control import Refused
from flexp.link.frame import Body, Joiner
from flexp.link.grpc import METHOD, Keepalive, check_plain, server_credentials, server_options
from flexp.link.outbox import Outbox
from flexp.link.port import check_port
from flexp.link.rate import Buckets, Rate
from flexp.link.wire import Wire
from flexp.threads import adopt

STRANGER = 1 << 16  # bytes of a frame of somebody who has not said hello
FRAMES = Rate(8_000, 4_000)
DATA = Rate(1 << 30, 256 << 20)  # bytes
NEW = Rate(200, 50)  # streams
FAILURES = Rate(60, 1)  # streams that were refused for good before a hello
CALLS = 8  # at once that show one certificate; one that was lost may not be over yet
STALLED = "A message began and did not go on. Join again when the way is better."
SLOW = "Nothing of what was sent has been taken for {0:.0f} seconds. Join again."
SILENT = "Nobody has said hello for {0:.0f} seconds."
WAIT = "{0} from here. Come back in {1} s."


@dataclass(frozen=True)
class Bounds:
    """What one peer may make the server do: by its certificate, or on plain text its address.

    ``stall`` is for how many seconds a frame that has begun, or an answer that nobody takes, may
    stand still: a mebibyte takes 60 at 140 kbit/s. ``hello`` is the time to say who it is.
    Faster than ``frames`` or ``data`` (bytes) it is read more slowly; more streams, or more that
    are refused for good, than those rates allow are told to come back later.
    """

    stall: float = 60.0
    hello: float = 10.0
    frames: Rate = FRAMES
    data: Rate = DATA
    streams: Rate = NEW
    failures: Rate = FAILURES


@dataclass(eq=False)
class Call:
    """One stream as the server has it; ``certificate`` (PEM) is None on plain text.

    ``name`` is the client's and ``process`` its own mark, once known; ``speaks`` if it came
    to talk, not to train.
    ``heard`` is when its last frame was whole, by the monotonic clock.
    """

    certificate: bytes | None
    address: str
    name: str = ""
    process: str = ""
    speaks: bool = False
    wire: Wire = "fp32"
    alive: bool = True
    heard: float = field(default_factory=time.monotonic)
    begun: float = math.inf  # when something last came of a frame that is not whole
    outbox: Outbox = field(default_factory=Outbox)

    @cached_property
    def peer(self) -> str:
        """Whose bounds it uses up."""
        if self.certificate is None:
            return self.address.rpartition(":")[0]
        return hashlib.sha256(self.certificate).hexdigest()

    def tell(self, body: Body, number: int = 0) -> None:
        """Sends a frame: an answer to that number, or unasked. Never waits."""
        if self.alive:
            self.outbox.put(frame.encode(number, body, self.wire))

    def close(self) -> None:
        """Ends the stream, after what was told."""
        self.alive = False
        self.outbox.close()


class Reception(Protocol):
    """Who answers calls."""

    def answer(self, call: Call, body: Body, digest: str) -> Body:
        """The answer to a frame; a FlexpError ends the call with its text."""
        ...

    def refused(self, call: Call, text: str) -> None:
        """A call is ended for what it said; the client hears the same text."""
        ...

    def gone(self, call: Call) -> None:
        """A call has ended, for whatever reason."""
        ...


class Listener:
    """Listens on one port. Each call has a thread that reads and answers, one frame after another.

    ``limit`` is the longest frame in bytes that is taken from a call that has a name. Raises
    LinkError if the port cannot be had.
    """

    def __init__(
        self,
        reception: Reception,
        address: str,
        credentials: Credentials | None,
        *,
        clients: int = 64,
        keepalive: Keepalive = "lan",
        limit: int = frame.MAX_FRAME,
        bounds: Bounds | None = None,
    ) -> None:
        check_plain(address, credentials)
        check_port(address, clients)
        self.reception, self.limit, self.bounds = reception, limit, bounds or Bounds()
        self.frames, self.data = Buckets(self.bounds.frames), Buckets(self.bounds.data)
        self.streams, self.failures = Buckets(self.bounds.streams), Buckets(self.bounds.failures)
        self.calls: dict[Call, Any] = {}  # with gRPC's context
        self._over = threading.Event()
        streams = 2 * clients + 16
        self._pool = ThreadPoolExecutor(streams, "flexp-call")
        self.server = grpc.server(  # pyright: ignore[reportUnknownMemberType]
            self._pool,
            options=server_options(keepalive, clients),
            maximum_concurrent_rpcs=streams,
        )
        handler: Any = cast("Any", grpc).stream_stream_rpc_method_handler(self._session)
        service, _, method = METHOD.lstrip("/").rpartition("/")
        generic: Any = grpc.method_handlers_generic_handler(service, {method: handler})
        self.server.add_generic_rpc_handlers((generic,))
        try:
            if credentials is None:
                self.port = self.server.add_insecure_port(address)
            else:
                self.port = self.server.add_secure_port(address, server_credentials(credentials))
        except (RuntimeError, ValueError) as problem:
            raise LinkError(
                f"{address} cannot be listened on. Is another server running there? Choose another "
                "port with --listen."
            ) from problem
        self.server.start()
        self._watcher = threading.Thread(target=self._watch, name="flexp-watch", daemon=True)
        self._watcher.start()

    def stop(self, grace: float = 1.0) -> None:
        """Ends all calls."""
        self._over.set()
        self.server.stop(grace).wait()
        self._pool.shutdown(wait=False)
        self._watcher.join()

    def _session(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        held = context.auth_context().get("x509_pem_cert", [None])
        call = Call(held[0], context.peer())
        if later := self._later(call):
            yield from frame.chunks(frame.encode(0, later))
            return
        self.calls[call] = context
        try:
            context.add_callback(call.close)
            threading.Thread(target=self._read, args=(requests, call), daemon=True).start()
            yield from call.outbox.pieces()
        finally:
            del self.calls[call]

    def _later(self, call: Call) -> Refused | None:
        """What somebody hears who comes too often, or who was refused too often."""
        peer = call.peer
        if wait := self.failures.empty(peer):
            return come_back("Too many calls that were refused", wait)
        if wait := self.streams.ask(peer):
            return come_back("Too many new calls", wait)
        mine = 0 if call.certificate is None else [c.peer for c in list(self.calls)].count(peer)
        return come_back("Too many calls at once", 1.0) if mine >= CALLS else None

    def _read(self, requests: Iterator[bytes], call: Call) -> None:
        adopt()
        joiner = Joiner()
        try:
            for piece in requests:
                joiner.limit = self.limit if call.name else STRANGER
                data = joiner.add(piece)
                call.begun = time.monotonic() if data is None else math.inf
                if data is not None and not self._answered(call, data):
                    break
        except FlexpError as problem:
            self._refuse(call, str(problem))
        except grpc.RpcError:  # the client has gone
            call.alive = False
        except Exception as problem:  # noqa: BLE001 a fault of this program: who asked must hear of it
            self._refuse(call, f"The server failed ({type(problem).__name__}: {problem}).")
        finally:
            call.close()
            self.reception.gone(call)

    def _answered(self, call: Call, data: bytearray) -> bool:
        """Answers a frame; whether the next one is to be read."""
        call.heard = time.monotonic()
        wait = max(self.frames.spend(call.peer), self.data.spend(call.peer, len(data)))
        if wait and not call.outbox.pause(wait):
            return False
        digest = frame.key_digest(data)
        asked = frame.decode(data)
        answer = self.reception.answer(call, asked.body, digest)
        call.heard = time.monotonic()
        call.tell(answer, asked.number)
        # Beside what waits there is never more than one answer: who does not read is not read from.
        return not isinstance(answer, Refused) and call.outbox.wait(self.limit)

    def _watch(self) -> None:
        """Lets go of who stands still."""
        bounds = self.bounds
        while not self._over.wait(min(1.0, bounds.stall / 4, bounds.hello / 4)):
            now = time.monotonic()
            for call, context in list(self.calls.items()):
                if call.alive and not call.name and now - call.heard > bounds.hello:
                    self._refuse(call, SILENT.format(bounds.hello))
                elif call.alive and now - call.begun > bounds.stall:
                    self._refuse(call, STALLED)
                elif call.outbox.stuck() > bounds.stall:
                    if call.alive:
                        self._refuse(call, SLOW.format(bounds.stall))
                    context.cancel()  # its thread waits for who does not take the last words either

    def _refuse(self, call: Call, text: str) -> None:
        if not call.name:
            self.failures.spend(call.peer)
        call.tell(Refused(text))
        call.close()
        with suppress(Exception):  # nobody who calls is let go of the less
            self.reception.refused(call, text)


def come_back(what: str, wait: float) -> Refused:
    """What is said to who comes too often."""
    after = max(1, math.ceil(wait))
    return Refused(WAIT.format(what, after), again=True, after=after)
