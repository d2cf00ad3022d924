"""Hidden states that the server keeps for a turn, so that they need not come in every epoch.

A client that does not train in front of its cut sends a row once, and names it from then on. What
is not here any more the server asks for, so nothing depends on its keeping anything.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from math import prod

from torch import Tensor

from flexp.errors import LinkError
from flexp.link.messages import Forward
from flexp.model.prefix import ends_of, filled

MOST = 16  # numbers of a batch that is put together, for each that came or is kept


@dataclass
class Kept:
    """One client's rows by number, without their padding; the oldest first."""

    rows: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    bytes: int = 0

    def put(self, number: int, state: Tensor) -> None:
        """Keeps a copy of a row."""
        self.pop(number)
        self.rows[number] = state.clone()
        self.bytes += state.nbytes

    def pop(self, number: int) -> None:
        """Drops a row, if it is there."""
        state = self.rows.pop(number, None)
        self.bytes -= 0 if state is None else state.nbytes


@dataclass
class Rows:
    """Rows by client, each within ``each`` bytes. Any thread may call any method."""

    each: int = 0
    held: dict[str, Kept] = field(default_factory=dict[str, Kept])  # the longest unused first
    lock: threading.Lock = field(default_factory=threading.Lock)

    def lacking(self, client: str, m: Forward) -> list[int]:
        """The numbers of rows that a message names, and that are not here."""
        with self.lock:
            mine = self.held.get(client, Kept()).rows
            return sorted({-n for n in m.rows if n < 0 and -n not in mine})

    def whole(self, client: str, m: Forward) -> Forward:
        """The message with all rows on board, none of which lacks; LinkError if they do not fit."""
        if all(n >= 0 for n in m.rows):
            return m
        length, size = m.hidden.shape[1], prod(m.hidden.shape[1:])
        with self.lock:
            mine = self.held[client].rows
            states = {k: mine[-n] for k, n in enumerate(m.rows) if n < 0}
        here = m.hidden.numel() + sum({id(s): s.numel() for s in states.values()}.values())
        longest = max(map(len, states.values()))
        if longest > length or len(m.rows) * size > MOST * here:
            raise LinkError(
                f"{len(m.rows)} rows of length {length} are not those that were kept, the longest "
                f"of which has {longest}."
            )
        places = (k for k, n in enumerate(m.rows) if n >= 0)
        return replace(m, hidden=filled(states | dict(zip(places, m.hidden, strict=True)), length))

    def keep(self, client: str, m: Forward) -> None:
        """Keeps what came under a number in a whole message. Beyond the budget the oldest go."""
        if not self.each or not m.rows:
            return
        ends = [m.hidden.shape[1]] * len(m.rows) if m.mask is None else ends_of(m.mask)
        with self.lock:
            mine = self.held[client] = self.held.pop(client, Kept())
            for n, state, end in zip(m.rows, m.hidden, ends, strict=True):
                if n > 0 and end:
                    mine.put(n, state[:end])
            while mine.bytes > self.each:
                mine.pop(next(iter(mine.rows)))

    def drop(self, client: str) -> None:
        """Keeps nothing of a client any more."""
        with self.lock:
            self.held.pop(client, None)

    def fit(self, room: int) -> None:
        """Drops clients' rows until all fit into so many bytes."""
        with self.lock:
            while self.held and sum(kept.bytes for kept in self.held.values()) > room:
                del self.held[next(iter(self.held))]

    def bytes(self) -> int:
        """What all of them take."""
        with self.lock:
            return sum(kept.bytes for kept in self.held.values())
