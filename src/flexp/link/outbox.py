"""Frames on their way to one peer: whoever puts one in never waits for who takes them out."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from flexp.link import frame


class Outbox:
    """The frames that one end of a stream has yet to send; any thread may put one in.

    ``held`` are the bytes that wait, with the piece that the stream has and has not sent yet.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.held = clock, 0
        self._frames: deque[bytes] = deque()
        self._closed = False
        self._moved = clock()
        self._changed = threading.Condition()

    def put(self, data: bytes) -> None:
        """Sends a frame after those that wait; nothing is sent once it is closed."""
        with self._changed:
            if self._closed:
                return
            if not self.held:
                self._moved = self.clock()
            self._frames.append(data)
            self.held += len(data)
            self._changed.notify_all()

    def close(self) -> None:
        """Ends the stream, after what was put in."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def pieces(self) -> Iterator[bytes]:
        """What goes out, until it is closed; asked for the next piece, one has gone."""
        while (data := self._next()) is not None:
            left = len(data)
            for piece in frame.chunks(data):
                yield piece
                part = min(left, len(piece))
                left -= part
                with self._changed:
                    self.held -= part
                    self._moved = self.clock()
                    self._changed.notify_all()

    def wait(self, room: int) -> bool:
        """Waits until no more than so many bytes wait; False if it was closed before."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self.held <= room)
            return not self._closed

    def pause(self, seconds: float) -> bool:
        """Waits for so long; False if it was closed meanwhile."""
        with self._changed:
            return not self._changed.wait_for(lambda: self._closed, seconds)

    def stuck(self) -> float:
        """For how many seconds nothing has gone of what waits; 0 if nothing waits."""
        with self._changed:
            return self.clock() - self._moved if self.held else 0.0

    def _next(self) -> bytes | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._frames)
            return self._frames.popleft() if self._frames else None
