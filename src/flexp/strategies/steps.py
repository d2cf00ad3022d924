"""An optimizer's step at the server, of what no slot holds."""

from __future__ import annotations

from collections.abc import Mapping

from flexp.model.ops import Optim, Step
from flexp.model.slots import Slots, moments
from flexp.selection import Place
from flexp.tensors import Tensors


def stepped(
    values: Tensors, slopes: Tensors, memory: Mapping[str, Tensors], optim: Optim
) -> tuple[Tensors, dict[str, Tensors]]:
    """Values a step against their slopes, and what the optimizer remembers from now on.

    Computed in double precision, and given in single, as parcels have it.
    """
    first, second, count = moments("psi")
    slots = Slots(lambda name: Place("far", "head", 0, 0), 0, optims={"psi": optim})
    slots.values |= {k: double(memory[k]) for k in (first, second) if k in memory}
    slots.values |= {count: dict(memory[count])} if count in memory else {}
    slots.put("psi", double(values))
    slots.put("psi@g", double(slopes))
    slots.do([Step("psi", "psi@g")])
    kept = (k for k in (first, second, count) if k in slots.values)
    return single(slots["psi"]), {k: single(slots.values[k]) for k in kept}


def double(tensors: Tensors) -> Tensors:
    """The same in double precision."""
    return {k: v.double() for k, v in tensors.items()}


def single(tensors: Tensors) -> Tensors:
    """The same in single precision."""
    return {k: v.float() for k, v in tensors.items()}
