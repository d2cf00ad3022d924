"""PHSFL (Pervej and Molisch, 2024, arXiv 2411.06042): features by hierarchy, heads by oneself.

Edge round: each client trains its front with a copy of the server's part, under a head that is
random, everybody's and frozen; an edge server averages over its clients, with n_u / n_edge. After
kappa_1 edge rounds the central server averages over edges, with n_edge / n. At the end every client
fine-tunes the head alone; with train.cache its features cross once per row and turn. A round of
ours is an edge round, kappa_0 its steps; the last one before the end goes up to the centre whatever
kappa_1. FedBABU is its flat relative. With the head trained it is hierarchical split learning, and
for one edge with kappa_1 = 1 SplitFed v1.

Reconstruction: the one server is all edge servers and the centre, so what they would send to each
other is no traffic here; clients are dealt to edges in turn; a random head's rows begin with length
1. For a language model, whose head nobody trains, the head is the last ``blocks`` blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from flexp.model.ops import HeadForm, SlotSpec
from flexp.privacy.egress import Leave
from flexp.selection import ALL, HEAD, NONE, Where
from flexp.strategies.base import MethodKind, Setting, Turn
from flexp.strategies.fedper import no_head
from flexp.strategies.shared_until import SharedUntil


@dataclass(frozen=True)
class Phsfl(SharedUntil):
    """Bodies averaged at edges and then centrally, under a frozen head that clients tune last.

    ``edges`` servers average each round, the centre after ``edge_rounds`` (kappa_1). ``head``
    "trained" is the method without personal heads. A frozen one is as "drawn", or its rows are
    "orthogonal" or as far apart as can be ("etf"), of length ``head_rows`` (None: as the backbone
    has it). The last ``blocks`` blocks belong to the head. ``tune_rounds`` of the run's end are for
    heads, with ``tune_steps`` in each (None: the recipe's).
    """

    edges: PositiveInt = 2
    edge_rounds: PositiveInt = 2
    head: Literal["frozen", "trained"] = "frozen"
    head_form: HeadForm = "drawn"
    head_rows: PositiveFloat | None = 1.0
    blocks: NonNegativeInt = 0
    tune_rounds: NonNegativeInt = 1
    tune_steps: PositiveInt | None = None

    name: ClassVar[str] = "phsfl"
    paper: ClassVar[str] = "Pervej and Molisch 2024, arXiv 2411.06042"
    kind: ClassVar[MethodKind] = "split"
    own: ClassVar[Where] = HEAD
    reconstruction: ClassVar[str] = "one server is all edges and the centre; clients dealt in turn"
    leaves: ClassVar[tuple[Leave, ...]] = (
        Leave("personal", ~HEAD, why="averaged at the edge, then centrally"),
        Leave("personal", HEAD, when="every round, with head trained", why="averaged as well"),
    )

    def refuses(self, setting: Setting) -> str:
        heads = self.unequal_heads(setting) if self.head == "trained" else ""
        return no_head(self.blocks, setting) or heads or self.unequal_ranks(setting)

    def specs(self) -> Mapping[str, SlotSpec]:
        spec = self.slots["personal"]
        return {"personal": replace(spec, head_rows=self.head_rows, head_form=self.head_form)}

    def owns(self) -> Where:
        return self.tuned()[0] if self.tune_rounds else NONE

    def moving(self) -> Where:
        return ALL if self.head == "trained" else ~Where(last=self.blocks)

    def settled(self, turn: Turn) -> bool:
        return turn.round >= turn.rounds - self.tune_rounds

    def tuned(self) -> tuple[Where, int | None]:
        return Where(last=self.blocks), self.tune_steps

    def hierarchy(self) -> tuple[int, int]:
        return self.edges, self.edge_rounds
