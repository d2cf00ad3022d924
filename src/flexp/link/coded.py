"""A link whose ends get what would arrive over a network: rounded as the wire rounds it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from flexp.link.messages import Answer, Backward, Forward, Link, Message
from flexp.link.wire import Wire, arrived, crossed


@dataclass(frozen=True)
class CodedLink:
    """Packs and unpacks hidden states, logits and gradients on their way through ``inner``."""

    inner: Link
    wire: Wire

    def send(self, message: Message) -> Answer:
        """Delivers the message as it would arrive; so is the answer. LinkError as of ``pack``."""
        if isinstance(message, Forward):
            message = replace(message, hidden=arrived("hidden", message.hidden, self.wire))
        elif isinstance(message, Backward):
            message = replace(message, grad=arrived("grad", message.grad, self.wire))
        answer = self.inner.send(message)
        return replace(answer, tensors=crossed(answer.tensors, self.wire))

    def close(self) -> None:
        """Closes the link inside."""
        self.inner.close()


def coded(link: Link, wire: Wire) -> Link:
    """The link under a wire; under fp32 the link itself."""
    return link if wire == "fp32" else CodedLink(link, wire)
