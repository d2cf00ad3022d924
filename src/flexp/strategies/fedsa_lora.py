"""FedSA-LoRA (Guo et al., 2025, arXiv 2410.01463): A is shared, B stays with its client.

Round: (A_i, B_i) <- E local epochs from (A, B_i), both moving;  A <- sum_i p_i A_i.
A is said to learn what is general and B what is a client's own. The head is personal, like B.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from flexp.model.ops import SlotSpec
from flexp.privacy.egress import Leave
from flexp.selection import ALL, Where
from flexp.strategies.ffa_lora import A, FfaLora


@dataclass(frozen=True)
class FedSaLora(FfaLora):
    """FedAvg of LoRA's A alone; B and the head are trained as well, and are personal."""

    name: ClassVar[str] = "fedsa_lora"
    paper: ClassVar[str] = "Guo et al. 2025, arXiv 2410.01463"
    own: ClassVar[Where] = ~A
    shared: ClassVar[Where] = A
    slots: ClassVar[Mapping[str, SlotSpec]] = {"personal": SlotSpec(lasts="run")}
    leaves: ClassVar[tuple[Leave, ...]] = (Leave("personal", shared, why="to be averaged"),)

    def moving(self) -> Where:
        return ALL
