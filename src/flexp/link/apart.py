"""The link of a client that is alone: it opens and ends turns by itself, and nothing crosses."""

from __future__ import annotations

from dataclasses import dataclass

from flexp.errors import LinkError
from flexp.link.messages import Answer, Join, Leave, Message, Submit


@dataclass(frozen=True)
class NoLink:
    """Nothing is offered to the client and nothing taken from it; the rest is a LinkError."""

    client: str

    def send(self, message: Message) -> Answer:
        """The answer that a turn begins or ends with."""
        if isinstance(message, Join):
            return Answer(facts={"offered": {}, "facts": {}, "moved": None})
        if isinstance(message, Submit | Leave):
            return Answer()
        raise LinkError(f'Client "{self.client}" is alone: there is no server to reach.')

    def close(self) -> None:
        """Nothing to give up."""
