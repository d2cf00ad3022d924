"""How far a classifier's confidence is from how often it is right.

Rows are sorted into bins by the probability of the label that is told (Guo et al. 2017, arXiv
1706.04599): ECE = sum_b |right_b - confident_b| / rows, over bins of equal width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

BINS = 15
GAP = "gap of bin "


def gaps(logits: Tensor, targets: Tensor) -> dict[str, tuple[float, float]]:
    """By bin, rows that are right less the confidence of all, and how many rows."""
    confident, told = logits.double().softmax(-1).max(-1)
    into = (confident * BINS).long().clamp_max(BINS - 1)
    gap = torch.bincount(into, (told == targets).double() - confident, minlength=BINS)
    rows = torch.bincount(into, minlength=BINS)
    return {f"{GAP}{b}": (float(gap[b]), float(rows[b])) for b in range(BINS) if rows[b]}


def ece(sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """The expected calibration error, if rows were counted."""
    held = [pair for name, pair in sums.items() if name.startswith(GAP)]
    rows = sum(count for _, count in held)
    return {"ece": sum(abs(gap) for gap, _ in held) / rows} if rows else {}


def others(sums: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """All sums but those of bins."""
    return {name: pair for name, pair in sums.items() if not name.startswith(GAP)}
