"""Weights as small codes with scales, made wide again a tile at a time.

int8 has a scale for each row of the output. nf4 is the 4-bit NormalFloat of Dettmers et al. 2023
(QLoRA, arXiv 2305.14314) with a scale for every 64 numbers of a row. Codes come from the row alone,
by operations that round alike everywhere, so all machines make the same of the same checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Form = Literal["int8", "nf4"]

TILE = 1 << 20  # numbers of a weight that are made wide at a time
GROUP = 64  # numbers that share a scale in nf4
# Each stands for the same share of a normal distribution; zero is among them (the paper's E).
NORMAL_FLOAT = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)
_BETWEEN = tuple(float(a + b) / 2 for a, b in pairwise(NORMAL_FLOAT))
# The two numbers of every byte, side by side in 64 bits: one look-up brings both.
_PAIRS = torch.cartesian_prod(NORMAL_FLOAT, NORMAL_FLOAT).view(torch.float64).flatten()


@dataclass(frozen=True)
class Quantized:
    """A weight of ``shape`` [out, in] as codes and float32 scales.

    int8: codes [out, in], scales [out, 1]. nf4: two codes per byte [out, groups * 32], the first
    in the upper half, scales [out, groups]; the last group of a row is filled up with zeros.
    """

    form: Form
    codes: Tensor
    scales: Tensor
    shape: tuple[int, int]

    def tile(self, rows: slice) -> Tensor:
        """Some rows in float32."""
        codes, scales = self.codes[rows], self.scales[rows]
        if self.form == "int8":
            return codes.float().mul_(scales)
        pairs = _PAIRS.to(codes.device).index_select(0, codes.flatten().int())
        grouped = pairs.view(torch.float32).view(len(codes), scales.shape[1], GROUP)
        grouped.mul_(scales[..., None])
        return grouped.flatten(1)[:, : self.shape[1]]

    def dense(self) -> Tensor:
        """All of it in float32."""
        return torch.cat([self.tile(rows) for rows in tiles(self.shape)])


def quantize(weight: Tensor, form: Form) -> Quantized:
    """The nearest codes of a weight [out, in], a tile at a time; NaN and infinity stay not finite.

    >>> made = quantize(torch.tensor([[1.27, -0.02, 0.006]]), "int8")
    >>> made.codes.tolist()
    [[127, -2, 1]]
    """
    coded = _int8 if form == "int8" else _nf4
    rows, width = weight.shape
    made = [coded(weight[rows].float().contiguous()) for rows in tiles((rows, width))]
    codes, scales = (torch.cat(parts) for parts in zip(*made, strict=True))
    return Quantized(form, codes, scales, (rows, width))


def blank(shape: tuple[int, int], form: Form) -> Quantized:
    """One of which only shapes and types count."""
    rows, width = shape
    groups = -(-width // GROUP)
    if form == "int8":
        return Quantized(form, torch.empty(shape, dtype=torch.int8), torch.empty(rows, 1), shape)
    codes = torch.empty(rows, groups * GROUP // 2, dtype=torch.uint8)
    return Quantized(form, codes, torch.empty(rows, groups), shape)


def quantized_bytes(shape: tuple[int, int], form: Form) -> int:
    """The size of codes and scales of a weight.

    >>> quantized_bytes((10, 128), "int8"), quantized_bytes((10, 128), "nf4")
    (1320, 720)
    """
    rows, width = shape
    return rows * (width + 4 if form == "int8" else -(-width // GROUP) * (GROUP // 2 + 4))


def tiles(shape: tuple[int, ...]) -> Iterator[slice]:
    """Rows of a weight, a tile at a time."""
    rows = max(1, TILE // max(1, shape[1]))
    return (slice(at, at + rows) for at in range(0, shape[0], rows))


def _int8(wide: Tensor) -> tuple[Tensor, Tensor]:
    scales = wide.abs().amax(1, keepdim=True) / 127
    # The scale of numbers near the smallest there are is itself rounded, so codes are held back.
    codes = (wide / torch.where(scales == 0, 1, scales)).round_().clamp_(-127, 127)
    return codes.to(torch.int8), scales


def _nf4(wide: Tensor) -> tuple[Tensor, Tensor]:
    grouped = functional.pad(wide, (0, -wide.shape[1] % GROUP)).view(len(wide), -1, GROUP)
    scales = grouped.abs().amax(-1)
    unit = grouped / torch.where(scales == 0, 1, scales)[..., None]
    codes = torch.zeros_like(unit, dtype=torch.uint8)
    for bound in _BETWEEN:  # faster than a search
        codes += (unit > bound).view(torch.uint8)
    pairs = codes.flatten(1)
    return (pairs[:, 0::2] << 4) | pairs[:, 1::2], scales
