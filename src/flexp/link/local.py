"""The link within one process: calls a trunk that was handed in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flexp.link.messages import Answer, Message


@dataclass(frozen=True)
class LocalLink:
    """Delivers to ``handle(client, message)``; the engine binds the server's side to it."""

    client: str
    handle: Callable[[str, Message], Answer]

    def send(self, message: Message) -> Answer:
        """Delivers one message and waits for its answer."""
        return self.handle(self.client, message)

    def close(self) -> None:
        """Nothing to give up."""
