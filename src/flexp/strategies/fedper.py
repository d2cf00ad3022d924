"""FedPer (Arivazhagan et al., 2019, arXiv 1912.00818): a shared body, a personal head.

Round: (w_i, h_i) <- E local epochs from (w, h_i), both moving together;  w <- sum_i p_i w_i.
With adapters: those of the body are shared; the classifier, and the last K blocks if asked, stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flexp.privacy.egress import Leave
from flexp.selection import HEAD, Where
from flexp.strategies.base import Setting
from flexp.strategies.shared_part import SharedPart


@dataclass(frozen=True)
class FedPer(SharedPart):
    """FedAvg of the body; the head is personal and stays.

    ``blocks`` of the model's end are personal too: the paper's K layers beyond the classifier.
    """

    blocks: int = 0

    name: ClassVar[str] = "fedper"
    paper: ClassVar[str] = "Arivazhagan et al. 2019, arXiv 1912.00818"
    own: ClassVar[Where] = HEAD
    leaves: ClassVar[tuple[Leave, ...]] = (Leave("personal", ~HEAD, why="to be averaged"),)

    @property
    def body(self) -> Where:
        return ~Where(last=self.blocks)

    def refuses(self, setting: Setting) -> str:
        return no_head(self.blocks, setting) or self.unequal_ranks(setting)


def no_head(blocks: int, setting: Setting) -> str:
    """The refusal of methods whose head, with so many blocks, is nothing or everything."""
    if not 0 <= blocks < setting.depth:
        return f"blocks is {blocks}, but the model has {setting.depth}: choose fewer."
    if not (setting.head or blocks):
        return "the head is its personal part and nobody trains one here. Set strategy.blocks."
    return ""
