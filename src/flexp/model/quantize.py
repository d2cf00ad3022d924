"""Linear maps of blocks whose weights are codes: which they are, and what takes their place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from flexp import libraries
from flexp.errors import ModelError
from flexp.model.adapter import Dense, Kind
from flexp.model.targets import linear_maps
from flexp.precision import product
from flexp.quantized import Form, Quantized, blank, quantize

TOGETHER = 32_000_000  # bytes of blocks that are read at a time, before they become codes


@dataclass(frozen=True)
class Quantize:
    """What the weights of linear maps become; those that a ``kind`` trains stay as they are."""

    form: Form
    kind: Kind


class QuantizedLinear(nn.Linear):
    """A frozen linear map whose weight is codes.

    Code that reads ``weight`` gets the whole of it, made wide anew each time.
    """

    def __init__(self, made: Quantized, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = made.shape
        self.form: Form = made.form
        self.dtype = dtype
        self.codes: Tensor
        self.scales: Tensor
        self.register_buffer("codes", made.codes, persistent=False)
        self.register_buffer("scales", made.scales, persistent=False)
        self.register_parameter("bias", bias)

    @property
    def quantized(self) -> Quantized:
        """The codes with their scales."""
        return Quantized(self.form, self.codes, self.scales, (self.out_features, self.in_features))

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What the codes stand for, [out, in]."""
        return self.quantized.dense().to(self.dtype)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 the name in nn.Linear
        """The product with what the codes stand for."""
        return product(input, self.quantized, self.bias)


def quantizable(net: nn.Module, blocks: str, kind: Kind) -> list[str]:
    """Paths of the linear maps of a model's blocks that are frozen; ModelError if there are none.

    Classes derived from linear maps may multiply in their own way, and stay as they are.
    """
    known = nn.Linear, libraries.transformers().Conv1D
    inside = {p: m for p, m in linear_maps(net).items() if p.startswith(f"{blocks}.")}
    found = [p for p, m in inside.items() if type(m) in known and not _trained(p, kind)]
    if not found:
        raise ModelError(
            "model.quantize: the blocks have no linear map that is frozen. Set it to none."
        )
    return found


def quantize_maps(net: nn.Module, paths: Iterable[str], form: Form) -> None:
    """Puts codes in the place of the weights of these linear maps, one after another."""
    for path in paths:
        module: Any = net.get_submodule(path)
        weight = _weight(module)
        _replace(net, path, quantize(weight.detach(), form))


def blank_maps(net: nn.Module, paths: Iterable[str], form: Form) -> None:
    """The same for weights of which only the shapes count."""
    for path in paths:
        _replace(net, path, blank(shape_of(net, path), form))


def shape_of(net: nn.Module, path: str) -> tuple[int, int]:
    """Outputs and inputs of a linear map."""
    rows, width = _weight(net.get_submodule(path)).shape
    return rows, width


def together(sizes: Mapping[int, int]) -> list[list[int]]:
    """Blocks by their size as they are read: one at a time, or as many as are small."""
    out: list[list[int]] = []
    left = 0
    for index, size in sizes.items():
        if not out or size > left:
            out.append([])
            left = TOGETHER
        out[-1].append(index)
        left -= size
    return out


def value_of(net: nn.Module, name: str) -> Tensor:
    """A parameter by its name; that of a quantized map as what the codes stand for."""
    path, _, leaf = name.rpartition(".")
    return getattr(net.get_submodule(path), leaf)


def _trained(path: str, kind: Kind) -> bool:
    if not isinstance(kind, Dense):
        return False
    ends = (path == t or path.startswith(f"{t}.") or path.endswith(f".{t}") for t in kind.targets)
    return not kind.targets or any(ends)


def _weight(module: Any) -> Tensor:
    """[out, in]; GPT-2's own class has it the other way."""
    return module.weight if isinstance(module, nn.Linear) else module.weight.T


def _replace(net: nn.Module, path: str, made: Quantized) -> None:
    parent, _, leaf = path.rpartition(".")
    module: Any = net.get_submodule(path)
    fresh = QuantizedLinear(made, module.bias, module.weight.dtype)
    setattr(net.get_submodule(parent), leaf, fresh.train(cast(nn.Module, module).training))
