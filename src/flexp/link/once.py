"""One question to a server, before there is a hello: how a device asks for its certificate."""

from __future__ import annotations

import time
from typing import Any

import grpc

from flexp.errors import LinkError
from flexp.identity.credentials import Credentials
from flexp.link import frame
from flexp.link.control import Refused
from flexp.link.diagnosis import hopeless
from flexp.link.dial import FIRST, STRANGER, channel_to, reason
from flexp.link.frame import Body, Joiner
from flexp.link.grpc import LONGEST, METHOD, check_plain
from flexp.link.outbox import Outbox


def ask_once(address: str, credentials: Credentials | None, body: Body, patience: float) -> Body:
    """One question on a stream of its own, before there is a hello; raises what was refused."""
    check_plain(address, credentials)
    end, wait = time.monotonic() + patience, FIRST
    while True:
        try:
            heard = _asked(address, credentials, body, max(1.0, end - time.monotonic()))
            if not isinstance(heard, Refused):
                return heard
            if not heard.again or time.monotonic() + heard.after > end:
                raise LinkError(heard.text)
            wait = max(wait, heard.after)
        except grpc.RpcError as problem:
            if found := hopeless(address, credentials):
                raise found from problem
            if time.monotonic() + wait > end:
                raise LinkError(f"{address} gave no answer: {reason(problem)}.") from problem
        time.sleep(wait)
        wait = min(LONGEST["lan"], 2 * wait)


def _asked(address: str, credentials: Credentials | None, body: Body, patience: float) -> Body:
    out = Outbox()
    out.put(frame.encode(1, body))
    channel = channel_to(address, credentials, "lan")
    joiner = Joiner(STRANGER)
    try:
        stream: Any = channel.stream_stream(METHOD)
        for piece in stream(out.pieces(), timeout=patience, wait_for_ready=False):
            data = joiner.add(piece)
            if data is not None:
                return frame.decode(data).body
    finally:
        out.close()
        channel.close()
    raise LinkError(f"{address} gave no answer.")
