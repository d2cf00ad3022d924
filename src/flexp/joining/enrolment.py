"""`flexp enroll`: a key made on the device, and the certificate that a start-up kit brings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flexp.errors import IdentityError
from flexp.identity import credentials, tokens
from flexp.identity.credentials import Credentials
from flexp.identity.peer import who
from flexp.link.control import Data, Enroll
from flexp.link.once import ask_once


def enrol(kit: Path, out: Path, server: str | None, *, patience: float) -> dict[str, Any]:
    """Fetches the certificate once; after a lost answer the same call gets the same one.

    IdentityError or LinkError, with what the server said, if it does not give one.
    """
    opened = tokens.open_kit(kit)
    address = server or opened.host
    if address is None:
        raise IdentityError(f"{kit} does not say where the server is. Give --server HOST:PORT.")
    asked = credentials.prepare(out)
    answer = ask_once(address, opened.credentials(), Enroll(asked.csr), patience)
    if not isinstance(answer, Data):
        raise IdentityError(f"{address} gave no certificate.")
    made = Credentials(opened.ca, answer.data, asked.key)
    peer = who(answer.data)
    credentials.store(out, made)
    return {
        "name": peer.name,
        "out": str(out),
        "server": address,
        "serial": peer.serial,
        "not_after": peer.not_after.isoformat(),
    }
