"""What a forward must be like before anything is computed or made for it."""

from __future__ import annotations

import math

import torch

from flexp.errors import LinkError
from flexp.link.messages import Forward
from flexp.model.backbone import Backbone
from flexp.model.cut import Seat
from flexp.tensors import PerRow, terms


def check(backbone: Backbone, seat: Seat, m: Forward) -> None:
    """LinkError unless types, shapes and numbers are those of a batch at that seat."""
    width = backbone.width
    if m.hidden.dim() != 3 or m.hidden.shape[-1] != width:
        shape = list(m.hidden.shape)
        raise LinkError(f"A hidden state is [rows, length, {width}]; this one is {shape}.")
    if seat.labels == "keep" and m.until != "hidden":
        raise LinkError(f'A seat with labels "keep" cannot ask for {m.until}.')
    if m.hidden.dtype != backbone.dtype or not m.hidden.numel():
        raise LinkError(
            f"A hidden state has numbers of type {backbone.dtype}; this one has "
            f"{m.hidden.numel()} of {m.hidden.dtype}."
        )
    rows, length = m.hidden.shape[:2]
    for name, shape in m.shapes.items():
        size = (rows, length) if name != "pixel_values" else (rows,)
        # Blanks are made of that shape: what is much larger than the message is an attack.
        most = 16 * m.hidden.numel()
        if tuple(shape[: len(size)]) != size or min(shape) < 0 or math.prod(shape) > most:
            raise LinkError(f'"{name}" of shape {list(shape)} does not fit [{rows}, {length}].')
    if m.mask is not None and m.mask.shape != (rows, length):
        raise LinkError(f"A mask of {list(m.mask.shape)} does not fit [{rows}, {length}].")
    wanted = sum(isinstance(t.coef, float) and math.isnan(t.coef) for t in terms(m.wear))
    fit = [tuple(c.shape) == (backbone.depth + 2,) for c in m.coefs]
    if len(m.coefs) != wanted or not all(fit):
        raise LinkError(
            f"The wear has {wanted} learned coefficients, of {backbone.depth + 2} numbers "
            f"each; the message carries {[list(c.shape) for c in m.coefs]}."
        )
    if isinstance(m.wear, PerRow) and len(m.wear.row) != rows:
        raise LinkError(f"{len(m.wear.row)} rows wear something, but {rows} came.")
    if m.until == "loss" and (m.labels is None or m.labels.shape[:1] != (rows,)):
        raise LinkError(f"A far loss needs labels for {rows} rows; the message has others.")
    if not bool(torch.isfinite(m.hidden).all()):
        raise LinkError("A hidden state with NaN or infinity was refused.")
