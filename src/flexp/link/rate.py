"""Token buckets: so much at once and then so much per second, for every peer by itself."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

PEERS = 1024  # that are told apart; who comes beyond them shares one bucket with all others
REST = ""


@dataclass(frozen=True)
class Rate:
    """How much may come at once, and per second from then on."""

    most: float
    per_second: float


@dataclass
class _Bucket:
    level: float
    at: float


@dataclass
class Buckets:
    """One bucket for each peer; every method may be called from any thread."""

    rate: Rate
    clock: Callable[[], float] = time.monotonic
    held: dict[str, _Bucket] = field(default_factory=dict[str, _Bucket])
    forgot: float = -math.inf
    lock: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, peer: str, count: float = 1.0) -> float:
        """Takes so much if it is there; else for how many seconds it is not."""
        with self.lock:
            bucket = self._filled(peer)
            if bucket.level >= count:
                bucket.level -= count
                return 0.0
            return (count - bucket.level) / self.rate.per_second

    def spend(self, peer: str, count: float = 1.0) -> float:
        """Takes so much, there or not; for how many seconds to wait before anything more."""
        with self.lock:
            bucket = self._filled(peer)
            bucket.level -= count
            return max(0.0, -bucket.level / self.rate.per_second)

    def empty(self, peer: str) -> float:
        """For how many seconds there is nothing for this peer."""
        with self.lock:
            return max(0.0, (1.0 - self._filled(peer).level) / self.rate.per_second)

    def _filled(self, peer: str) -> _Bucket:
        now = self.clock()
        if peer not in self.held and len(self.held) >= PEERS:
            self._forget(now)
            peer = peer if len(self.held) < PEERS else REST
        bucket = self.held.setdefault(peer, _Bucket(self.rate.most, now))
        bucket.level, bucket.at = self._level(bucket, now), now
        return bucket

    def _forget(self, now: float) -> None:
        """Drops buckets that are full, which are as good as new; at most once a second."""
        if now - self.forgot >= 1.0:
            held, self.forgot = self.held, now
            self.held = {p: b for p, b in held.items() if self._level(b, now) < self.rate.most}

    def _level(self, bucket: _Bucket, now: float) -> float:
        return min(self.rate.most, bucket.level + (now - bucket.at) * self.rate.per_second)
