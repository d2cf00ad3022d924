"""This machine: its processor, and how fast it multiplies matrices three ways, on one thread."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from flexp.bench.clock import Work, in_turns

SHAPES = ((512, 512, 2048), (512, 2048, 512), (1024, 1024, 2048))  # rows, in, out
CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Machine:
    """The processor, and what it reaches: operations per second of one thread, by way."""

    processor: str
    cores: int
    torch: str
    alike: bool  # of the kind that the targets were set for
    peak: Mapping[str, float | None]

    @property
    def faster(self) -> str:
        """The precision that this machine multiplies faster at; fp32 where bf16 is no faster."""
        return max(("fp32", "bf16"), key=lambda dtype: fastest(self.peak, dtype))

    @property
    def plain(self) -> dict[str, Any]:
        """As plain data; speeds in GFLOP/s."""
        gemm = {k: None if v is None else round(v / 1e9, 1) for k, v in self.peak.items()}
        return {
            "processor": self.processor,
            "cores": self.cores,
            "torch": self.torch,
            "gemm_gflops": gemm,
        }


def measured(rounds: int = 7) -> Machine:
    """This machine now."""
    text = CPUINFO.read_text("utf-8", "replace") if CPUINFO.is_file() else ""
    name, alike = told(text)
    peak = peaks(rounds)
    return Machine(
        name or platform.processor(), os.cpu_count() or 1, torch.__version__, alike, peak
    )


def told(cpuinfo: str) -> tuple[str, bool]:
    """The processor's name, and whether it is of the targets' kind: AMD Zen 5 with bf16.

    >>> told("vendor_id : AuthenticAMD\\ncpu family : 26\\nmodel name : X\\nflags : avx512_bf16")
    ('X', True)
    """
    found: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    family = found.get("vendor_id"), found.get("cpu family")
    alike = family == ("AuthenticAMD", "26") and "avx512_bf16" in found.get("flags", "").split()
    return found.get("model name", ""), alike


def peaks(rounds: int) -> dict[str, float | None]:
    """Operations per second of the fastest of a few shapes, by way; None where it is not there."""
    works = gemms()
    took = in_turns({f"{way} {n}": work for (way, n), work in works.items()}, rounds)
    out: dict[str, float | None] = {}
    for way in WAYS:
        rates = [
            operations(n) / took[f"{way} {n}"].seconds
            for n in range(len(SHAPES))
            if (way, n) in works
        ]
        out[way] = max(rates, default=None)
    return out


def operations(n: int) -> int:
    """Of one product of the shape with that number."""
    rows, inner, outer = SHAPES[n]
    return 2 * rows * inner * outer


def _plain(dtype: torch.dtype, n: int) -> Work | None:
    x, w = _drawn(dtype, n)
    return lambda: functional.linear(x, w)


def _packed(dtype: torch.dtype, n: int) -> Work | None:
    """The product with a weight laid out for oneDNN; the operators are torch's own, and private."""
    ops: Any = torch.ops.mkldnn
    reorder = getattr(ops, "_reorder_linear_weight", None)
    product = getattr(ops, "_linear_pointwise", None)
    x, w = _drawn(dtype, n)
    if reorder is None or product is None:
        return None
    try:
        packed = reorder(w, x.shape[0])
        product(x, packed, None, "none", [], "")
    except RuntimeError:  # a build without oneDNN, or a processor without the type
        return None
    return lambda: product(x, packed, None, "none", [], "")


def _drawn(dtype: torch.dtype, n: int) -> tuple[Tensor, Tensor]:
    rows, inner, outer = SHAPES[n]
    stream = torch.Generator().manual_seed(n)
    x, w = (torch.randn(size, inner, generator=stream).to(dtype) for size in (rows, outer))
    return x, w


WAYS: Mapping[str, Callable[[int], Work | None]] = {
    "fp32": lambda n: _plain(torch.float32, n),
    "fp32 prepacked": lambda n: _packed(torch.float32, n),
    "bf16": lambda n: _plain(torch.bfloat16, n),
    "bf16 prepacked": lambda n: _packed(torch.bfloat16, n),
}


def gemms() -> dict[tuple[str, int], Work]:
    """The products of every way that this build and processor have, by way and shape."""
    made = {(way, n): make(n) for way, make in WAYS.items() for n in range(len(SHAPES))}
    return {key: work for key, work in made.items() if work is not None}


def fastest(peak: Mapping[str, float | None], dtype: str) -> float:
    """The most that this machine multiplies at that precision, or at a higher one."""
    kinds = ("fp32",) if dtype == "fp32" else ("fp32", dtype)
    return max(v for k, v in peak.items() if v is not None and k.split()[0] in kinds)
