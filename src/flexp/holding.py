"""The folder of a run, held by one process at a time."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from flexp.errors import CheckpointError, FlexpError
from flexp.parcel import sweep

LOCK = ".lock"


@contextmanager
def hold(out: Path, *, resume: bool) -> Generator[None]:
    """Makes the folder of a run and keeps other processes out of it, until this one ends or dies.

    FlexpError if it cannot be written, is held already, or holds another run; so it is for a file
    that cannot be used while it is held. A folder in which nothing was written is removed.
    """
    if (out / "checkpoint").exists() and not resume:
        raise FlexpError(
            f"{out} holds a run already. Continue it with --resume, or choose another folder with "
            "out=FOLDER."
        )
    lock = FileLock(out / LOCK, timeout=0)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        sweep(out)
    except Timeout:
        raise FlexpError(
            f"{out} is in use by another process of this program. Wait for it or stop it, or "
            "choose another folder with out=FOLDER."
        ) from None
    except OSError as problem:
        raise FlexpError(
            f"{out} cannot be written: {problem.strerror}. Choose another folder with out=FOLDER."
        ) from problem
    try:
        yield
    except OSError as problem:
        raise CheckpointError(
            f"{problem.filename or out} cannot be used: {problem.strerror or problem}. Make room "
            "or put it right, and start the same command again, a run with --resume: it goes on "
            "from the last checkpoint."
        ) from problem
    finally:
        with suppress(OSError):  # on Windows nobody removes what is open
            if [p.name for p in out.iterdir()] == [LOCK]:
                (out / LOCK).unlink()
                out.rmdir()
        lock.release()
