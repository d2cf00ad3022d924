"""What a message must be like before anything is computed or made for it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, cast

from torch import Tensor

from flexp.errors import LinkError, ParcelError
from flexp.link.messages import Forward, Message, Submit
from flexp.model.backbone import Backbone
from flexp.model.cut import Seat
from flexp.model.skeleton import image_shape
from flexp.model.slots import Slots
from flexp.parcel import plain_facts
from flexp.selection import NEAR, select
from flexp.tensors import PerRow, Tensors, finite, terms


def check_rows(backbone: Backbone, seat: Seat, m: Forward) -> None:
    """LinkError unless what is on board are hidden states, and as many as it is said."""
    width, shape = backbone.width, list(m.hidden.shape)
    if backbone.states is not None:
        wanted = list(backbone.states.shapes[seat.cut.front])
        if not shape or shape[1:] != wanted:
            raise LinkError(f"A hidden state at this cut is {wanted} a row; this one is {shape}.")
    elif m.hidden.dim() != 3 or shape[-1] != width:
        raise LinkError(f"A hidden state is [rows, length, {width}]; this one is {shape}.")
    here = sum(n >= 0 for n in m.rows)
    if m.rows and (here != shape[0] or m.wants):
        raise LinkError(
            f"Of {len(m.rows)} rows {here} should have come, without a wish for their gradient; "
            f"{shape[0]} came."
        )
    if m.hidden.dtype != backbone.dtype:
        raise LinkError(
            f"A hidden state has numbers of type {backbone.dtype}; this one has {m.hidden.dtype}."
        )


def check(backbone: Backbone, seat: Seat, m: Forward) -> None:
    """LinkError unless types, shapes and numbers are those of a batch at that seat."""
    if seat.labels == "keep" and m.until != "hidden":
        raise LinkError(f'A seat with labels "keep" cannot ask for {m.until}.')
    if not m.hidden.numel():
        raise LinkError("A hidden state has numbers; this one has 0.")
    rows, length = m.hidden.shape[:2]
    images = None if backbone.states is None else (rows, *image_shape(backbone.config))
    for name, shape in m.shapes.items():
        if images is not None:
            if (name, tuple(shape)) != ("pixel_values", images):
                raise LinkError(f'"{name}" of shape {list(shape)} does not fit {list(images)}.')
            continue
        size = (rows, length)
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


def check_finite(client: str, m: Message) -> None:
    """LinkError if a number that a client sends is not finite: in tensors, operations or facts.

    It would spread into what everybody shares. Only in what a forward wears NaN has a meaning: a
    coefficient that is learned, whose value comes as a tensor.
    """
    refuse_odd(client, m.tensors())
    odd = next((at for at, value in _numbers(m, "") if not math.isfinite(value)), None)
    if odd is not None:
        raise LinkError(
            f'Client "{client}" sent a number that is not finite, as {odd} of its {m.key.phase}. '
            "It was refused, and nothing has changed."
        )
    if isinstance(m, Submit):
        try:
            plain_facts(m.facts)
        except ParcelError as problem:
            raise LinkError(f'Client "{client}" submitted odd facts: {problem}') from problem


def odd_reply(slots: Slots, slot: str, m: Submit, known: Tensors) -> str:
    """What is odd about near tensors that a client submits of a slot of those names; "" if nothing.

    They must be those that it says it gives. Rows of a head may be another number: a client's
    labels may be its own. Of blocks that are not in memory here nothing may be known.
    """
    place, near = slots.place, m.near.get(slot, {})
    lacking = select(known, m.far[slot] & NEAR, place).keys() - near.keys()
    if lacking:
        return f'slot "{slot:.80}" without "{min(lacking):.200}"'
    blocks = {place(name).block for name in known}
    for name, value in near.items():
        if place(name).side != "near" or (name not in known and place(name).block in blocks):
            return f'"{name:.200}" of slot "{slot:.80}", which is no near tensor of that slot'
        head = place(name).part == "head"
        mine, wanted = tuple(value.shape), tuple(known.get(name, value).shape)
        if mine != wanted and not (head and mine[1:] == wanted[1:]):
            return f'"{name:.200}" of slot "{slot:.80}" as {list(mine)}, where it is {list(wanted)}'
    return ""


def refuse_odd(client: str, tensors: Tensors) -> None:
    """LinkError if one of these tensors of a client has NaN or infinity."""
    odd = next((name for name, tensor in tensors.items() if not finite({name: tensor})), None)
    if odd is not None:
        raise LinkError(
            f'Tensor "{odd:.200}" of client "{client}" has NaN or infinity. It was refused, and '
            "nothing has changed. Lower the client's learning rate, or set train.clip_norm."
        )


def _numbers(value: Any, at: str) -> Iterator[tuple[str, float]]:
    """Every float in a message and the field that it is in; facts are looked at as JSON."""
    if isinstance(value, float):
        yield at, value
    elif isinstance(value, Tensor):
        return
    elif is_dataclass(value):
        for each in fields(value):
            inner = getattr(value, each.name)
            if each.name == "wear":
                yield from ((at, n) for at, n in _numbers(inner, "wear") if not math.isnan(n))
            elif each.name != "facts":
                yield from _numbers(inner, each.name)
    elif isinstance(value, Mapping):
        for inner in cast("Mapping[Any, Any]", value).values():
            yield from _numbers(inner, at)
    elif isinstance(value, tuple):
        for inner in cast("tuple[Any, ...]", value):
            yield from _numbers(inner, at)
