"""Co-LoRA (Seo et al., 2025, arXiv 2506.11024): LoRA that models of other widths can exchange.

In a few blocks, the last of each group, a linear map wears
    s B (P A x + Q)
with A [r, in] and B [out, r] frozen, and P [r, r] and Q [r], which begin at 0, trained: their shape
says nothing of the model. All other blocks have ordinary LoRA. Each linear map also has a gate
    g(x) = sigmoid(mean over positions of w x),  w = 0 at the start
that weighs two such adapters, g one and 1 - g the other (``tensors.Stacked``); padding is no
position. In training w x has noise of that deviation, if any. A begins with rows at right angles of
length 1, B with columns of that kind; ``model/canon.py`` makes them agree between models.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from flexp.dice import Dice
from flexp.errors import AdapterError
from flexp.model.canon import polar

A, B, P, Q = (f".colora_{part}" for part in "ABPQ")
GATE = ".colora_gate"
EVERY = (A, B, P, Q, GATE)


@dataclass(frozen=True)
class CoLora:
    """Co-LoRA in the last block of each of ``groups`` groups, LoRA in all others, and gates.

    ``targets`` are names of linear maps, as those of LoRA.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    groups: int = 4
    head: bool = True


def blocks_of(depth: int, groups: int) -> list[int]:
    """The blocks with Co-LoRA: the k-th of one model is matched with the k-th of another.

    >>> blocks_of(28, 4)
    [6, 13, 20, 27]
    """
    if not 1 <= groups <= depth:
        raise AdapterError(
            f"adapter.groups: {groups} groups of blocks, but the model has {depth}. Set it to at "
            f"most {depth}."
        )
    return [k * (depth // groups) - 1 for k in range(1, groups)] + [depth - 1]


def refined(
    pairs: Mapping[str, tuple[int, ...]], kind: CoLora, stem: str, prefix: str
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the adapter, from those of its plain LoRA pairs and of the rest.

    ``stem`` is the path of the blocks, ``prefix`` what is in front of paths.
    """
    inside = re.compile(rf"{re.escape(prefix + stem)}\.(\d+)\.")
    depth = max(int(found[1]) for name in pairs if (found := inside.match(name))) + 1
    matched, out = set(blocks_of(depth, kind.groups)), dict[str, tuple[int, ...]]()
    for name, shape in pairs.items():
        path, mark, _ = name.partition(".lora_A.")
        if not mark:
            if ".lora_B." not in name:
                out[name] = shape
            continue
        wide = pairs[f"{path}.lora_B.weight"]
        out[path + GATE] = shape[1:]
        found = inside.match(name)
        if found is None or int(found[1]) not in matched:
            out |= {name: shape, f"{path}.lora_B.weight": wide}
            continue
        if len(wide) != 2 or shape[0] > min(shape[1], wide[0]):
            raise AdapterError(
                f"adapter.rank: {shape[0]} directions at right angles do not fit into the linear "
                f"map {path.removeprefix(prefix)}. Set a lower rank, or other adapter.targets."
            )
        r = shape[0]
        out |= {path + A: shape, path + B: wide, path + P: (r, r), path + Q: (r,)}
    return out


def begun(name: str, shape: tuple[int, ...], stream: torch.Generator) -> Tensor:
    """How a tensor begins: A and B at right angles, drawn as LoRA's A is; all others are 0."""
    if not name.endswith((A, B)):
        return torch.zeros(shape)
    inner = shape[1] if name.endswith(A) else shape[0]
    drawn = torch.empty(shape).uniform_(-1, 1, generator=stream) / inner**0.5
    return polar(drawn)


def delta(x: Tensor, a: Tensor, b: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """B (P A x + Q), without LoRA's scale."""
    return functional.linear(functional.linear(functional.linear(x, a), p, q), b)


def gate(
    x: Tensor, w: Tensor, mask: Tensor | None = None, noise: float = 0.0, dice: Dice | None = None
) -> Tensor:
    """g of each row of [rows, positions, width], as [rows, 1, 1]."""
    if x.dim() != 3 or (mask is not None and mask.shape != x.shape[:2]):
        raise AdapterError("A gate needs a model whose linear maps read rows of positions.")
    said = x.to(w.dtype) @ w
    if noise and dice is not None:
        said = said + noise * torch.randn(said.shape, generator=dice.generator()).to(said)
    if mask is None:
        middle = said.mean(1)
    else:
        here = (mask != 0).to(said.dtype)
        middle = (said * here).sum(1) / here.sum(1).clamp_min(1)
    return torch.sigmoid(middle)[:, None, None]


def nth(names: Iterable[str], block_of: Callable[[str], int]) -> dict[str, str]:
    """What to call tensors of Co-LoRA in all models: by the how-manieth block they are in.

    Two models have the same names where their blocks have the same linear maps.
    """
    held = [name for name in names if name.endswith((P, Q))]
    where = {n: block_of(n) for n in held}
    at = {block: k for k, block in enumerate(sorted({*where.values()}))}
    return {n: n.replace(f".{b}.", f".#{at[b]}.", 1) for n, b in where.items()}
