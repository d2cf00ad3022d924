"""One frame: a small header with fixed fields, then tensors as raw bytes, 64-byte aligned.

Layout: ``FXP1``, the header's length (4 bytes, little-endian), the header (MessagePack), padding to
a multiple of 64, then each tensor's bytes in the order of the header's list, each padded likewise.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Union, cast, get_args

import msgspec
import torch
from msgspec import defstruct
from torch import Tensor

from flexp.errors import LinkError, ParcelError
from flexp.headers import MAX_DIMS, PARCEL
from flexp.link.control import Control
from flexp.link.messages import Answer, Message
from flexp.link.schema import MIRRORS, Ref, to_header, to_message, values_in
from flexp.link.wire import PACKED, Wire, pack, parts_of, unpack
from flexp.parcel import plain_facts
from flexp.safe import CODES, flat_bytes

MAGIC = b"FXP1"
ALIGN = 64
MAX_HEADER = 1 << 20
MAX_TENSORS = PARCEL.tensors
MAX_FRAME = 1 << 30  # bytes of a whole frame, unless the link knows better
CHUNK = 1 << 20
# A value of a header takes up to 192 bytes in memory. With so many of them, and one more for every
# 96 bytes of the frame, they take at most a mebibyte and two bytes for each of the frame's.
VALUES = 5000
MORE_PIECES = 1024  # than there are mebibytes, and a frame's pieces are too many
_CODES = {**CODES, torch.int8: "I8"}  # int8 crosses only as a part of something else
_TYPES = {code: dtype for dtype, code in _CODES.items()}
_MAX_NUMEL = 1 << 40

Body = Message | Answer | Control


_BODIES: Any = Union[(*MIRRORS.values(), *get_args(Control))]
# Counted before any of them is read: a mebibyte of header would hold very many.
_SHAPE: Any = Annotated[tuple[int, ...], msgspec.Meta(max_length=MAX_DIMS)]
_SHAPES: Any = Annotated[tuple[tuple[str, _SHAPE], ...], msgspec.Meta(max_length=MAX_TENSORS)]
# What stands before the tensors: the body that refers to them, their types and shapes.
Header: Any = defstruct(
    "Header",
    [("number", int), ("body", _BODIES), ("tensors", _SHAPES, ())],
    frozen=True,
    forbid_unknown_fields=True,
)
_READ = msgspec.msgpack.Decoder(Header)
_WRITE = msgspec.msgpack.Encoder()


@dataclass(frozen=True)
class Frame:
    """A message with its number; an answer has the number of what it answers, 0 is unasked."""

    number: int
    body: Body


def encode(number: int, body: Body, wire: Wire = "fp32") -> bytes:
    """The bytes of a frame. Hidden states and their gradients take the wire's type."""
    boarded: list[Tensor] = []

    def ref(tensor: Tensor, name: str) -> Ref:
        packing: Wire = wire if name in PACKED else "fp32"
        parts = pack(tensor, packing, name=name) if packing != "fp32" else {"value": tensor}
        at = {part: len(boarded) + n for n, part in enumerate(parts)}
        boarded.extend(parts.values())
        plain = packing == "fp32" or parts.get("value") is tensor
        return Ref(at) if plain else Ref(at, packing, CODES[tensor.dtype])

    plain = to_header(body, ref)
    flat = [t.detach().to("cpu").contiguous() for t in boarded]
    header = _WRITE.encode(
        Header(number, plain, tuple((_CODES[t.dtype], tuple(t.shape)) for t in flat))
    )
    if len(header) > MAX_HEADER or len(flat) > MAX_TENSORS:
        raise LinkError(
            f"A message holds at most {MAX_TENSORS} tensors and {MAX_HEADER} bytes of names and "
            f"facts; this one has {len(flat)} and {len(header)}."
        )
    pieces: list[Any] = [MAGIC, len(header).to_bytes(4, "little"), header]
    pieces.append(bytes(-(8 + len(header)) % ALIGN))
    for tensor in flat:
        raw = memoryview(cast("Any", flat_bytes(tensor).numpy()))
        pieces += [raw, bytes(-len(raw) % ALIGN)]
    return b"".join(pieces)


def decode(data: bytearray) -> Frame:
    """The frame in these bytes, whose tensors lie in them; LinkError and nothing else if not."""
    try:
        return _decode(data)
    except (msgspec.MsgspecError, UnicodeError, RecursionError, ParcelError) as problem:
        raise LinkError(f"These bytes are no frame of this program: {problem}") from problem


def key_digest(data: bytes | bytearray) -> str:
    """Tells a repeated message from another one under the same key; no protection from forgery."""
    return f"{len(data)}:{zlib.crc32(data):08x}"


def chunks(data: bytes) -> Iterator[bytes]:
    """A frame in pieces of at most a mebibyte; the first begins with the length of the whole."""
    head = len(data).to_bytes(8, "little")
    view = memoryview(data)
    yield head + bytes(view[: CHUNK - 8])
    for at in range(CHUNK - 8, len(data), CHUNK):
        yield bytes(view[at : at + CHUNK])


