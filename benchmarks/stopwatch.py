"""Starts processes as tests do, and notes how long their servers compute for each client's turn.

What tests/network/nursery.py starts does the same here; a server also writes the seconds of each
turn to FLEXP_STOPWATCH when it ends, as JSON by client and round.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from functools import wraps
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1] / "tests"


def stopwatch() -> None:
    """From here on every trunk of this process, and of those that it starts, is timed."""
    from flexp.server.trunk import Trunk

    spent: dict[str, dict[int, float]] = {}
    answer, close = Trunk.answer, Trunk.close

    @wraps(answer)
    def timed(self: Trunk, client: str, message: Any, digest: str) -> Any:
        began = time.perf_counter()
        try:
            return answer(self, client, message, digest)
        finally:
            turns = spent.setdefault(client, {})
            turns[message.key.round] = (
                turns.get(message.key.round, 0.0) + time.perf_counter() - began
            )

    @wraps(close)
    def closed(self: Trunk) -> None:
        close(self)
        if "FLEXP_STOPWATCH" in os.environ:
            Path(os.environ["FLEXP_STOPWATCH"]).write_text(json.dumps(spent), encoding="utf-8")

    Trunk.answer, Trunk.close = timed, closed


if __name__ == "__main__":
    sys.path[:0] = [str(TESTS), str(TESTS.parent / "src")]
    stopwatch()
    runpy.run_path(str(TESTS / "network" / "nursery.py"), run_name="__main__")
