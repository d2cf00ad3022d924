"""What a network at the server makes for each client, and how it learns of what became of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flexp.dice import Dice
from flexp.strategies.base import ClientId
from flexp.tensors import Tensors, mean


def drawn(dice: Dice, *shape: int) -> Tensor:
    """Normal numbers, smaller the longer a row is."""
    return torch.randn(shape, generator=dice.generator()) / shape[-1] ** 0.5


def code_of(clients: Mapping[ClientId, Tensor], client: ClientId) -> Tensor:
    """A client's code; who came later begins at the mean."""
    if client in clients:
        return clients[client]
    known = [{"": v} for _, v in sorted(clients.items())]
    return mean(known, [1.0] * len(known))[""]


def send_back(made: Tensors, vector: Mapping[str, Tensor], share: float) -> None:
    """Adds a share of the vector-Jacobian product to the slopes of what made something.

    With what was made less what was trained, a step against it leads to what was trained.
    """
    pairs = [(v * vector[k]).sum() for k, v in made.items()]
    torch.stack(pairs).sum().mul(share).backward()  # pyright: ignore[reportUnknownMemberType]
