"""The exactly-once step table: a repeated message gets the answer it got before."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from flexp.errors import StepError
from flexp.link.messages import Answer, StepKey

KEPT = 16  # answers of one step
MAX_ROWS = 1 << 17  # messages of one step


@dataclass
class StepTable:
    """Answers by key for one client; rows below the last common commit are dropped.

    A client asks one thing after another, so of the answers of a step only the newest are kept: a
    step in which a whole test set is scored would else keep all its hidden states.

    A key runs once. The same key with the same digest gets its answer again; with another digest,
    or a key from before the latest step, raises StepError.
    """

    rows: dict[StepKey, tuple[str, Answer | None]] = field(
        default_factory=dict[StepKey, tuple[str, Answer | None]]
    )
    kept: deque[StepKey] = field(default_factory=deque[StepKey])  # whose answers are there
    latest: tuple[int, int, int] = (-1, 0, 0)
    committed: tuple[int, int, int] = (-1, 0, 0)

    def find(self, key: StepKey, digest: str) -> Answer | None:
        """The answer to a message that was answered before; None if it is to be carried out."""
        if key in self.rows:
            seen, answer = self.rows[key]
            if seen != digest:
                raise StepError(f"A second, different message came under {key}. It was refused.")
            if answer is None:
                raise StepError(f"The answer to {key} is gone: newer ones were asked for since.")
            return answer
        at = _place(key)
        if at < self.latest or at <= self.committed:
            raise StepError(
                f"Step {at} (round, wave, step) is over: the client is at {self.latest}. "
                "Resume from the last common commit."
            )
        if len(self.rows) >= MAX_ROWS and at == self.latest:
            raise StepError(f"More than {MAX_ROWS} messages in step {at}. Begin a new step.")
        return None

    def keep(self, key: StepKey, digest: str, answer: Answer) -> None:
        """Keeps the answer to a message that has been carried out."""
        at = _place(key)
        if at > self.latest:
            self._begin(at)
        self.rows[key] = (digest, answer)
        self.kept.append(key)
        if len(self.kept) > KEPT:
            old = self.kept.popleft()
            self.rows[old] = (self.rows[old][0], None)

    def _begin(self, at: tuple[int, int, int]) -> None:
        """The client has seen every answer of the steps before, or it would not be here.

        But a forward may have come right behind the backwards of the step before, unanswered.
        """
        seen = {k for k in self.rows if k.phase != "backward" or _place(k) < self.latest}
        self.rows = {k: row for k, row in self.rows.items() if k not in seen}
        self.kept, self.latest = deque(k for k in self.kept if k not in seen), at

    def commit(self) -> None:
        """Drops all rows: both sides have everything up to here on disk."""
        self.rows, self.kept, self.committed = {}, deque(), self.latest


def _place(key: StepKey) -> tuple[int, int, int]:
    return key.round, key.wave, key.step
