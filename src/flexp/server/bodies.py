"""Which of the server's frozen models a client's blocks are of."""

from __future__ import annotations

from collections.abc import Mapping

from flexp.errors import LinkError
from flexp.model.backbone import Backbone
from flexp.model.cut import Seat

Others = Mapping[str, Backbone]  # by the name that seats have


def body_at(seat: Seat, usual: Backbone, others: Others) -> Backbone:
    """The run's model, or the one that a seat names; LinkError if it is not here."""
    if not seat.model:
        return usual
    if seat.model not in others:
        raise LinkError(f'There is no model "{seat.model:.80}" at this server.')
    return others[seat.model]
