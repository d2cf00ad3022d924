"""The client's end: a link that dials the server, and dials again when the way is lost.

What was asked and not answered is asked again, byte for byte, on the next stream: the server's step
table knows it if it was carried out already. So the code above never sees a lost connection, only
a server that has begun anew.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, cast

import grpc

from flexp import errors
from flexp.errors import FlexpError, LinkError
from flexp.identity.credentials import Credentials
from flexp.link import frame
from flexp.link.control import End, Hello, Order, Problem, Refused, Welcome
from flexp.link.diagnosis import hopeless, outdated
from flexp.link.frame import Body, Joiner
from flexp.link.grpc import (
    LONGEST,
    METHOD,
    Keepalive,
    check_plain,
    client_credentials,
    client_options,
)
from flexp.link.messages import Answer, Message, Reply
from flexp.link.outbox import Outbox
from flexp.link.wire import Wire

FIRST = 0.2  # seconds between the first two attempts
LONGEST_AFTER = 300  # seconds to stay away, if a server asks for it
MOST_TOLD = 4096  # things that a server has told and nobody has read yet
STRANGER = 4 << 20  # bytes of a frame, until the run's own limit is known
ANEW = "The server has begun this turn anew."


class TurnLost(LinkError):
    """The server does not know this turn any more: it has begun anew, or given the client up."""


class GrpcLink:
    """A link over one gRPC stream.

    ``hello`` makes the first words from the server's name for its process and the newest order.
    ``patience`` is for how many seconds without a connection it goes on dialling (None: for ever).
    """

    def __init__(
        self,
        address: str,
        hello: Callable[[str, int], Hello],
        credentials: Credentials | None = None,
        *,
        keepalive: Keepalive = "lan",
        patience: float | None = None,
        notice: Callable[[str], None] = lambda text: None,
    ) -> None:
        check_plain(address, credentials)
        self.address, self.hello, self.credentials = address, hello, credentials
        self.keepalive: Keepalive = keepalive
        self.patience, self.notice = patience, notice
        self.wire: Wire = "fp32"
        self.limit = STRANGER  # bytes of a frame; who has seen the recipe knows better
        self.told: SimpleQueue[Body | FlexpError] = SimpleQueue()
        self._asked: dict[int, tuple[bytes, Future[Body]]] = {}
        self._number, self._server, self._order = 0, "", 0
        self._out: Outbox | None = None
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._dead: FlexpError | None = None
        self._unread: Welcome | None = None  # of a server that begins anew, and nobody knows yet
        self._thread = threading.Thread(target=self._keep_dialling, daemon=True)
        self._thread.start()

    # ---- for the client's thread

    def send(self, message: Message) -> Answer:
        """Delivers one message of a step and waits for its answer."""
        return cast("Answer", self.ask(message))

    def ask(self, body: Body) -> Body:
        """Asks and waits for the answer; raises what the server could not do as its own error."""
        return _taken(self.post(body))

    def begin(self, message: Message) -> Reply:
        """Sends one message of a step; its answer can be waited for later."""
        future = self.post(message)
        return Reply(future, lambda: cast("Answer", _taken(future)))

    def post(self, body: Body) -> Future[Body]:
        """Asks without waiting; answers come in the order of the questions."""
        future: Future[Body] = Future()
        with self._lock:
            if self._dead is not None:
                raise self._dead
            if self._unread is not None:
                raise TurnLost(ANEW)
            self._number += 1
            data = frame.encode(self._number, body, self.wire)
            self._asked[self._number] = (data, future)
            if self._out is not None:
                self._out.put(data)
        return future

    def next(self, timeout: float | None = None) -> Body | None:
        """What the server tells next, unasked; None if nothing within the time."""
        try:
            found = self.told.get(timeout=timeout)
        except Empty:
            return None
        if isinstance(found, FlexpError):
            raise found
        with self._lock:
            if found is self._unread:
                self._unread = None
        return found

    def close(self) -> None:
        """Hangs up."""
        self._closed.set()
        with self._lock:
            if self._out is not None:
                self._out.close()
        self._thread.join(timeout=5)

    # ---- the thread that dials

    def _keep_dialling(self) -> None:
        wait, lost = FIRST, time.monotonic()
        told = False
        while not self._closed.is_set():
            try:
                if self._converse():
                    wait, lost, told = FIRST, time.monotonic(), False
            except Exception as problem:  # noqa: BLE001 who waits must hear of it
                known = isinstance(problem, FlexpError)
                self._die(problem if known else LinkError(f"{type(problem).__name__}: {problem}"))
                return
            if self._closed.is_set():
                break
            if self.patience is not None and time.monotonic() - lost > self.patience:
                self._die(LinkError(f"{self.address} cannot be reached: {self._why}."))
                return
            if not told or self._after:
                self.notice(f"no connection to {self.address} ({self._why}); trying again")
                told = True
            self._closed.wait(max(self._after, wait * random.uniform(0.5, 1.0)))
            wait = min(LONGEST[self.keepalive], 2 * wait)
        self._die(LinkError("The link was closed."))

    _why = "no answer"
    _after = 0  # seconds that the server has asked for

    def _converse(self) -> bool:
        """One stream from its beginning to its end; whether the server said welcome."""
        out, self._after = Outbox(), 0
        out.put(frame.encode(0, self.hello(self._server, self._order)))
        channel = channel_to(self.address, self.credentials, self.keepalive)
        welcomed = False
        try:
            stream: Any = channel.stream_stream(METHOD)
            joiner = Joiner()
            for piece in stream(out.pieces(), wait_for_ready=False):
                joiner.limit = self.limit
                data = joiner.add(piece)
                if data is not None:
                    welcomed = self._hear(frame.decode(data), out) or welcomed
        except grpc.RpcError as problem:
            self._why = reason(problem)
            if found := self._hopeless():
                raise found from problem
        finally:
            out.close()
            with self._lock:
                self._out = None
            channel.close()
        return welcomed

    def _hopeless(self) -> FlexpError | None:
        """Why to give up: who was let in once has only lost its way, unless its time is over."""
        if not self._server:
            return hopeless(self.address, self.credentials)
        return None if self.credentials is None else outdated(self.credentials)

    def _hear(self, heard: frame.Frame, out: Outbox) -> bool:
        """Takes in a frame; whether it was the welcome."""
        body = heard.body
        if self.told.qsize() >= MOST_TOLD:
            raise LinkError(
                f"{self.address} tells more than anybody reads. Is it the right server?"
            )
        if isinstance(body, Welcome):
            self._begin(body, out)
            return True
        if isinstance(body, Refused):
            if not body.again:
                raise LinkError(body.text)
            self._why, self._after = body.text, min(body.after, LONGEST_AFTER)
        elif heard.number:
            with self._lock:
                asked = self._asked.pop(heard.number, None)
            if asked is not None:
                asked[1].set_result(body)
        elif isinstance(body, Order):
            if body.number > self._order:
                self._order = body.number
                self.told.put(body)
        else:
            self.told.put(body)
            if isinstance(body, End):
                self.patience = self.patience if self.patience is not None else 60.0
        return False

    def _begin(self, welcome: Welcome, out: Outbox) -> None:
        """Goes on where the last stream broke off, or from the beginning."""
        if not welcome.resumed:
            self._server, self._order = welcome.server, 0
            self._lose(welcome)
            with suppress(Empty):
                while True:  # what the server before has told; somebody else may take it, too
                    self.told.get_nowait()
            self.told.put(welcome)
        with self._lock:
            for data, _ in self._asked.values():
                out.put(data)
            self._out = out

    def _lose(self, welcome: Welcome) -> None:
        """Whoever waits for an answer of a turn that is over hears of it.

        So does who asks anything more of it, until it has read the new welcome.
        """
        with self._lock:
            asked, self._asked, self._unread = self._asked, {}, welcome
        for _, future in asked.values():
            future.set_exception(TurnLost(ANEW))

    def _die(self, problem: FlexpError) -> None:
        with self._lock:
            self._dead = problem
            asked, self._asked = self._asked, {}
        for _, future in asked.values():
            future.set_exception(problem)
        self.told.put(problem)


def _taken(future: Future[Body]) -> Body:
    """Waits for an answer; raises what the server could not do as its own error."""
    answer = future.result()
    if isinstance(answer, Problem):
        kind = getattr(errors, answer.kind, LinkError)
        known = isinstance(kind, type) and issubclass(kind, FlexpError)
        raise (kind if known else LinkError)(answer.text)
    return answer


def channel_to(address: str, credentials: Credentials | None, keepalive: Keepalive) -> Any:
    """A gRPC channel: mutual TLS, or plain text within this machine."""
    options = client_options(keepalive)
    if credentials is None:
        return grpc.insecure_channel(address, options)
    return grpc.secure_channel(address, client_credentials(credentials), options)


def reason(problem: grpc.RpcError) -> str:
    """Why a stream ended, in a few words."""
    details = str(cast("Any", problem).details() or cast("Any", problem).code())
    line = details.splitlines()[0]
    return line.rpartition("Failed to connect to remote host: ")[2].rpartition("last error: ")[2]
