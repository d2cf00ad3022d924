"""A method that looks on at another one, and leaves what that one does as it is, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, TypeVar

from flexp.client.desk import Desk
from flexp.model.ops import SlotSpec
from flexp.parcel import Parcel
from flexp.privacy.egress import Leave
from flexp.selection import NONE, Where
from flexp.strategies.base import MethodKind, Served, Setting, Strategy
from flexp.tensors import Tensors

State = TypeVar("State")


@dataclass(frozen=True)
class Observer(Strategy[State]):
    """Observes ``of``, a method that averages: its name, or a mapping with name and options."""

    of: str | Mapping[str, Any] = "fedavg"

    kind: ClassVar[MethodKind] = "observer"
    slots: ClassVar[Mapping[str, SlotSpec]] = {"personal": SlotSpec()}

    def __post_init__(self) -> None:
        assert self.observed  # a wrong name is said at once

    @cached_property
    def observed(self) -> Strategy[Tensors]:
        """The method."""
        from flexp.strategies import build  # which knows observers

        told = {"name": self.of} if isinstance(self.of, str) else dict(self.of)
        return build(str(told.pop("name", "")), told, "strategy.of")

    def refuses(self, setting: Setting) -> str:
        if self.observed.averages() == NONE:
            return (
                f'it follows a mean over clients, which "{self.observed.name}" with these options '
                "is not. Set strategy.of to fedavg, splitfed_v1 or flexp."
            )
        return self.observed.refuses(setting)

    def specs(self) -> Mapping[str, SlotSpec]:
        return {**self.observed.specs(), **dict.fromkeys(self.beside(), SlotSpec())}

    def beside(self) -> tuple[str, ...]:
        """Its own slots."""
        return ()

    def leaving(self) -> tuple[Leave, ...]:
        return self.observed.leaving()

    def owns(self) -> Where:
        return self.observed.owns()

    def moving(self) -> Where:
        return self.observed.moving()

    def personal(self, desk: Desk, offer: Parcel) -> Served:
        return self.observed.personal(desk, offer)
