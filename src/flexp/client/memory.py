"""A client's private store: what it keeps between turns, on its own disk only."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path

from torch import Tensor

from flexp.parcel import JSON, Parcel, load, save
from flexp.tensors import Tensors


class Memory:
    """Named adapters and facts of one client; changes count only once the turn is over.

    >>> memory = Memory()
    >>> memory.facts["rounds"] = 3
    >>> memory.commit(); memory.facts["rounds"] = 4; memory.rollback(); memory.facts["rounds"]
    3
    """

    def __init__(self, parcel: Parcel | None = None) -> None:
        parcel = parcel or Parcel()
        self.slots: dict[str, Tensors] = {s: dict(v) for s, v in parcel.adapters.items()}
        self.facts: dict[str, JSON] = dict(parcel.facts)
        self._before = (dict(self.slots), deepcopy(self.facts))

    def get(self, slot: str) -> Tensors | None:
        """The tensors kept under that name, or None."""
        return self.slots.get(slot)

    def put(self, slot: str, tensors: Mapping[str, Tensor]) -> None:
        """Keeps tensors under a name."""
        self.slots[slot] = dict(tensors)

    def settle(self) -> None:
        """Called before the server hears that the turn is over: here nothing is to be done."""

    def commit(self) -> None:
        """Makes the changes of this turn count."""
        self._before = (dict(self.slots), deepcopy(self.facts))

    def rollback(self) -> None:
        """Takes back the changes of a turn that failed."""
        self.slots, self.facts = dict(self._before[0]), deepcopy(self._before[1])

    def save(self, path: Path) -> None:
        """Writes what has been committed."""
        save(path, Parcel(self._before[0], facts=self._before[1]))

    @classmethod
    def load(cls, path: Path) -> Memory:
        """The memory in that file; raises ParcelError."""
        return cls(load(path))
