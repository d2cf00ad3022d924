"""A prompt for each client from base prompts, a descriptor per client, and attention (pFedPG).

It is computed in double precision, so that a step of rate 1 from base prompts to the mean of what
clients trained is that mean.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flexp.dice import Dice
from flexp.model.ops import Optim
from flexp.model.prompts import NAMES
from flexp.strategies.base import ClientId
from flexp.strategies.generator import code_of, drawn, send_back
from flexp.strategies.steps import stepped
from flexp.tensors import Tensors

BASE, QUERY, KEY, VALUE, OUT = "base", "query", "key", "value", "out"


@dataclass(frozen=True)
class Generator:
    """Base prompts and attention, the clients' descriptors, and what the optimizer remembers.

    ``name`` is the prompt's; ``late`` are turns of clients that were not there from the start.
    """

    name: str
    psi: Tensors
    clients: Mapping[ClientId, Tensor]
    late: Mapping[ClientId, int] = field(default_factory=dict[ClientId, int])
    memory: Mapping[str, Tensors] = field(default_factory=dict[str, Tensors])

    def made(self, client: ClientId) -> Tensor:
        """P_i, as it is sent."""
        psi = {k: v.double() for k, v in self.psi.items()}
        return prompt_of(psi, code_of(self.clients, client).double()).float()

    def stepped(
        self,
        changes: Mapping[ClientId, Tensor],
        shares: Mapping[ClientId, float],
        optim: Optim,
        *,
        settle: int = 0,
    ) -> Generator:
        """One step against what was made less what was trained, of several clients at once.

        In their first ``settle`` turns those who are late move their descriptor alone.
        """
        new = {c: self.late.get(c, 0) for c in changes if c in self.late or c not in self.clients}
        fixed = {c for c, turns in new.items() if turns < settle}
        psi = {k: v.double().requires_grad_() for k, v in self.psi.items()}
        codes = {c: code_of(self.clients, c).double().requires_grad_() for c in changes}
        for client, change in changes.items():
            used = {k: v.detach() for k, v in psi.items()} if client in fixed else psi
            made = prompt_of(used, codes[client])
            send_back({BASE: made}, {BASE: change.double()}, shares[client])
        held = {**psi, **{f"client/{c}": code for c, code in codes.items()}}
        moving = {k: v for k, v in held.items() if v.grad is not None}
        slopes = {k: v.grad for k, v in moving.items() if v.grad is not None}
        moved, memory = stepped(moving, slopes, self.memory, optim)
        fresh = {c: moved[f"client/{c}"] for c in codes}
        return replace(
            self,
            psi={k: moved.get(k, v) for k, v in self.psi.items()},
            clients={**self.clients, **fresh},
            late={**self.late, **{c: turns + 1 for c, turns in new.items()}},
            memory=memory,
        )


@dataclass(frozen=True)
class Sizes:
    """Numbers of a key and of a value (None: as a prompt's position has), and bounds.

    These are of base prompts and descriptors (None: sqrt(3 / d), and the same).
    """

    keys: int | None
    values: int | None
    bound: float | None
    descriptors: float | None


def begun(
    adapter: Mapping[str, Tensor], clients: Collection[ClientId], dice: Dice, sizes: Sizes
) -> Generator:
    """Where it begins: base prompts shaped like an adapter's, and descriptors, uniform in a bound.

    Attention is normal, by how many numbers a sum has.
    """
    ((name, like),) = ((k, v) for k, v in adapter.items() if k in NAMES)
    width = like.shape[1]
    keys, values = sizes.keys or width, width if sizes.values is None else sizes.values
    bound = sizes.bound or (3 / width) ** 0.5
    psi = {
        BASE: uniform(dice("base"), *like.shape) * bound,
        QUERY: drawn(dice("query"), keys, width).T,
        KEY: drawn(dice("key"), keys, width).T,
        VALUE: drawn(dice("value"), values, width).T,
        OUT: drawn(dice("out"), width, max(1, values))[:, :values].T,
    }
    bound = sizes.descriptors or bound
    codes = {c: uniform(dice("client", client=c), width) * bound for c in clients}
    return Generator(name, {k: v.contiguous() for k, v in psi.items()}, codes)


def uniform(dice: Dice, *shape: int) -> Tensor:
    """Numbers from -1 to 1."""
    return 2 * torch.rand(shape, generator=dice.generator()) - 1


def prompt_of(psi: Tensors, code: Tensor) -> Tensor:
    """P_i: the base prompts, each with the same row of attention added."""
    base = psi[BASE]
    scores = (base @ psi[KEY]) @ (code @ psi[QUERY]) / psi[QUERY].shape[1] ** 0.5
    return base + scores.softmax(0) @ (base @ psi[VALUE]) @ psi[OUT]
