"""The one door out of a client: what a method declares, what a profile allows, and nothing else."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from flexp.errors import CutError, EgressError
from flexp.model.cut import Labels
from flexp.selection import ALL, FAR, Place, Where

Profile = Literal["open", "u-shape"]

STAYS = "with train.cache it goes there once per row and may stay for the turn"


@dataclass(frozen=True)
class Leave:
    """One thing that leaves a client: a slot or loose tensor (glob), which part, when, and why."""

    what: str
    where: Where = ALL
    when: str = "every round"
    why: str = ""


@dataclass(frozen=True)
class Egress:
    """Checks every outgoing tensor; the structural ones come with the cut itself.

    ``moved`` are the names under which blocks leave that are far since the client sits elsewhere.
    """

    leaves: Sequence[Leave]
    labels: Labels
    profile: Profile
    place: Callable[[str], Place]
    moved: frozenset[str] = frozenset()

    def structural(self) -> tuple[Leave, ...]:
        """What the cut alone sends, whatever the method."""
        out = (
            Leave("hidden", when="every step", why=f"the server's blocks start from it; {STAYS}"),
            Leave("hidden", when="every token", why="in a chat the server's blocks go on from it"),
            Leave("mask", when="every step", why="which positions are padding"),
            Leave("grad", when="every step", why="the server's adapters learn from it"),
            Leave("coef/*", when="every step", why="weights of a mix, one number per block"),
        )
        if self.labels == "loss":
            why = "the loss is computed at the server"
            out += (Leave("labels", when="every step", why=why),)
        if self.moved:
            out += (Leave("slot/*", FAR, "after a change of seat", "a block moved to the server"),)
        return out

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises EgressError if any tensor is not declared."""
        for name in tensors:
            if not self._declared(name):
                raise EgressError(
                    f'"{name}" tried to leave the client, but neither the cut nor the method '
                    "declares it. Declare it in the strategy's `leaves`, with where and why."
                )

    def _declared(self, name: str) -> bool:
        kind, _, rest = name.partition("/")
        if name in self.moved:
            return True
        if kind == "slot":
            slot, _, tensor = rest.partition("/base_model.")
            slot, tensor = (slot, f"base_model.{tensor}") if tensor else rest.rsplit("/", 1)
            return any(
                fnmatch.fnmatchcase(slot, leave.what)
                and leave.where.holds(tensor, self.place(tensor))
                for leave in self.leaves
            )
        if kind == "tensor":
            return any(fnmatch.fnmatchcase(name, leave.what) for leave in self.leaves)
        return any(fnmatch.fnmatchcase(name, leave.what) for leave in self.structural())


def check_labels(labels: Labels, profile: Profile, *, text: bool) -> None:
    """Raises CutError if the profile forbids where labels and logits go.

    ``text``: labels are tokens of the text itself, so logits and labels tell it all.
    """
    if labels != "keep" and text and profile != "open":
        raise CutError(
            f'plan.labels "{labels}" would show the server the text itself: for a language model '
            'logits and labels are its tokens. Keep the labels, or set privacy.profile to "open".'
        )
