"""SplitLoRA (Lin et al., 2024, arXiv 2407.00952): SplitFed with LoRA on both sides.

One server adapter is trained on the stream of all clients; client adapters are averaged after every
I rounds and sent back, and stay with their clients in between. I = 1 is SplitFed v2 with LoRA.
Reconstruction: the stream goes from client to client by turns, not by single batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from flexp.model.ops import SlotSpec
from flexp.parcel import Parcel
from flexp.strategies.base import ClientId, Setting, Turn
from flexp.strategies.splitfed_v2 import Fronts, SplitFedV2


@dataclass(frozen=True)
class SplitLora(SplitFedV2):
    """One server LoRA on the stream of all clients; client LoRAs are averaged now and then.

    ``every`` is I, in rounds; the paper averages after 100 steps.
    """

    every: int = 1

    name: ClassVar[str] = "splitlora"
    paper: ClassVar[str] = "Lin et al. 2024, arXiv 2407.00952"
    reconstruction: ClassVar[str] = "the stream goes by turns, not by batches"
    slots: ClassVar[Mapping[str, SlotSpec]] = {
        "personal": SlotSpec(home="server", lasts="run", moments="keep")
    }

    def refuses(self, setting: Setting) -> str:
        if self.every < 1:
            return f"every is {self.every}: client adapters are averaged after 1 or more rounds."
        return self.without_lora(setting) or super().refuses(setting)

    def due(self, round: int) -> bool:
        return (round + 1) % self.every == 0

    def offer(self, state: Fronts, client: ClientId, turn: Turn) -> Parcel:
        behind = state.had.get(client, 0) < state.count
        return super().offer(state, client, turn) if behind else Parcel()
