"""SplitFed v1 (Thapa et al., 2022, arXiv 2004.12088): split clients, all in parallel, all averaged.

Round: every client trains its front with a server copy of its own;  at the end fronts and server
copies are averaged, rows as weights. So it is FedAvg of the whole net, bit for bit, at any cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flexp.strategies.base import MethodKind
from flexp.strategies.fedavg import FedAvg


@dataclass(frozen=True)
class SplitFedV1(FedAvg):
    """A server copy per client; fronts and server copies are averaged after each round."""

    name: ClassVar[str] = "splitfed_v1"
    paper: ClassVar[str] = "Thapa et al. 2022, arXiv 2004.12088"
    kind: ClassVar[MethodKind] = "split"
