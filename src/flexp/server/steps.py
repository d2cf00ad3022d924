"""The exactly-once step table: a repeated message gets the answer it got before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from flexp.errors import StepError
from flexp.link.messages import Answer, StepKey


@dataclass
class StepTable:
    """Answers by key for one client; rows below the last common commit are dropped.

    A key runs once. The same key with the same digest gets its answer again; with another digest,
    or a key from before the latest step, raises StepError.
    """

    rows: dict[StepKey, tuple[str, Answer]] = field(
        default_factory=dict[StepKey, tuple[str, Answer]]
    )
    latest: tuple[int, int, int] = (-1, 0, 0)
    committed: tuple[int, int, int] = (-1, 0, 0)

    def once(self, key: StepKey, digest: str, run: Callable[[], Answer]) -> Answer:
        """The answer to a message, computed at most once."""
        if key in self.rows:
            seen, answer = self.rows[key]
            if seen != digest:
                raise StepError(f"A second, different message came under {key}. It was refused.")
            return answer
        at = (key.round, key.wave, key.step)
        if at < self.latest or at <= self.committed:
            raise StepError(
                f"Step {at} (round, wave, step) is over: the client is at {self.latest}. "
                "Resume from the last common commit."
            )
        answer = run()
        if at > self.latest:
            # The client has seen every answer of the steps before, or it would not be here.
            self.rows = {k: v for k, v in self.rows.items() if (k.round, k.wave, k.step) >= at}
            self.latest = at
        self.rows[key] = (digest, answer)
        return answer

    def commit(self) -> None:
        """Drops all rows: both sides have everything up to here on disk."""
        self.rows, self.committed = {}, self.latest
