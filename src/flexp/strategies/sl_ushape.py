"""U-shaped split learning (Vepakomma et al., 2018, arXiv 1812.00564): a relay that keeps labels.

Clients train in turn, as in `sl`; the last blocks, the head and the loss are at the client, so the
labels never leave: hidden states go up and down and their gradients back, 4 S a step. The next
client receives front and tail. Everybody keeps an optimizer of its own for the run, so that one
client alone is training the whole model in one place, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from flexp.model.ops import SlotSpec
from flexp.strategies.base import Setting
from flexp.strategies.sl import Sl


@dataclass(frozen=True)
class SlUshape(Sl):
    """Clients in turn, each with front, tail and labels; the next one goes on with both ends."""

    name: ClassVar[str] = "sl_ushape"
    paper: ClassVar[str] = "Vepakomma et al. 2018, arXiv 1812.00564"
    reconstruction: ClassVar[str] = "optimizers stay with their clients, the server's part as well"
    slots: ClassVar[Mapping[str, SlotSpec]] = {"personal": SlotSpec(moments="keep")}

    def refuses(self, setting: Setting) -> str:
        if any(seat.labels != "keep" for seat in setting.seats.values()):
            return 'its tail, head and loss are at the client. Set plan.labels to "keep".'
        return super().refuses(setting)
