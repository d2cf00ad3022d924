"""What each `flexp ca` command does: from its arguments to one document of plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flexp.errors import IdentityError
from flexp.identity import credentials, files, tokens
from flexp.identity.authority import CLIENT_DAYS, SERVER_DAYS, Authority
from flexp.identity.ledger import Record
from flexp.identity.peer import certificate_in, who


def init(folder: Path) -> dict[str, Any]:
    """Makes an authority."""
    made = Authority.init(folder)
    ends = certificate_in(made.ca).not_valid_after_utc
    return {"authority": str(folder), "not_after": ends.isoformat()}


def issue_server(
    folder: Path, names: Sequence[str], out: Path, days: float | None
) -> dict[str, Any]:
    """Writes a server's credentials to a new folder."""
    files.refuse_present(out / credentials.CERTIFICATE)
    made = Authority.open(folder).issue_server(names, days=days or SERVER_DAYS)
    credentials.store(out, made)
    return _issued(made.certificate, names[0], out) | {"names": list(names)}


def issue_client(
    folder: Path, name: str, csr: Path, out: Path, days: float | None
) -> dict[str, Any]:
    """Writes the certificate for a client's request."""
    files.refuse_present(out)
    made = Authority.open(folder).issue_client(files.read(csr), name, days=days or CLIENT_DAYS)
    files.write(out, made)
    return _issued(made, name, out)


def kit(
    folder: Path, name: str, out: Path, *, host: str | None = None, hours: float
) -> dict[str, Any]:
    """Writes a start-up kit."""
    files.refuse_present(out)
    if host is not None:
        _check_host(host)
    made = Authority.open(folder).ticket(name, hours=hours, host=host)
    tokens.write_kit(out, made)
    return _issued(made.certificate, name, out) | {"host": host}


def revoke(folder: Path, which: str) -> dict[str, Any]:
    """Revokes a serial number, or all that a name holds."""
    found = Authority.open(folder).revoke(which)
    return {"authority": str(folder), "revoked": [_row(record) for record in found]}


def listing(folder: Path) -> dict[str, Any]:
    """Everything that was issued."""
    found = Authority.open(folder).issued()
    return {"authority": str(folder), "issued": [_row(record) for record in found]}


def _issued(certificate: bytes, name: str, out: Path) -> dict[str, Any]:
    peer = who(certificate)
    return {
        "out": str(out),
        "role": peer.role,
        "name": name,
        "serial": peer.serial,
        "not_after": peer.not_after.isoformat(),
    }


def _row(record: Record) -> dict[str, Any]:
    row = asdict(record)
    del row["certificate"]
    return row


def _check_host(host: str) -> None:
    name, colon, port = host.rpartition(":")
    if not (name and colon and port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
        raise IdentityError(f'"{host[:200]}" is not HOST:PORT, as flexp.example.org:8443.')
