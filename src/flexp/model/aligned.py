"""Makes the frozen factors of Co-LoRA in one model agree with those in another, by public rows.

For the k-th block with Co-LoRA of both, map by map, on what enters it in the bare models:
    A <- the nearest with rows at right angles to  argmin |A x - A' x'|^2 + spread * crowding(A)
by Adam with a cosine rate, from where A begins; A' and x' are the pivot's, which stays as it is.
    B <- M B',  M the canonical map from B' A' x' to B A x with the B that was drawn
so with equal P and Q both models are moved alike, as far as they say the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from flexp.dice import Dice
from flexp.errors import AdapterError
from flexp.model import colora
from flexp.model.backbone import Backbone
from flexp.model.canon import canonical, crowding, polar
from flexp.model.colora import CoLora, nth
from flexp.model.worn import PREFIX
from flexp.tensors import Tensors

Batches = Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True)
class How:
    """Adam's ``steps`` and ``rate``, the weight of crowding, rows for B, and its gamma."""

    steps: int = 500
    rate: float = 5e-5
    spread: float = 0.5
    sample: int = 100
    gamma: float = 1e-4


@dataclass(frozen=True)
class Aligned:
    """A and B of a model, and how far A x was from the pivot's before and is now, in the mean."""

    factors: Tensors
    before: float
    after: float


def aligned(
    pivot: Backbone, other: Backbone, kind: CoLora, dice: Dice, *, batches: Batches, how: How
) -> Aligned:
    """The factors of ``other`` that agree with those that the pivot begins with.

    Both read the same ``batches``. AdapterError unless their matched blocks have the same maps.
    """
    paths, theirs = _maps(other, kind), _maps(pivot, kind)
    if paths.keys() != theirs.keys():
        raise AdapterError(
            f"{other.name} and {pivot.name} have other linear maps in their blocks, so nothing can "
            "be matched. Choose models of one family, or set adapter.targets."
        )
    own, base = (body.initial(kind, dice("initial")) for body in (other, pivot))
    x, y = (entering(it, [*at.values()], batches) for it, at in ((other, paths), (pivot, theirs)))
    out, before, after = dict[str, Tensor](), list[float](), list[float]()
    for k, path in sorted(paths.items()):
        here, there = PREFIX + path, PREFIX + theirs[k]
        mine, wanted = x[path], [v @ base[there + colora.A].T for v in y[theirs[k]]]
        drawn, b = own[here + colora.A], base[there + colora.B]
        a = fitted(drawn, mine, wanted, how, dice("align", map=k))
        few = slice(0, max(1, math.ceil(how.sample / len(batches[0]["input_ids"]))))
        old = torch.cat(mine[few]) @ a.T @ own[here + colora.B].T
        move = canonical(torch.cat(wanted[few]) @ b.T, old, how.gamma)
        out |= {here + colora.A: a, here + colora.B: move @ b}
        before.append(_apart(drawn, mine, wanted))
        after.append(_apart(a, mine, wanted))
    return Aligned(out, sum(before) / len(before), sum(after) / len(after))


def fitted(a: Tensor, x: Sequence[Tensor], y: Sequence[Tensor], how: How, dice: Dice) -> Tensor:
    """A with rows at right angles that takes x to y as well as it can; a batch for each step."""
    a = a.clone().requires_grad_()
    optim = torch.optim.Adam([a], lr=how.rate)
    for n in range(how.steps):
        optim.param_groups[0]["lr"] = how.rate * (1 + math.cos(math.pi * n / how.steps)) / 2
        at = dice("batch", n=n).choose(len(x), 1)[0]
        with torch.enable_grad():
            loss = functional.mse_loss(x[at] @ a.T, y[at]) + how.spread * crowding(a)
            (a.grad,) = torch.autograd.grad(loss, [a])
        optim.step()  # pyright: ignore[reportUnknownMemberType]
    return polar(a.detach())


def _apart(a: Tensor, x: Sequence[Tensor], y: Sequence[Tensor]) -> float:
    return float(functional.mse_loss(torch.cat(list(x)) @ a.T, torch.cat(list(y))))


def _maps(body: Backbone, kind: CoLora) -> dict[str, str]:
    """Paths of the maps with Co-LoRA, by the names that all models have for them."""
    named = nth(body.layout(kind), body.block_of)
    return {
        k: name.removeprefix(PREFIX).removesuffix(colora.P)
        for name, k in named.items()
        if name.endswith(colora.P)
    }


def entering(body: Backbone, paths: Sequence[str], batches: Batches) -> dict[str, list[Tensor]]:
    """What enters these maps at real positions, [positions, width], a tensor per batch."""
    out = {path: list[Tensor]() for path in paths}

    def look(path: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        out[path].append(args[0].detach().float())

    hooks = [
        body.model.get_submodule(path).register_forward_pre_hook(partial(look, path))
        for path in paths
    ]
    with torch.no_grad():
        for inputs in batches:
            body.run(inputs)
            here = inputs["attention_mask"] != 0
            for held in out.values():
                held[-1] = held[-1][here]
    for hook in hooks:
        hook.remove()
    return out
