"""What a recipe says of single clients: where each sits later, when it is there, what it learns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Part(BaseModel):
    """Any part of a recipe: frozen, and without keys that nobody knows."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )


class ChangeRecipe(Part):
    """From a round on, a client sits on another device, which is planned anew, or at another cut.

    Rounds count from 0; round 0 is what the rest of the plan says.
    """

    round: Annotated[int, Field(ge=1)]
    client: str
    device: str | None = None
    cut: tuple[int, int] | None = None

    @model_validator(mode="after")
    def _something(self) -> ChangeRecipe:
        if self.device is None and self.cut is None:
            raise ValueError("a change needs a device, a cut, or both")
        return self


Round = Annotated[int, Field(ge=0)]


class ParticipationRecipe(Part):
    """When a client is there; rounds count from 0.

    It comes in round ``joins``, and round ``leaves`` is the first without it. In ``absent`` rounds
    it does nothing, in ``alone`` ones it trains its whole model on its device, without the server.
    """

    joins: Round = 0
    leaves: Round | None = None
    absent: tuple[Round, ...] = ()
    alone: tuple[Round, ...] = ()

    @model_validator(mode="after")
    def _sense(self) -> ParticipationRecipe:
        if self.leaves is not None and self.leaves <= self.joins:
            raise ValueError("leaves: a round after the one in which it joins")
        if odd := sorted(set(self.absent) & set(self.alone)):
            raise ValueError(f"absent and alone in round {odd[0]}: choose one")
        outside = [r for r in self.alone if not self._member(r)]
        if outside:
            raise ValueError(f"alone in round {outside[0]}, before it joins or after it leaves")
        return self

    def at(self, round: int) -> Literal["here", "absent", "alone"]:
        """What the client does in a round."""
        if not self._member(round) or round in self.absent:
            return "absent"
        return "alone" if round in self.alone else "here"

    def _member(self, round: int) -> bool:
        return self.joins <= round and (self.leaves is None or round < self.leaves)


class OwnTaskRecipe(Part):
    """A task of a client's own; what is not given is as in the recipe's ``task``."""

    kind: Literal["classification", "causal-lm", "images"] | None = None
    labels: tuple[str, ...] | None = None
    max_length: Annotated[int, Field(ge=2)] | None = None


class ObjectiveRecipe(Part):
    """What a client minimises: cross-entropy of its task, smoothed, focal, or weighted by class.

    ``gamma`` is focal's (Lin et al. 2017, arXiv 1708.02002, eq. 4). ``weights`` "balanced" counts
    a class by the inverse of its frequency in the client's training rows, add-one.
    """

    kind: Literal["cross-entropy", "focal"] = "cross-entropy"
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    gamma: Annotated[float, Field(ge=0)] = 2.0
    weights: Literal["equal", "balanced"] = "equal"

    @model_validator(mode="after")
    def _apart(self) -> ObjectiveRecipe:
        if self.kind == "focal" and self.smoothing:
            raise ValueError("smoothing goes with cross-entropy, not with focal")
        return self


class ClientRecipe(Part):
    """What one client does otherwise than the recipe: its task, columns, objective and backbone.

    Only the width at the cut must match, so with the head at the client (``plan.labels: keep``) a
    client may have labels or a kind of task of its own.
    """

    task: OwnTaskRecipe | None = None
    text: str | None = None
    image: str | None = None
    label: str | None = None
    prompt: str | None = None
    objective: ObjectiveRecipe | None = None
    model: str | None = None


def model_of(clients: Mapping[str, ClientRecipe], client: str, usual: str) -> str:
    """The name of a client's own backbone; empty if that is the ``usual`` one."""
    asked = clients.get(client)
    name = asked.model if asked is not None else None
    return "" if name is None or name == usual else name
