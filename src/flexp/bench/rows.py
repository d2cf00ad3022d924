"""What a benchmark says: a number beside its target and its limit, and whether it is right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from flexp.bench.machine import Machine


@dataclass(frozen=True)
class Gate:
    """Whether what was measured computes what it should: a number and the most it may be."""

    what: str
    value: float
    most: float

    @property
    def holds(self) -> bool:
        """NaN never does."""
        return self.value <= self.most

    @property
    def plain(self) -> dict[str, Any]:
        """As plain data."""
        return {"what": self.what, "value": self.value, "most": self.most, "holds": self.holds}


@dataclass(frozen=True)
class Row:
    """One number. ``floor`` is what the limits of the machine allow, None if that is not known."""

    name: str
    value: float | None
    unit: str
    what: str
    target: float | None = None
    floor: float | None = None
    better: Literal["higher", "lower"] = "higher"
    gate: Gate | None = None
    details: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def reached(self) -> bool | None:
        """Whether the target is reached by a computation that is right; None without a target."""
        if self.target is None:
            return None
        if self.value is None or (self.gate is not None and not self.gate.holds):
            return False
        if self.better == "higher":
            return self.value >= self.target
        return self.value <= self.target

    def plain(self, machine: Machine) -> dict[str, Any]:
        """As plain data; ``ok`` is None on a machine of another kind than the targets'."""
        details = dict(self.details)
        if self.gate is not None:
            details["gate"] = self.gate.plain
        return {
            "name": self.name,
            "value": self.value if self.value is None else round(self.value, 4),
            "target": self.target,
            "floor": self.floor,
            "ok": self.reached if machine.alike else None,
            "machine": machine.plain,
            "unit": self.unit,
            "better": self.better,
            "what": self.what,
            "details": details,
        }
