"""The server's end of the streams: a port that clients dial, and a call for each that does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Protocol, cast

import grpc

from flexp.errors import FlexpError, LinkError
from flexp.identity.credentials import Credentials
from flexp.link import frame
from flexp.link.control import Refused
from flexp.link.frame import Body, Joiner
from flexp.link.grpc import METHOD, Keepalive, check_plain, server_credentials, server_options
from flexp.link.wire import Wire

STALL = 60.0  # seconds; a mebibyte takes as long at 140 kbit/s
STRANGER = 1 << 16  # bytes of a frame of somebody who has not said hello
STALLED = "A message began and did not go on. Join again when the way is better."


@dataclass(eq=False)
class Call:
    """One stream as the server has it; ``certificate`` (PEM) is None on plain text.

    ``name`` is the client's, once it is known, and ``process`` what it calls its process;
    ``speaks`` if it came to talk, not to train.
    """

    certificate: bytes | None
    address: str
    name: str = ""
    process: str = ""
    speaks: bool = False
    wire: Wire = "fp32"
    alive: bool = True
    _out: SimpleQueue[bytes | None] = field(default_factory=SimpleQueue[bytes | None])

    def tell(self, body: Body, number: int = 0) -> None:
        """Sends a frame: an answer to that number, or unasked."""
        if self.alive:
            self._out.put(frame.encode(number, body, self.wire))

    def close(self) -> None:
        """Ends the stream, after what was told."""
        self.alive = False
        self._out.put(None)

    def pieces(self) -> Iterator[bytes]:
        """What goes out, until the call is closed."""
        while (data := self._out.get()) is not None:
            yield from frame.chunks(data)


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

    ``limit`` is the longest frame in bytes that is taken from a call that has a name; ``stall`` is
    for how many seconds a frame that has begun may stand still. Raises LinkError if the port is
    taken.
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
        stall: float = STALL,
    ) -> None:
        check_plain(address, credentials)
        self.reception, self.limit, self.stall = reception, limit, stall
        streams = 2 * clients + 16
        self.server = grpc.server(  # pyright: ignore[reportUnknownMemberType]
            ThreadPoolExecutor(streams, thread_name_prefix="flexp-call"),
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

    def stop(self, grace: float = 1.0) -> None:
        """Ends all calls."""
        self.server.stop(grace).wait()

    def _session(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        held = context.auth_context().get("x509_pem_cert", [None])
        call = Call(held[0], context.peer())
        context.add_callback(call.close)
        reader = threading.Thread(target=self._read, args=(requests, call), daemon=True)
        reader.start()
        yield from call.pieces()

    def _read(self, requests: Iterator[bytes], call: Call) -> None:
        joiner, waiting = Joiner(), self._patience(call)
        try:
            for piece in requests:
                waiting.cancel()
                joiner.limit = self.limit if call.name else STRANGER
                data = joiner.add(piece)
                if data is None:
                    waiting = self._patience(call)
                    waiting.start()
                    continue
                digest = frame.key_digest(data)
                asked = frame.decode(data)
                answer = self.reception.answer(call, asked.body, digest)
                call.tell(answer, asked.number)
                if isinstance(answer, Refused):
                    break
        except FlexpError as problem:
            self._refuse(call, str(problem))
        except grpc.RpcError:  # the client has gone
            call.alive = False
        except Exception as problem:  # noqa: BLE001 a fault of this program: who asked must hear of it
            self._refuse(call, f"The server failed ({type(problem).__name__}: {problem}).")
        finally:
            waiting.cancel()
            call.close()
            self.reception.gone(call)

    def _patience(self, call: Call) -> threading.Timer:
        made = threading.Timer(self.stall, self._refuse, (call, STALLED))
        made.daemon = True
        return made

    def _refuse(self, call: Call, text: str) -> None:
        call.tell(Refused(text))
        call.close()
        self.reception.refused(call, text)
