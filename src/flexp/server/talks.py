"""Conversations at the server: for each client the far keys and values of one growing text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flexp.errors import LinkError
from flexp.link.messages import Continue
from flexp.model.backbone import Backbone
from flexp.model.cached import Cached
from flexp.model.dress import Leaves, dress
from flexp.server.bodies import Others, body_at
from flexp.server.tenancy import Tenancy
from flexp.tensors import PerRow, Wear, terms

MAX_POSITIONS = 4096  # of one conversation


@dataclass(frozen=True)
class Talk:
    """One conversation: its number, what it wears from its beginning on, and its blocks."""

    number: int
    wear: Wear
    blocks: Cached


class Talks:
    """The one conversation of each client; a new one takes the place of the one before."""

    def __init__(self, backbone: Backbone, others: Others) -> None:
        self.backbone, self.others = backbone, others
        self.held: dict[str, Talk] = {}

    def proceed(self, home: Tenancy, m: Continue) -> Tensor:
        """The far part of a text's next positions. If it fails, nothing has changed.

        All hidden states come back if blocks at the client follow, the last one if only the head
        does; with labels "logits" the logits of the last position.
        """
        self._check(home, m)
        talk = self.held.get(home.client)
        if talk is None or talk.number != m.talk:
            talk = self._begun(home, m)
        self._fits(talk, m)
        out = talk.blocks.run(m.hidden)
        self.held[home.client] = talk
        return out if home.seat.cut.back or home.seat.labels != "keep" else out[:, -1:]

    def drop(self, client: str) -> None:
        """Forgets a client's conversation."""
        self.held.pop(client, None)

    def _begun(self, home: Tenancy, m: Continue) -> Talk:
        seat, body = home.seat, body_at(home.seat, self.backbone, self.others)
        with torch.no_grad():
            worn = dress(home.slots, m.wear, (), None, Leaves())
        last = body.depth - seat.cut.back if seat.labels == "keep" else None
        return Talk(m.talk, m.wear, Cached.open(body, seat.cut.front, last, worn, fed=True))

    def _fits(self, talk: Talk, m: Continue) -> None:
        """LinkError unless the message goes on where the conversation ends, wearing the same."""
        if m.before != talk.blocks.length:
            raise LinkError(
                f"A text was continued after {m.before} positions, but conversation {m.talk} has "
                f"{talk.blocks.length} here. Begin a new one."
            )
        if m.wear != talk.wear:
            raise LinkError("A conversation wears the same all along. Begin a new one.")
        if m.before + m.hidden.shape[1] > MAX_POSITIONS:
            raise LinkError(
                f"A conversation has at most {MAX_POSITIONS} positions at this server. Begin a "
                "new one with a shorter text."
            )

    def _check(self, home: Tenancy, m: Continue) -> None:
        if home.seat.labels == "loss":
            raise LinkError(
                'A seat with labels "loss" gets nothing but the loss, so it cannot continue a '
                'text. Set plan.labels to "keep" or "logits".'
            )
        width = body_at(home.seat, self.backbone, self.others).width
        shape = list(m.hidden.shape)
        if len(shape) != 3 or shape[0] != 1 or shape[1] < 1 or shape[2] != width:
            raise LinkError(f"A text's next positions are [1, length, {width}]; these are {shape}.")
        if any(isinstance(t.coef, Tensor) or math.isnan(t.coef) for t in terms(m.wear)):
            raise LinkError("A conversation wears numbers, not learned coefficients.")
        if isinstance(m.wear, PerRow) and len(m.wear.row) != 1:
            raise LinkError(f"{len(m.wear.row)} rows wear something, but a text is one row.")
