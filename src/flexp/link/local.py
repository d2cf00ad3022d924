"""The link within one process: calls a trunk that was handed in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from flexp.link.messages import Answer, Message


@dataclass(frozen=True)
class LocalLink:
    """Delivers to ``handle(client, message)``; the engine binds the server's side to it."""

    client: str
    handle: Callable[[str, Message], Answer]

    def send(self, message: Message) -> Answer:
        """Delivers one message and waits for its answer, whose tensors are the client's own."""
        answer = self.handle(self.client, message)
        return replace(answer, tensors={k: v.clone() for k, v in answer.tensors.items()})

    def close(self) -> None:
        """Nothing to give up."""
