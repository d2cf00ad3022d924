"""Makes a model cuttable and wearable: stations before blocks, leaves that see what is on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from flexp.model.cut import PASS, Station
from flexp.model.quantize import QuantizedLinear
from flexp.model.skeleton import modules
from flexp.model.wearing import Wearing
from flexp.model.worn import Worn


def equip(
    model: nn.Module,
    path: str,
    blocks: nn.ModuleList,
    in_tuple: Sequence[bool],
    head: Sequence[str],
) -> None:
    """Sets a station before every block, and lets leaves of blocks and head wear something."""
    for index, block in enumerate(blocks):
        block.forward = Station(block, index, len(blocks), in_tuple[index])
    for name, module in modules(model).items():
        inside = name.startswith(f"{path}.")
        own = isinstance(module, QuantizedLinear) or list(module.parameters(recurse=False))
        leaf = not list(module.children()) and own
        if name in head or (inside and leaf):
            cast(Any, module).forward = Wearing(module, name, _worn_now)


def _worn_now() -> Worn | None:
    now = PASS.get()
    return None if now is None else now.wears
