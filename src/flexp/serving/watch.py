"""Once a second: graphs that nobody comes for, clients that stand still, a disk that fills up."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from flexp.engine.guests import Guest
from flexp.engine.network import NetworkEngine
from flexp.plan.devices import format_bytes
from flexp.serving.log import Log
from flexp.serving.reception import Reception

EVERY = 1.0  # seconds
STILL = 60.0  # seconds without a word of a client that is connected and has something to do
GRAPHS = 30.0  # seconds that a forward waits for its backward before it costs memory no more
LOW = 256 << 20  # bytes: a checkpoint and its predecessor may need them


class Watch:
    """A thread beside the run, which changes nothing of what comes of it."""

    def __init__(
        self,
        reception: Reception,
        out: Path,
        log: Log,
        *,
        still: float = STILL,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.reception, self.out, self.log = reception, out, log
        self.still, self.clock = still, clock
        self.silent: dict[str, float] = {}  # clients of whom was said that they stand still
        self.full = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="flexp-operator", daemon=True)

    def start(self) -> None:
        """Begins to look."""
        self._thread.start()

    def stop(self) -> None:
        """Ends."""
        self._over.set()
        self._thread.join()

    def look(self) -> None:
        """One look at everything."""
        self._disk()
        if self.reception.stage is not None:
            engine = self.reception.stage.engine
            engine.trunk.pending.sweep()
            self._clients(engine)

    def _run(self) -> None:
        while not self._over.wait(EVERY):
            try:
                self.look()
            except Exception as problem:  # noqa: BLE001 the next look may do better
                self.log.alert("", f"the server's watch: {type(problem).__name__}: {problem}")

    def _disk(self) -> None:
        try:
            free = shutil.disk_usage(self.out).free
        except OSError:  # it is not there yet
            return
        if free < LOW and not self.full:
            self.log.alert(
                "", f"only {format_bytes(free)} are free where {self.out} is: make room, or the "
                "next checkpoint may not be written",
            )  # fmt: skip
        self.full = free < LOW

    def _clients(self, engine: NetworkEngine) -> None:
        with engine.guests.lock:
            held = list(engine.guests.held.values())
        for guest in held:
            since = self._still(guest, engine)
            if since is not None and self.silent.get(guest.name) != since:
                self.silent[guest.name] = since
                self.log.alert(
                    guest.name,
                    f"{guest.name} is connected, but nothing has come of its turn for "
                    f"{self.still:.0f} seconds; the others wait for it",
                )

    def _still(self, guest: Guest, engine: NetworkEngine) -> float | None:
        """When a client that has something to do was last heard, if that is too long ago."""
        job, call = guest.job, guest.call
        if job is None or call is None or not guest.ready or job.order.kind == "speak":
            return None
        if job.order.seat.near_only(engine.backbone.depth):
            return None  # all of its turn is on the device
        since = max(call.heard, job.began)
        return since if self.clock() - since > self.still else None
