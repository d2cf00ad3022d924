"""Lines of a file as a stream of bytes: bounded, split at line feeds only, and told by place.

Lines and bytes count from 1, and a byte counts within its line, as an editor's column does. An
offset is where a line starts, in bytes from the beginning of the file, as ``dd skip=`` takes it.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from flexp.errors import DataError

CHUNK = 1 << 16  # bytes read at once
# A row gives its first few hundred tokens, so more is a mistake; and a text of 1 MiB can take
# eight times that while it is decoded and parsed.
LONGEST = 1 << 20  # bytes of a line, and of the lines of one record

_MARK = b"\xef\xbb\xbf"  # the byte order mark of UTF-8
_PACKED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True)
class Source:
    """An open file, what it is called in errors, and how many bytes it has."""

    file: BinaryIO
    where: str
    size: int


class Line(NamedTuple):
    """A line with its line feed; ``mark`` bytes of a byte order mark stood before the text."""

    number: int
    offset: int
    text: str
    mark: int = 0

    def byte(self, position: int) -> int:
        """The byte of the line at which the character at this position begins."""
        return self.mark + len(self.text[:position].encode()) + 1


def place(where: str, number: int, offset: int, byte: int | None = None) -> str:
    """How an error names a place.

    >>> place("a.jsonl", 3, 120, 7)
    'a.jsonl, line 3, byte 7 (the line starts at offset 120)'
    """
    at = f"{where}, line {number}" + ("" if byte is None else f", byte {byte}")
    return f"{at} (the line starts at offset {offset})"


@contextmanager
def opened(path: Path, chunk: int = CHUNK) -> Generator[Source]:
    """A file to read once; DataError if it is none, or if it has changed when all was read.

    ``chunk`` is how many bytes are asked of the system at once; nothing else depends on it.
    """
    where = path.as_posix()
    with _reading(where):
        raw = io.FileIO(path, opener=_without_waiting)
    with io.BufferedReader(raw, chunk) as file:
        before = os.fstat(raw.fileno())
        if not stat.S_ISREG(before.st_mode):
            raise DataError(
                f"{where}: a pipe or a device, not a file. Write what comes out of it to a file."
            )
        yield Source(file, where, before.st_size)
        after = os.fstat(raw.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise _changed(where)


def lines_of(source: Source) -> Iterator[Line]:
    """The lines of a UTF-8 file; DataError for a line that is too long or is no text.

    Only a line feed ends a line: a carriage return, U+0085 and U+2028 may be part of a text.
    """
    where, number, offset = source.where, 0, 0
    while data := _next(source):
        number += 1
        mark = len(_MARK) if number == 1 and data.startswith(_MARK) else 0
        if number == 1:
            _unpacked(data, where)
        if offset + len(data) > source.size:
            raise _changed(where)
        if len(data) > LONGEST:
            raise DataError(
                f"{place(where, number, offset)}: longer than {LONGEST} bytes. Split the text into "
                "several rows; a row is cut to task.max_length tokens anyway."
            )
        yield Line(number, offset, _text(data, mark, where, number, offset), mark)
        offset += len(data)


def _next(source: Source) -> bytes:
    """The next line, or as much of it as tells that it is too long."""
    with _reading(source.where):
        return source.file.readline(LONGEST + 1)


def _text(data: bytes, mark: int, where: str, number: int, offset: int) -> str:
    # A NUL is valid UTF-8, and what every second byte of another encoding is.
    at = data.find(b"\0")
    try:
        text = data[mark:].decode() if mark else data.decode()
    except UnicodeDecodeError as broken:
        at = at if 0 <= at < mark + broken.start else mark + broken.start
    else:
        if at < 0:
            return text
    reason = "not UTF-8" if data[at] else "a NUL byte"
    raise DataError(
        f"{place(where, number, offset, at + 1)}: {reason}. Save the file as UTF-8 text."
    )


def _unpacked(data: bytes, where: str) -> None:
    for magic, name in _PACKED.items():
        if data.startswith(magic):
            raise DataError(
                f"{place(where, 1, 0, 1)}: compressed with {name}, whatever the file is called. "
                "Unpack it first."
            )


def _without_waiting(path: str, flags: int) -> int:
    """Opens a pipe at once, where nobody writes to it: then it can be told and refused."""
    return os.open(path, flags | cast(int, getattr(os, "O_NONBLOCK", 0)))


@contextmanager
def _reading(where: str) -> Generator[None]:
    try:
        yield
    except OSError as broken:
        reason = broken.strerror or str(broken)
        raise DataError(f"{where}: cannot be read ({reason}). Check the file.") from broken


def _changed(where: str) -> DataError:
    return DataError(
        f"{where}: changed while it was read. Wait until it is complete, then start again."
    )
