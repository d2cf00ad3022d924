"""Selections of adapter tensors by where they sit: no block number, no client's cut."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

Side = Literal["near", "far"]
Part = Literal["front", "trunk", "tail", "head"]


@dataclass(frozen=True)
class Place:
    """Where one adapter tensor sits: ``block`` is -1 before the blocks, ``depth`` after them.

    ``hops`` counts the blocks between it and its cut; those of a trunk count to its end.
    """

    side: Side
    part: Part
    block: int
    depth: int
    hops: int = 0


@dataclass(frozen=True)
class Where:
    """A selection of adapter tensors that names no block numbers; supports ``&``, ``|`` and ``~``.

    ``last`` takes the last n blocks of the model and what comes after them, ``nearest`` the n
    blocks next to each cut (of a trunk its last n), ``names`` is a glob.
    """

    side: Side | None = None
    part: Part | None = None
    last: int | None = None
    nearest: int | None = None
    names: str = "*"
    join: Literal["", "and", "or", "not"] = ""
    of: tuple[Where, ...] = ()

    def __and__(self, other: Where) -> Where:
        return Where(join="and", of=(self, other))

    def __or__(self, other: Where) -> Where:
        return Where(join="or", of=(self, other))

    def __invert__(self) -> Where:
        return Where(join="not", of=(self,))

    def holds(self, name: str, place: Place) -> bool:
        """Whether the tensor of that name and place is selected."""
        if self.join == "and":
            return all(w.holds(name, place) for w in self.of)
        if self.join == "or":
            return any(w.holds(name, place) for w in self.of)
        if self.join == "not":
            return not self.of[0].holds(name, place)
        return (
            self.side in (None, place.side)
            and self.part in (None, place.part)
            and (self.last is None or place.block >= place.depth - self.last)
            and (self.nearest is None or place.hops < self.nearest)
            and (self.names == "*" or fnmatch.fnmatchcase(name, self.names))
        )

    def words(self) -> str:
        """This selection for people, as "all but the head"."""
        if self.join == "not":
            inner = self.of[0].words()
            return "nothing" if inner == "everything" else f"all but {inner}"
        if self.join == "and":
            kept = ", only ".join(w.words() for w in self.of if w.join != "not")
            less = (f", but not {w.of[0].words()}" for w in self.of if w.join == "not")
            return (kept or "everything") + "".join(less)
        if self.join:
            return " and ".join(w.words() for w in self.of)
        told = [f"the {self.side} part"] if self.side else []
        told += [f"the {self.part}"] if self.part else []
        told += [f"the last {self.last} blocks and the head"] if self.last is not None else []
        told += [f"{self.nearest} blocks from the cut"] if self.nearest is not None else []
        told += [f"what is called {self.names}"] if self.names != "*" else []
        return ", only ".join(told) or "everything"

    def to_json(self) -> dict[str, Any]:
        """This selection as plain data, without what is left at its default."""
        plain: dict[str, Any] = {
            k: v
            for k, v in (
                ("side", self.side),
                ("part", self.part),
                ("last", self.last),
                ("nearest", self.nearest),
            )
            if v is not None
        }
        if self.names != "*":
            plain["names"] = self.names
        if self.join:
            plain |= {"join": self.join, "of": [w.to_json() for w in self.of]}
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Where:
        """The selection that ``to_json`` wrote."""
        rest = {k: v for k, v in plain.items() if k != "of"}
        return cls(**rest, of=tuple(cls.from_json(w) for w in plain.get("of", ())))


ALL = Where()
NEAR = Where(side="near")
FAR = Where(side="far")
HEAD = Where(part="head")
FRONT = Where(part="front")
TRUNK = Where(part="trunk")
NONE = ~ALL


def select(
    a: Mapping[str, Tensor], where: Where, place: Callable[[str], Place]
) -> dict[str, Tensor]:
    """The tensors that a selection takes."""
    return {k: v for k, v in a.items() if where.holds(k, place(k))}