class Joiner:
    """Puts the pieces of frames together; refuses one that is too long before it has come."""

    def __init__(self, limit: int = MAX_FRAME) -> None:
        self.limit, self.wanted, self.held = limit, -1, bytearray()
        self.pieces = 0

    def add(self, piece: bytes) -> bytearray | None:
        """The frame that is whole with this piece, if one is."""
        view = memoryview(piece)
        if self.wanted < 0:
            if len(piece) < 8:
                raise LinkError("A frame begins with its length in 8 bytes; these are fewer.")
            self.wanted, self.held = int.from_bytes(view[:8], "little"), bytearray()
            self.pieces, view = 0, view[8:]
            if self.wanted > self.limit:
                raise LinkError(
                    f"A message of {self.wanted} bytes is longer than the {self.limit} that this "
                    "side takes. Use smaller batches, or raise the limit at the server."
                )
        if not len(view) or len(self.held) + len(view) > self.wanted:
            raise LinkError("A frame's pieces do not add up to its length.")
        self.held += view
        self.pieces += 1
        if self.pieces > MORE_PIECES + self.wanted // CHUNK:
            raise LinkError(
                f"A message of {self.wanted} bytes came in more than {self.pieces - 1} pieces."
            )
        if len(self.held) < self.wanted:
            return None
        self.wanted = -1
        return self.held


def _decode(data: bytearray) -> Frame:
    view = memoryview(data)
    size = int.from_bytes(view[4:8], "little")
    if bytes(view[:4]) != MAGIC or size > min(MAX_HEADER, len(data) - 8):
        raise LinkError("These bytes are no frame of this program. Are both of one version?")
    raw = view[8 : 8 + size]
    most = VALUES + len(data) // 96
    if size > most and values_in(raw, most) > most:
        raise LinkError(f"A frame of {len(data)} bytes has more than {most} values in its header.")
    header = _READ.decode(raw)
    again = _WRITE.encode(header)
    if len(again) != size or not data.startswith(again, 8):
        # A field that nobody knows, or the same thing said otherwise.
        raise LinkError("A frame's header has more in it than this version of the program knows.")
    tensors = list(_tensors(data, 8 + size, header))
    used: list[int] = []

    def tensor(ref: Ref) -> Tensor:
        used.extend(ref.at.values())
        if any(at < 0 or at >= len(tensors) for at in ref.at.values()):
            raise LinkError("A frame's header speaks of a tensor that is not on board.")
        parts = {name: tensors[at] for name, at in ref.at.items()}
        if ref.wire == "fp32" and parts.keys() == {"value"} and not ref.dtype:
            return parts["value"]
        if not (dtype := _TYPES.get(ref.dtype)) or not dtype.is_floating_point:
            raise LinkError(f'A tensor cannot become "{ref.dtype:.8}".')
        shape = tuple(next(iter(parts.values()), torch.empty(0)).shape)
        wanted = dict(parts_of(shape, dtype, ref.wire))
        found = {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()}
        if found != wanted or wanted == {"value": (dtype, shape)}:
            raise LinkError(f'These are not the parts of a tensor under link.wire "{ref.wire}".')
        return unpack(parts, ref.wire, dtype)

    body = to_message(header.body, tensor)
    if used != list(range(len(tensors))):
        raise LinkError("A frame has tensors that its header does not speak of, or twice.")
    facts = getattr(body, "facts", None)
    if facts is not None:
        plain_facts(facts)
    return Frame(header.number, body)


def _tensors(data: bytearray, at: int, header: Any) -> Iterator[Tensor]:
    """The tensors, which lie in ``data``; their sizes are checked before anything is made."""
    at = _padded(data, at)
    for code, shape in header.tensors:
        dtype = _TYPES.get(code)
        if dtype is None or any(n < 0 for n in shape):
            raise LinkError(f'A tensor of type "{code:.8}" and shape {shape} is not allowed.')
        count = math.prod(shape)
        size = count * dtype.itemsize
        if math.prod(max(n, 1) for n in shape) > _MAX_NUMEL or at + size > len(data):
            raise LinkError(f"A tensor of shape {list(shape)} does not fit the frame's bytes.")
        if count:
            found = torch.frombuffer(data, dtype=dtype, count=count, offset=at).reshape(shape)
            if dtype is torch.bool and flat_bytes(found).max() > 1:
                raise LinkError("A tensor of truth values holds bytes that are neither.")
        else:
            found = torch.empty(shape, dtype=dtype)
        yield found
        at = _padded(data, at + size)
    if at != len(data):
        raise LinkError(f"A frame of {len(data)} bytes ends at byte {at}.")


def _padded(data: bytearray, at: int) -> int:
    """Where the next part begins; LinkError if there is something in between."""
    end = at + -at % ALIGN
    if any(memoryview(data)[at:end]):
        raise LinkError("A frame has bytes where nothing belongs.")
    return end
