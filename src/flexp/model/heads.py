"""Where a head begins, if not where the backbone has it: lengths and directions of its rows."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from flexp.model.backbone import Backbone
from flexp.model.ops import HeadForm, SlotSpec
from flexp.tensors import Tensors


def headed(body: Backbone, adapter: Tensors, spec: SlotSpec) -> Tensors:
    """The adapter with the head that a slot is to begin with; only matrices change."""
    if spec.head_rows is None and spec.head_form == "drawn":
        return adapter
    length = 1.0 if spec.head_rows is None else spec.head_rows
    head = [k for k, v in adapter.items() if body.block_of(k) == body.depth and v.dim() == 2]
    return adapter | {k: turned(adapter[k], spec.head_form) * length for k in head}


def turned(rows: Tensor, form: HeadForm) -> Tensor:
    """Rows of length 1: as drawn, at right angles, or a simplex (equiangular tight frame).

    A matrix that has no fewer rows than columns is no classifier of features; it stays as drawn.
    """
    if form != "drawn" and rows.shape[0] < rows.shape[1]:
        linear: Any = torch.linalg
        found, upper = cast("tuple[Tensor, Tensor]", linear.qr(rows.T.double()))
        turned = (found * upper.diagonal().sign()).T
        turned = turned - turned.mean(0) if form == "etf" else turned
        rows = turned.to(rows.dtype)
    return functional.normalize(rows)
