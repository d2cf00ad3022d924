"""A log of which no record can be changed, left out or put elsewhere without being seen.

One JSON line per record, in ``audit.jsonl``: its number ``n`` (from 1), ``at`` (seconds), ``what``
happened, ``who`` did it, a ``text``, and two SHA-256 values in hex. ``before`` is the ``chain`` of
the line before ("" at the beginning), ``chain`` is of ``before`` and the other fields. The chain
has no key: who can write the file can write another history. So whoever wants to be sure of the end
keeps the newest ``chain`` elsewhere (``AuditLog.head``) and gives it to ``verify``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from flexp.errors import AuditError

MAX_TEXT, MAX_NAME = 500, 128  # characters
MAX_LINE = 1 << 12  # bytes: of each character at most 4, and the rest of a line
TAIL = 16 * MAX_LINE  # bytes at the end that are checked before a log is gone on with
_KINDS: dict[str, type | tuple[type, ...]] = {
    "n": int,
    "at": (int, float),
    **dict.fromkeys(("what", "who", "text", "before", "chain"), str),
}


class AuditLog:
    """Appends records to a file, each with one write; threads may share it, processes may not.

    A file that is there is gone on with, once its end has been checked. A last line that a kill cut
    short is cut off, and that is the first thing recorded. ``clock`` gives seconds.
    """

    def __init__(self, path: str | Path, clock: Callable[[], float]) -> None:
        """AuditError if the end of the file is not as it was written, or it cannot be opened."""
        self.path, self._clock = Path(path), clock
        self._lock = threading.Lock()
        self.count: int = 0  # records so far
        self.head: str = ""  # the chain value of the newest one
        self._size = 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
            self._handle = os.open(self.path, flags, 0o600)
        except OSError as error:
            raise AuditError(f'"{self.path}" cannot be opened: {error.strerror}.') from error
        try:
            torn = self._go_on()
            if torn:
                self.append("torn", text=f"{torn} bytes of a last record were cut off")
        except BaseException:
            os.close(self._handle)
            raise

    def append(self, what: str, *, who: str = "", text: str = "") -> None:
        """Records that something happened; it is with the operating system when this returns.

        What cannot be printed is replaced, what is too long is cut. AuditError if the record cannot
        be written, or if somebody else has written to the file or cut it.
        """
        with self._lock:
            plain: dict[str, Any] = {
                "n": self.count + 1,
                "at": float(self._clock()),
                "what": printable(what, MAX_NAME),
                "who": printable(who, MAX_NAME),
                "text": printable(text, MAX_TEXT),
            }
            chain = _chain(self.head, plain)
            line = _canonical({**plain, "before": self.head, "chain": chain}) + b"\n"
            self._write(line)
            self.count, self.head, self._size = plain["n"], chain, self._size + len(line)

    def close(self) -> None:
        """Puts what was recorded on the disk; the log takes no further records."""
        os.fsync(self._handle)
        os.close(self._handle)

    def _write(self, line: bytes) -> None:
        if os.fstat(self._handle).st_size != self._size:
            raise AuditError(
                f'"{self.path}" was changed by somebody else while it was in use. Let one process '
                "use it, and look at it with `verify`."
            )
        try:
            written = os.write(self._handle, line)
        except OSError as error:
            raise AuditError(f'"{self.path}" cannot be written: {error.strerror}.') from error
        if written != len(line):
            with suppress(OSError):
                os.ftruncate(self._handle, self._size)
            raise AuditError(f'"{self.path}" cannot be written: its disk is full.')

    def _go_on(self) -> int:
        """Takes count and head from the end of the file; returns how many bytes were cut off."""
        size = os.fstat(self._handle).st_size
        begin = max(0, size - TAIL)
        os.lseek(self._handle, begin, os.SEEK_SET)
        tail = b"".join(iter(lambda: os.read(self._handle, TAIL), b""))
        *lines, torn = tail.split(b"\n")
        if len(torn) > MAX_LINE:
            raise AuditError(f'"{self.path}" is no log: its end has no lines.')
        if begin:  # the first line is only the end of one, and the next is where checking begins
            lines = lines[1:]
        for number, line in enumerate(lines):
            where = f'"{self.path}", line {len(lines) - number} from the end'
            found = _record(line + b"\n", where)
            known = bool(number) or not begin
            if known and (found["n"], found["before"]) != (self.count + 1, self.head):
                raise AuditError(_broken(where, self.count + 1))
            self.count, self.head = found["n"], found["chain"]
        self._size = size - len(torn)
        if torn:
            os.ftruncate(self._handle, self._size)
        return len(torn)


def verify(path: str | Path, *, head: str | None = None) -> tuple[int, str]:
    """How many records a log has, and the chain value of the last; all are as they were written.

    Else AuditError names the line. Records that were cut off the end are missed only if ``head``,
    the chain value of the last one, is given.
    """
    count, chain = 0, ""
    for count, line in enumerate(_lines(Path(path)), 1):
        where = f'"{path}", line {count}'
        found = _record(line, where)
        if (found["n"], found["before"]) != (count, chain):
            raise AuditError(_broken(where, count))
        chain = found["chain"]
    if head is not None and head != chain:
        raise AuditError(
            f'"{path}" ends after line {count}, where {chain[:12] or "nothing"} is written, and '
            f"{head[:12]} was expected: records at its end are missing or others."
        )
    return count, chain


def printable(text: str, most: int) -> str:
    """The text with marks for what cannot be printed, cut to so many characters.

    >>> printable("one\\ntwo", 20), printable("a long story", 6)
    ('one�two', 'a lon…')
    """
    shown = text if len(text) <= most else text[: most - 1] + "…"
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in shown)


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while line := file.readline(MAX_LINE + 1):
                yield line
    except OSError as error:
        raise AuditError(f'"{path}" cannot be read: {error.strerror}. Check the path.') from error


def _record(line: bytes, where: str) -> dict[str, Any]:
    """The fields of a line that is written just as this module writes it."""
    try:
        found: Any = json.loads(line)
        same = isinstance(found, dict) and _canonical(cast("dict[str, Any]", found)) + b"\n" == line
    except (ValueError, RecursionError) as error:
        raise AuditError(f"{where}: this is no record ({error!s:.80}).") from error
    fields = cast("dict[str, Any]", found) if same else {}
    right = fields.keys() == _KINDS.keys() and all(
        isinstance(fields[name], kind) and not isinstance(fields[name], bool)
        for name, kind in _KINDS.items()
    )
    if not right or not math.isfinite(fields["at"]):
        raise AuditError(f"{where}: this is no record as they are written here.")
    plain = {name: fields[name] for name in ("n", "at", "what", "who", "text")}
    if fields["chain"] != _chain(fields["before"], plain):
        raise AuditError(f"{where}: the record was changed: its chain value is another.")
    return fields


def _broken(where: str, count: int) -> str:
    return (
        f"{where}: record {count} does not follow the one before. Some are missing or were moved."
    )


def _chain(before: str, plain: dict[str, Any]) -> str:
    return hashlib.sha256(before.encode() + _canonical(plain)).hexdigest()


def _canonical(plain: dict[str, Any]) -> bytes:
    """The one spelling of a record in JSON."""
    text = json.dumps(
        plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()
