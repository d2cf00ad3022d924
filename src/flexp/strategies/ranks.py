"""Adapters of clients with other LoRA ranks: what is worn is alpha / rank times B A.

So whoever changes a rank scales a factor, and then what is worn stays what it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flexp.model.adapter import Lora
from flexp.products import lora_pairs, truncate, worn_sum
from flexp.selection import Where
from flexp.strategies.base import ClientId, Setting, Turn
from flexp.tensors import Tensors, mean_by_name, norm

LORA = Where(names="*.lora_?.*")


@dataclass(frozen=True)
class Ranked:
    """What is merged so far, and the rank of clients whose seats name none.

    ``ranks`` are of clients that have another one than their seat.
    """

    rank: int
    adapter: Tensors
    ranks: Mapping[ClientId, int] = field(default_factory=dict[ClientId, int])

    def of(self, client: ClientId, turn: Turn) -> int:
        """A client's rank."""
        return self.ranks.get(client) or turn.seats[client].rank or self.rank

    def widest(self, turn: Turn, trained: Iterable[Mapping[str, Tensor]]) -> int:
        """The largest rank of all clients that are known."""
        seats = [seat.rank or self.rank for seat in turn.seats.values()]
        return max(*seats, *map(rank_of, trained))


def rank_of(adapter: Mapping[str, Tensor]) -> int:
    """The rank of an adapter's pairs; 0 if there are none."""
    return max((len(adapter[a]) for a, _ in lora_pairs(adapter).values()), default=0)


def no_product(setting: Setting) -> str:
    """The refusal of methods that add up products."""
    if isinstance(setting.adapter, Lora) and setting.adapter.dora:
        return "it adds up products of A and B, and magnitudes have none. Set adapter.dora=false."
    return ""


def stacked(adapters: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> Tensors:
    """The adapter that wears the weighted mean of what several wear: pairs stacked, ranks add up.

    A pair is of those who have it; what is no pair is averaged. One alone stays as it is.
    """
    pairs = lora_pairs(name for one in adapters for name in one)
    factors = {name for pair in pairs.values() for name in pair}
    rest = [{k: v for k, v in one.items() if k not in factors} for one in adapters]
    out = mean_by_name(rest, weights)
    for a, b in pairs.values():
        held = [(one[a], one[b], w) for one, w in zip(adapters, weights, strict=True) if a in one]
        total = sum(w for *_, w in held)
        if total:
            out[a], out[b] = worn_sum([(x, y, w / total) for x, y, w in held])
    return dict(sorted(out.items()))


def truncated(adapter: Mapping[str, Tensor], rank: int) -> Tensors:
    """The adapter of that rank which wears most of what this one does."""
    out = dict(adapter)
    for a, b in lora_pairs(adapter).values():
        out[a], out[b] = truncate(adapter[a], adapter[b] * (rank / len(adapter[a])), rank)
    return out


def padded(adapter: Mapping[str, Tensor], rank: int) -> Tensors:
    """The same wear with that rank: zeros fill A's rows and B's columns."""
    out = dict(adapter)
    for a, b in lora_pairs(adapter).values():
        more = rank - len(adapter[a])
        wide = adapter[b] * (rank / len(adapter[a]))
        out[a] = torch.cat([adapter[a], adapter[a].new_zeros(more, adapter[a].shape[1])])
        out[b] = torch.cat([wide, wide.new_zeros(len(wide), more)], dim=1)
    return out


def first(
    adapter: Mapping[str, Tensor], ranks: int | Mapping[str, int], *, balanced: bool = False
) -> Tensors:
    """The first rows of A and columns of B; ``balanced`` scales both factors, else B alone.

    ``ranks`` is one for all, or that of each matrix by its path.
    """
    out = dict(adapter)
    for path, (a, b) in lora_pairs(adapter).items():
        rank = ranks if isinstance(ranks, int) else ranks[path]
        by = rank / len(adapter[a])
        half = by**0.5 if balanced else 1.0
        out[a], out[b] = adapter[a][:rank] * half, adapter[b][:, :rank] * (by / half)
    return out


def after(adapter: Mapping[str, Tensor], rank: int) -> Tensors:
    """1 in the rows of pairs after the first ``rank``, and 0 in those."""
    out: Tensors = {}
    for a, b in lora_pairs(adapter).values():
        late = (torch.arange(len(adapter[a])) >= rank).to(adapter[a])
        out[a], out[b] = (
            late[:, None].repeat(1, adapter[a].shape[1]),
            late.repeat(len(adapter[b]), 1),
        )
    return out


def norm_after(adapter: Mapping[str, Tensor], rank: int) -> float:
    """How large the rows after the first ``rank`` are: |B| |A| of them, summed over matrices."""
    held = [(adapter[a][rank:], adapter[b][:, rank:]) for a, b in lora_pairs(adapter).values()]
    return sum(norm({"": a}) * norm({"": b}) for a, b in held)


def allotted(
    worth: Mapping[str, float], sizes: Mapping[str, int], rank: int, most: int
) -> dict[str, int]:
    """Ranks of matrices by what they are worth, which together take no more than ``rank`` for each.

    Row after row goes to who has the most worth for each row with it (D'Hondt); all have 1 to
    ``most``. ``sizes`` are the numbers that a row takes.
    """
    out = dict.fromkeys(sizes, 1)
    left = (rank - 1) * sum(sizes.values())
    while fit := [p for p, size in sizes.items() if size <= left and out[p] < most]:
        best = max(fit, key=lambda p: worth.get(p, 0.0) / (out[p] + 1))
        out[best], left = out[best] + 1, left - sizes[best]
    return out
