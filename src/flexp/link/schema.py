"""What may lie in a frame's header: the messages' own fields and types, and nothing else.

Every class that crosses is mirrored by a ``msgspec`` struct of the same name and fields, made from
it here, so there is one list of fields. A tensor is a ``Ref`` to its place in the frame.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from types import UnionType
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

from msgspec import Struct, defstruct, field
from torch import Tensor

from flexp.link import messages
from flexp.link.wire import Wire
from flexp.model import ops
from flexp.tensors import PerRow, Stacked, Term


class Part(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, tag=True):
    """Anything in a header."""


class Ref(Part, frozen=True):
    """A tensor, by the places of its parts in the frame; without a wire type there is one, "value".

    ``dtype`` is what it has where it is used.
    """

    at: dict[str, int]
    wire: Wire = "fp32"
    dtype: str = ""


# What is mirrored; what a class uses comes before it.
_CLASSES: tuple[type[Any], ...] = (
    Term,
    Stacked,
    PerRow,
    ops.Grad,
    ops.Assign,
    ops.Pull,
    ops.Step,
    ops.Dot,
    *get_args(messages.Message),
    messages.Answer,
)
_LOOSE: dict[str, Any] = {"Facts": dict[str, Any]}  # any JSON; the frame checks how deep
MIRRORS: dict[type[Any], type[Struct]] = {}


def _translated(hint: Any) -> Any:
    """The type of a field as it is in a header."""
    if hint is Tensor:
        return Ref
    if hint in MIRRORS:
        return MIRRORS[hint]
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        # A coefficient is a number by the time that it crosses.
        kept = [a for a in args if not (a is Tensor and float in args)]
        return Union[tuple(_translated(a) for a in kept)]  # noqa: UP007 built at run time
    if origin in (Mapping, dict):
        return dict[tuple(_translated(a) for a in args)]  # pyright: ignore[reportInvalidTypeArguments]
    if origin is tuple:
        return tuple[tuple(a if a is ... else _translated(a) for a in args)]  # pyright: ignore[reportInvalidTypeArguments]
    return hint


def _mirror(of: type[Any]) -> type[Struct]:
    """The struct of a dataclass."""
    hints, made = get_type_hints(of, localns=_LOOSE), list[Any]()
    for each in fields(of):
        kind = _translated(hints[each.name])
        if each.default is not MISSING:
            made.append((each.name, kind, each.default))
        elif each.default_factory is not MISSING:
            made.append((each.name, kind, field(default_factory=each.default_factory)))
        else:
            made.append((each.name, kind))
    return defstruct(of.__name__, made, bases=(Part,), frozen=True, tag=of.__name__)


# What follows the first byte of a value in MessagePack: bytes that give a length (or a count), and
# bytes besides, if its length is fixed.
_LENGTHS = {
    0xC4: 1, 0xC5: 2, 0xC6: 4, 0xC7: 1, 0xC8: 2, 0xC9: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4,
    0xDC: 2, 0xDD: 4, 0xDE: 2, 0xDF: 4,
}  # fmt: skip
_FIXED = {
    0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8,
    0xD4: 2, 0xD5: 3, 0xD6: 5, 0xD7: 9, 0xD8: 17, 0xC7: 1, 0xC8: 1, 0xC9: 1,
}  # fmt: skip


def values_in(packed: memoryview, most: int) -> int:
    """How many values a text of MessagePack has, or some number above ``most`` if it has more.

    An empty list takes a byte there and 64 in memory, so they are counted before they are made.
    """
    at, seen, left = 0, 0, 1
    while left and at < len(packed) and seen + left <= most:
        first = packed[at]
        at, seen, left = at + 1, seen + 1, left - 1
        if 0x80 <= first < 0x90:
            left += 2 * (first & 15)
        elif 0x90 <= first < 0xA0:
            left += first & 15
        elif 0xA0 <= first < 0xC0:
            at += first & 31
        else:
            width = _LENGTHS.get(first, 0)
            length = int.from_bytes(packed[at : at + width], "big")
            at += width + _FIXED.get(first, 0)
            if first < 0xDC:
                at += length
            else:
                left += length if first < 0xDE else 2 * length
    return seen + left


for _each in _CLASSES:
    MIRRORS[_each] = _mirror(_each)
_ORIGINALS = {mirror: original for original, mirror in MIRRORS.items()}


def to_header(value: Any, ref: Callable[[Tensor, str], Ref], name: str = "") -> Any:
    """A message as it lies in a header; ``ref`` puts a tensor, of that field, into the frame."""
    if isinstance(value, Tensor):
        return ref(value, name)
    mirror = MIRRORS.get(cast("type[Any]", type(value)))
    if mirror is not None:
        held = {f.name: to_header(getattr(value, f.name), ref, f.name) for f in fields(value)}
        return mirror(**held)
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
        return {k: to_header(v, ref, str(k)) for k, v in items}
    if isinstance(value, tuple | list):
        return tuple(to_header(v, ref, name) for v in cast("tuple[Any, ...]", value))
    return value


def to_message(value: Any, tensor: Callable[[Ref], Tensor]) -> Any:
    """The message that ``to_header`` was given; ``tensor`` finds what a ref stands for."""
    if isinstance(value, Ref):
        return tensor(value)
    original = _ORIGINALS.get(cast("type[Struct]", type(value)))
    if original is not None:
        names = value.__struct_fields__
        return original(**{n: to_message(getattr(value, n), tensor) for n in names})
    if isinstance(value, dict):
        held = cast("dict[Any, Any]", value)
        return {k: to_message(v, tensor) for k, v in held.items()}
    if isinstance(value, tuple):
        return tuple(to_message(v, tensor) for v in cast("tuple[Any, ...]", value))
    return value
