"""RELA (Seo et al., 2025, arXiv 2506.11024): clients whose rows pull a model alike help each other.

The likeness of two signatures (``client/signature.py``) is the mean of their columns' cosines.
A client's shares of the others are exp(likeness / tau), added up to 1; its own is 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def likeness(signatures: Sequence[Tensor]) -> Tensor:
    """[N, N] in double, from N signatures [rows, columns]; an empty column counts for nobody."""
    columns = [functional.normalize(s.double(), dim=0, eps=1e-30) for s in signatures]
    there = [(s != 0).any(0).double() for s in signatures]
    out = torch.eye(len(signatures), dtype=torch.float64)
    for i, one in enumerate(columns):
        for j in range(i):
            both = float((there[i] * there[j]).sum())
            out[i, j] = out[j, i] = float((one * columns[j]).sum()) / both if both else 0.0
    return out


def shares(row: Sequence[float], tau: float) -> list[float]:
    """The shares of others, from how alike each is."""
    return [float(x) for x in torch.softmax(torch.tensor(row, dtype=torch.float64) / tau, 0)]
