"""What the owner of a device sees before it takes part: what runs there, and what leaves it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flexp.link.control import Proposal, Welcome
from flexp.model.cut import Labels
from flexp.privacy.egress import Egress, Leave
from flexp.recipe import Recipe
from flexp.selection import ALL, Place
from flexp.strategies.base import Strategy

# What a client tells of itself; the rest comes with the cut and the method.
ITSELF = (
    Leave("device", when="when it joins", why="memory, speed and link: they decide the cut"),
    Leave("rows and labels", when="when it joins", why="how many rows, and the names of labels"),
    Leave("versions", when="when it joins", why="of this program and torch: all must be alike"),
    Leave("errors", when="when it fails", why="their kind, never their text"),
    Leave("facts", when="every round", why="mean loss, steps and rows, for the log and for means"),
    Leave("scores", when="when scored", why="metrics of its own model on its own test rows"),
)


@dataclass(frozen=True)
class Terms:
    """All that is agreed to."""

    client: str
    address: str
    recipe: Recipe
    strategy: Strategy[Any]
    welcome: Welcome
    proposal: Proposal
    memory: int

    def document(self) -> dict[str, Any]:
        """These terms as plain data, for people and for --json."""
        cut = self.proposal.seat.cut
        return {
            "client": self.client,
            "server": self.address,
            "run": self.recipe.name,
            "method": self.strategy.name,
            "model": self.recipe.model.source,
            "model_digest": self.welcome.model,
            "quantize": self.recipe.model.quantize,
            "rounds": self.recipe.rounds,
            "front": cut.front,
            "back": cut.back,
            "bytes": dict(self.proposal.parts),
            "memory": self.memory,
            "reason": self.proposal.reason,
            "final": self.proposal.final,
            "labels": self.proposal.seat.labels,
            "leaves": [row_of(leave) for leave in leaving(self.strategy, self.recipe.plan.labels)],
            "hash": self.welcome.hash,
        }


def leaving(strategy: Strategy[Any], labels: Labels) -> tuple[Leave, ...]:
    """Everything that leaves a client, by this program's own knowledge of the method."""
    own = strategy.leaving()
    door = Egress(own, labels, "u-shape", lambda name: Place("near", "front", 0, 1))
    return (*door.structural(), *own, *ITSELF)


def row_of(leave: Leave) -> Mapping[str, str]:
    """A row of the list."""
    part = "" if leave.where == ALL else leave.where.words()
    return {"what": leave.what, "part": part, "when": leave.when, "why": leave.why}
