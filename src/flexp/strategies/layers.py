"""Which layers clients have in common: those of one shape at one place in the model.

All clients have one model, so a place is a name. Pairs of LoRA are of one shape where ranks are
equal; they are filed by rank beside each other.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from flexp.model.ops import SlotSpec
from flexp.selection import ALL, NONE, Where
from flexp.strategies.base import ClientId, Scene, Turn
from flexp.strategies.ranks import Ranked, rank_of
from flexp.tensors import Tensors

PAIRS = Where(names="*.lora_*")


def filed(adapter: Mapping[str, Tensor], rank: int) -> Tensors:
    """An adapter by names that tell the rank where it counts."""
    return {f"{k}@{rank}" if ".lora_" in k else k: v for k, v in adapter.items()}


def taken(held: Mapping[str, Tensor], rank: int) -> Tensors:
    """What of several filed adapters is of that rank, or of any."""
    mine = {k.partition("@")[0]: v for k, v in held.items() if k.endswith(f"@{rank}")}
    return dict(sorted({**{k: v for k, v in held.items() if "@" not in k}, **mine}.items()))


def begun(scene: Scene, spec: SlotSpec) -> Ranked:
    """Where clients of each rank begin."""
    rank, out = rank_of(scene.initial(spec)), Tensors()
    for each in sorted({seat.rank or rank for seat in scene.seats.values()}):
        out |= filed(scene.initial(spec, each or None), each)
    return Ranked(rank, out)


def private(state: Ranked, client: ClientId, turn: Turn, *, hosted: bool) -> Where:
    """The layers that no other client has; ``hosted``: and those that nobody has at the server."""
    rank = state.of(client, turn)
    alike = [seat for c, seat in turn.seats.items() if state.of(c, turn) == rank]
    if len(turn.seats) < 2:
        return ALL
    out = PAIRS if len(alike) < 2 else NONE
    if not hosted:
        return out
    far = {
        at
        for at in range(-1, turn.depth + 1)
        if any(seat.place(at, turn.depth).side == "far" for seat in alike)
    }
    near = (Where(names=k) for k in taken(state.adapter, rank) if turn.block_of(k) not in far)
    return Where(join="or", of=(out, *near))
