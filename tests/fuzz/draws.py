"""Decisions taken from bytes, so that whatever finds inputs of bytes finds cases of anything."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


class Draws:
    """Numbers and choices out of bytes; when these have run out, always the first."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    @property
    def more(self) -> bool:
        """Whether there are bytes left."""
        return self.at < len(self.data)

    def take(self, size: int) -> bytes:
        found = self.data[self.at : self.at + size]
        self.at += size
        return found.ljust(size, b"\0")

    def whole(self, low: int, high: int) -> int:
        """A whole number from low to high."""
        span = high - low + 1
        size = max(1, (span.bit_length() + 7) // 8)
        return low + int.from_bytes(self.take(size), "little") % span

    def choose(self, items: Sequence[T]) -> T:
        return items[self.whole(0, len(items) - 1)]

    def number(self, odd: Sequence[float], *, below: float = 1e38) -> float:
        """One of some odd numbers, or any float32 up to a size."""
        at = self.whole(0, 2 * len(odd))
        if at < len(odd):
            return odd[at]
        (found,) = struct.unpack("<f", self.take(4))
        return found if abs(found) <= below else 1.0


@functools.cache
def scratch() -> Path:
    """A folder for files, in memory where there is such a place; gone when the program ends."""
    shared = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="flexp-fuzz-", dir=shared if shared.is_dir() else None))
    maker = os.getpid()

    def clear() -> None:
        if os.getpid() == maker:  # a process that was forked does not
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(clear)
    return folder


def at(name: str, data: bytes) -> Path:
    """A file of the scratch folder with this in it."""
    path = scratch() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path
