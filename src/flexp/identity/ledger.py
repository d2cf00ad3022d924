"""What an authority has issued: one JSON file that is never half written."""

from __future__ import annotations

import json
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from flexp.errors import IdentityError
from flexp.identity import files
from flexp.identity.peer import NAMED, Peer, Role

VERSION = 1
MAX_BYTES = 1 << 28
ROLES = ("server", *NAMED.values())


@dataclass(frozen=True)
class Record:
    """One certificate. Times are ISO 8601 in UTC.

    Of a ticket that was used: ``led_to`` is the serial number of the client's certificate, and
    ``certificate`` the same in PEM, should the client ask again.
    """

    serial: str
    name: str
    role: Role
    not_after: str
    revoked: str | None = None
    led_to: str | None = None
    certificate: str | None = None

    @property
    def ends(self) -> datetime:
        """When the certificate ends."""
        return datetime.fromisoformat(self.not_after)


def record_of(peer: Peer, name: str) -> Record:
    """The record of a certificate that has just been signed."""
    return Record(peer.serial, name, peer.role, stamp(peer.not_after))


def stamp(moment: datetime) -> str:
    """A moment as it stands in the file."""
    return moment.astimezone(UTC).isoformat(timespec="seconds")


class Ledger:
    """Records by serial number; several threads and processes may share the file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._seen: tuple[object, Mapping[str, Record]] = (None, {})

    def begin(self) -> None:
        """Writes a ledger without records."""
        self._write({})

    def records(self) -> Mapping[str, Record]:
        """All records, in the order in which they were made; parsed only when the file is new."""
        # Before the file is read, so that a change in between is seen the next time. Records are
        # only added or lengthened: no two versions of the file have one size.
        mark = files.mark(self._path)
        seen, records = self._seen
        if mark != seen:
            records = _parsed(files.read(self._path, limit=MAX_BYTES), self._path)
            self._seen = mark, records
        return records

    @contextmanager
    def change(self) -> Generator[dict[str, Record]]:
        """Records to be changed; on disk when the block has ended, unchanged if it raises.

        Nothing that a block has signed may be handed out before the block has ended.
        """
        with self._lock, files.locked(self._path.with_suffix(".lock")):
            before = self.records()
            records = dict(before)
            yield records
            if records != before:
                self._write(records)

    def _write(self, records: Mapping[str, Record]) -> None:
        rows = [
            {k: v for k, v in asdict(record).items() if v is not None}
            for record in records.values()
        ]
        document = {"version": VERSION, "issued": rows}
        files.write(self._path, json.dumps(document, indent=1).encode())


def revoke(record: Record, at: datetime) -> Record:
    """The record as revoked, from the first time on."""
    return record if record.revoked else replace(record, revoked=stamp(at))


def _parsed(data: bytes, path: Path) -> dict[str, Record]:
    try:
        document = json.loads(data)
        if document["version"] != VERSION:
            raise IdentityError(
                f'"{path}" has format {document["version"]}, this program knows {VERSION}.'
            )
        made = [_record(row) for row in document["issued"]]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise IdentityError(
            f'"{path}" is damaged ({error}). Put its newest backup there: without it nobody knows '
            "what was issued and revoked."
        ) from error
    return {record.serial: record for record in made}


def _record(row: Any) -> Record:
    fields = cast("dict[str, Any]", row) if isinstance(row, dict) else {}
    if not all(isinstance(value, str) for value in fields.values()):
        raise ValueError("a field that is no text")
    made = Record(**fields)
    if made.role not in ROLES or made.ends.tzinfo is None:
        raise ValueError(f"the record of {made.serial}")
    return made
