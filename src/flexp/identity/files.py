"""Files and folders that only their owner may read, and a lock between processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from flexp.errors import IdentityError, ParcelError
from flexp.parcel import write_atomic

OTHERS = 0o077  # what group and world may do


def make_folder(folder: Path) -> None:
    """Makes the folder for its owner alone; one that is there must be closed to others already."""
    try:
        folder.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        refuse_shared(folder)
    except OSError as error:
        raise IdentityError(f'"{folder}" cannot be made: {error.strerror}.') from error


def refuse_shared(path: Path) -> None:
    """IdentityError if others than the owner may read or change what is there (POSIX only)."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise IdentityError(f'"{path}" cannot be read: {error.strerror}.') from error
    if os.name == "posix" and mode & OTHERS:
        right = "700" if path.is_dir() else "600"
        raise IdentityError(
            f'"{path}" is open to other users (mode {mode & 0o777:o}), and a key may have been '
            f"copied. Close it with `chmod {right}`, or better, replace the key."
        )


def read(path: Path, *, private: bool = False, limit: int = 1 << 20) -> bytes:
    """The file's bytes; a private one must be closed to others."""
    if private:
        refuse_shared(path)
    try:
        if path.stat().st_size > limit:
            raise IdentityError(f'"{path}" is larger than {limit} bytes; it is another file.')
        return path.read_bytes()
    except OSError as error:
        raise IdentityError(f'"{path}" cannot be read: {error.strerror}.') from error


def mark(path: Path) -> tuple[int, int, int]:
    """What changes when a file is replaced."""
    try:
        found = path.stat()
    except OSError as error:
        raise IdentityError(f'"{path}" cannot be read: {error.strerror}.') from error
    return found.st_ino, found.st_mtime_ns, found.st_size


def write(path: Path, data: bytes) -> None:
    """Replaces the file in one step, readable by its owner alone."""
    try:
        write_atomic(path, data)
    except ParcelError as error:
        raise IdentityError(str(error)) from error


def refuse_present(path: Path) -> None:
    """IdentityError if something is there that would be overwritten."""
    if path.exists():
        raise IdentityError(f'"{path}" is there already. Choose another name, or remove it.')


@contextmanager
def locked(path: Path) -> Generator[None]:
    """Keeps other processes out that lock the same file; a lock ends with its process."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise IdentityError(f'"{path}" cannot be locked: {error.strerror}.') from error
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_LOCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
