"""What waiting for one more client is worth: what passes cost, and when who is expected."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from flexp.link.messages import Phase

FADES = 0.9  # what an older pass counts, of the one after it
LONGEST = 0.25  # seconds that nobody is waited for beyond
ALIKE, AT_ONCE = 1.5, 0.01  # how many times as long, and seconds beside, is about the same time
LITTLE = 0.1  # of a pass's time, what its fixed part may be at most for it to be long enough
GUESS = 0.1  # of a pass, what it costs whatever its size, until passes of two sizes were seen


@dataclass
class Cost:
    """Seconds of passes over their tokens: a straight line, older passes counting less."""

    n: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """One more pass."""
        new = (1.0, tokens, seconds, tokens * tokens, tokens * seconds)
        old = (self.n, self.x, self.y, self.xx, self.xy)
        self.n, self.x, self.y, self.xx, self.xy = (
            FADES * a + b for a, b in zip(old, new, strict=True)
        )

    @property
    def line(self) -> tuple[float, float]:
        """Seconds of a pass of no tokens, and of one token more.

        While all passes had as many, the first is a guess: a part of the mean.
        """
        if not self.n:
            return 0.0, 0.0
        spread = self.n * self.xx - self.x * self.x
        if spread <= 1e-9 * self.n * self.xx:
            return GUESS * self.y / self.n, (1 - GUESS) * self.y / max(self.x, 1.0)
        slope = (self.n * self.xy - self.x * self.y) / spread
        return max(0.0, (self.y - slope * self.x) / self.n), max(0.0, slope)


@dataclass
class Costs:
    """What passes of each phase cost, as "forward"."""

    held: dict[Phase, Cost] = field(default_factory=dict[Phase, Cost])

    def took(self, phase: Phase, tokens: int, seconds: float) -> None:
        """A pass of that phase has been computed."""
        self.held.setdefault(phase, Cost()).add(tokens, seconds)

    def fixed(self, phase: Phase) -> float:
        """Seconds that coming along with such a pass saves, and so is waited for at most."""
        return min(LONGEST, self.held.get(phase, Cost()).line[0])

    def whole(self, phase: Phase) -> float:
        """Seconds of such a pass in the mean."""
        held = self.held.get(phase, Cost())
        return min(LONGEST, held.y / held.n if held.n else 0.0)

    def enough(self, phase: Phase) -> float:
        """Tokens of a pass beyond which one more saves little, and all of it answer later."""
        fixed, slope = self.held.get(phase, Cost()).line
        return fixed / (LITTLE * slope) if slope else math.inf


@dataclass
class Habits:
    """How long each client usually computes between an answer and its next message, in seconds.

    ``phase`` is that of the message that was answered.
    """

    answered: dict[str, tuple[str, float]] = field(default_factory=dict[str, tuple[str, float]])
    usual: dict[tuple[str, str], float] = field(default_factory=dict[tuple[str, str], float])

    def asks(self, client: str, now: float) -> None:
        """A client's next message is here."""
        if client in self.answered:
            phase, since = self.answered.pop(client)
            took, key = now - since, (client, phase)
            self.usual[key] = (self.usual.get(key, took) + took) / 2

    def has(self, client: str, phase: str, now: float) -> None:
        """A client has its answer; who has left is not expected back."""
        if phase != "leave":
            self.answered[client] = phase, now

    def alike(self, one: str, other: str, phase: str) -> bool:
        """Whether both usually come back in about the same time after such an answer."""
        a, b = (self.usual.get((client, phase), math.inf) for client in (one, other))
        return max(a, b) <= min(a, b) * ALIKE + AT_ONCE

    def expected(self, whom: Iterable[str], now: float, end: float) -> bool:
        """Whether one of them usually comes by then, and is not overdue."""
        for client in whom:
            phase, since = self.answered.get(client, ("", math.inf))
            due = since + self.usual.get((client, phase), math.inf)
            if now - (end - now) <= due <= end:
                return True
        return False
