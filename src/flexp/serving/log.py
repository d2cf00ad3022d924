"""What an operator reads of clients, and what whoever calls cannot fill a disk with."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from flexp.audit import AuditLog, printable
from flexp.errors import AuditError
from flexp.events import Event, Noted, RoundStarted, RunEnded, Stream
from flexp.link.rate import Buckets, Rate
from flexp.stage import Say

LINES = Rate(60, 1)  # of one peer
LONGEST = 1000  # characters of one


def opened(out: Path, say: Say, *, began: bool) -> Log:
    """The log in a folder; if a run ``began`` there and has none, that is its first line."""
    path = out / "audit.jsonl"
    lost = began and not path.is_file()
    log = Log(say, AuditLog(path, time.time))
    if lost:
        log.alert("", f"{path} was not there, though this run has begun: a new one begins")
    return log


@dataclass
class Log:
    """Lines about peers: of each a few, then one a second; those left out are counted.

    Warnings are events of the run as well, while it goes on; as its sink the log knows when. Every
    line is a record of ``audit``, if there is one.
    """

    say: Say
    audit: AuditLog | None = None
    stream: Stream = field(default_factory=Stream)
    lines: Buckets = field(default_factory=lambda: Buckets(LINES))
    left: dict[str, int] = field(default_factory=dict[str, int])
    going: bool = False

    def __call__(self, event: Event) -> None:
        """Follows the run."""
        if isinstance(event, RoundStarted | RunEnded):
            self.going = isinstance(event, RoundStarted)

    def note(self, peer: str, text: str) -> None:
        """A line about a peer."""
        self._sparing("note", peer, text, self.say)

    def alert(self, peer: str, text: str) -> None:
        """A line about a peer that whoever runs the server should act on."""
        self._sparing("alert", peer, text, self._warned)

    def _warned(self, text: str) -> None:
        if not self.going:
            self.say(text)
            return
        try:
            self.stream.write(Noted("warning", text))
        except ValueError:  # the run has broken off, and its events are closed
            self.say(text)

    def _sparing(self, what: str, peer: str, text: str, say: Callable[[str], None]) -> None:
        if self.lines.ask(peer):
            if peer in self.left or len(self.left) < 1024:
                self.left[peer] = self.left.get(peer, 0) + 1
            return
        left = self.left.pop(peer, 0)
        line = printable(text, LONGEST)
        line = f"{line} ({left} lines before it were left out)" if left else line
        say(line)
        self._record(what, peer, line)

    def _record(self, what: str, peer: str, line: str) -> None:
        try:
            if self.audit is not None:
                self.audit.append(what, who=peer, text=line)
        except AuditError as problem:  # the run goes on, and whoever runs it reads why
            self.audit = None
            self.say(f"nothing more is recorded: {problem}")
