"""What the server has of a surgery on hidden states, and which client has had which of it.

The encoder is averaged and travels to those who have another; the decoder travels until it is
frozen, and once to those who were not there then. Clients' own codes are never here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from flexp.parcel import Parcel
from flexp.selection import ALL, NONE, Where
from flexp.strategies.base import ClientId
from flexp.tensors import Tensors, mean

ENCODER, DECODER = Where(names="surgery_*_encoder_*"), Where(names="surgery_*_decoder_*")
OWN = Where(names="surgery_*_own")


@dataclass(frozen=True)
class Operated:
    """All of a surgery but own codes. ``version`` counts its changes, ``settled`` those of Dec.

    ``held`` is the version that a client was offered last; without one it has how all begin.
    """

    shared: Tensors
    version: int = 0
    settled: int = 0
    held: Mapping[ClientId, int] = field(default_factory=dict[ClientId, int])

    @classmethod
    def begun(cls, adapter: Tensors) -> Operated:
        """From the adapter that everybody begins with."""
        return cls({k: v for k, v in adapter.items() if not k.endswith("_own")})

    def lacking(self, client: ClientId) -> Where:
        """What of it a client has not had."""
        held = self.held.get(client, 0)
        if held == self.version:
            return NONE
        return ENCODER if held >= self.settled else ALL

    def averaged(self, replies: Mapping[ClientId, Parcel]) -> Operated:
        """After a wave: the mean of what was replied, by rows as clients tell them.

        The server sees rows in backwards alone, and there are none.
        """
        there = replace(self, held={**self.held, **dict.fromkeys(replies, self.version)})
        given = [r for r in replies.values() if "surgery" in r.adapters]
        if not given:
            return there
        told = [r.facts.get("rows") for r in given]
        rows = [float(n) if isinstance(n, int) and n > 0 else 0.0 for n in told]
        rows = rows if any(rows) else [1.0] * len(rows)
        middle = mean([r.adapters["surgery"] for r in given], rows)
        return replace(there, shared={**self.shared, **middle}, version=self.version + 1)

    def anchored(self) -> Operated:
        """The encoder is the anchor that surgery is reckoned from, and Dec what it will be."""
        anchors = [k for k in self.shared if "_anchor_" in k]
        now = {k: self.shared[k.replace("_anchor_", "_encoder_")] for k in anchors}
        return replace(self, shared={**self.shared, **now}, settled=self.version)
