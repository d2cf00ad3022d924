"""Lines that gRPC writes to standard error by itself, as one for every handshake that fails.

Strangers could fill a disk with them, and they say why somebody was not let in. So while a server
runs they go through here and into the log, which has a limit; whatever else is written passes.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from types import TracebackType
from typing import Self

from flexp.serving.log import Log

LINE = 4096  # bytes of which a line is made at most
_GRPC = re.compile(rb"[IWE]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ [\w./-]+:\d+\] (.*)")


class Sieve:
    """Within it, descriptor 2 is a pipe that a thread reads; Python's ``sys.stderr`` is not."""

    def __init__(self, log: Log) -> None:
        self.log = log

    def __enter__(self) -> Self:
        self._true = os.dup(2)
        reading, writing = os.pipe()
        os.dup2(writing, 2)
        os.close(writing)
        self._python, sys.stderr = sys.stderr, os.fdopen(os.dup(self._true), "w", 1, "utf-8")
        self._thread = threading.Thread(target=self._run, args=(reading,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, what: BaseException | None, at: TracebackType | None
    ) -> None:
        sys.stderr.close()
        sys.stderr = self._python
        os.dup2(self._true, 2)  # nobody writes into the pipe any more, so the thread ends
        self._thread.join(timeout=5)
        os.close(self._true)

    def _run(self, reading: int) -> None:
        with os.fdopen(reading, "rb") as lines:
            while line := lines.readline(LINE):
                found = _GRPC.match(line)
                if found is None:
                    os.write(self._true, line)
                else:
                    self.log.note("grpc", found[1].decode("utf-8", "replace"))
