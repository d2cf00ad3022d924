"""Changes valid samples where bytes alone would never get past a magic number or a length."""

from __future__ import annotations

import base64
import json
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import msgspec

Mutator = Callable[[bytes, random.Random], bytes]

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 255, 1 << 31, 1 << 53, (1 << 63) - 1, -(1 << 63), 0.5, -0.0, 1e308,
    5e-324, math.nan, math.inf, "", "a", "..", "../up", "/", "\x00", "é", "\u2028", "x" * 600, [],
    {}, [[]], {"a": {}}, [0] * 9,
)  # fmt: skip
WORDS = (b"\n", b"\r", b"\x00", b'"', b"{", b"}", b"[", b":", b",", b"\xff", b"\xef\xbb\xbf",
    b"NaN", b"1e999", b"-", b"*a", b"&a ", b"\\ud800", b"../", b"9" * 5000, b"[" * 999)  # fmt: skip


def in_bytes(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, cut, doubled, moved or put in."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(out) + 1)
        length = rng.choice((0, 1, 1, 2, 4, 8, 16, 64))
        match rng.randrange(7):
            case 0 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at : at + length] = rng.randbytes(length)
            case 2:
                del out[at : at + length]
            case 3:
                out[at:at] = out[at : at + length]
            case 4:
                out[at:at] = rng.choice(WORDS)
            case 5:
                del out[at:]
            case _:
                there = rng.randrange(len(out) + 1)
                out[at : at + length] = out[there : there + length]
    return bytes(out)


def in_tree(value: Any, rng: random.Random) -> Any:
    """Plain data with one place changed: another value, one less, one twice, or one deeper."""
    if isinstance(value, Mapping) and value and rng.random() < 0.8:
        held = dict(cast("Mapping[Any, Any]", value))
        key = rng.choice(list(held))
        match rng.randrange(8):
            case 0:
                del held[key]
            case 1:
                held[rng.choice(("", "x", "type", "__metadata__", str(key) + "x"))] = held[key]
            case 2:
                other = rng.choice(list(held))
                held[key], held[other] = held[other], held[key]
            case _:
                held[key] = in_tree(held[key], rng)
        return held
    if isinstance(value, list) and value and rng.random() < 0.8:
        items = list(cast("list[Any]", value))
        at = rng.randrange(len(items))
        match rng.randrange(6):
            case 0:
                del items[at]
            case 1:
                items.insert(at, items[rng.randrange(len(items))])
            case _:
                items[at] = in_tree(items[at], rng)
        return items
    match rng.randrange(6):
        case 0:
            return [value]
        case 1 if isinstance(value, int) and abs(value) < 1 << 50:
            return value + rng.choice((-1, 1, 8, -8, 1 << 12))
        case 2 if isinstance(value, str):
            return value + rng.choice(("x", "/", "\x00", "é", ".."))
        case _:
            return rng.choice(ODD)


def in_json(data: bytes, rng: random.Random) -> bytes:
    """A JSON text with another value in one place."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return in_bytes(data, rng)
    return json.dumps(in_tree(value, rng)).encode()


def in_json_lines(data: bytes, rng: random.Random) -> bytes:
    """One line of JSON changed, left out, doubled or moved."""
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    match rng.randrange(5):
        case 0:
            del lines[at]
        case 1:
            lines.insert(rng.randrange(len(lines) + 1), lines[at])
        case 2:
            return in_bytes(data, rng)
        case _:
            lines[at] = in_json(lines[at], rng)
    return b"\n".join(lines)


def in_frame(data: bytes, rng: random.Random) -> bytes:
    """A frame with another header that is of the length that it says."""
    size = int.from_bytes(data[4:8], "little")
    start = 8 + size + -(8 + size) % 64
    try:
        header = msgspec.msgpack.encode(in_tree(msgspec.msgpack.decode(data[8 : 8 + size]), rng))
    except (ValueError, TypeError, OverflowError, RecursionError, msgspec.MsgspecError):
        return in_bytes(data, rng)
    head = data[:4] + len(header).to_bytes(4, "little") + header
    return head + bytes(-len(head) % 64) + data[start:]


def in_safetensors(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another header of the length that it says."""
    size = int.from_bytes(data[:8], "little")
    head, body = data[8 : 8 + size], data[8 + size :]
    if rng.random() < 0.3:
        body = in_bytes(body, rng)
    elif rng.random() < 0.2:  # names twice
        head = head.rstrip()[:-1] + b"," + head[1:]
    else:
        head = (in_json if rng.random() < 0.8 else in_bytes)(head, rng)
    return len(head).to_bytes(8, "little") + head + body


PEM = re.compile(rb"-----BEGIN ([A-Z ]+)-----\n(.*?)\n-----END \1-----", re.S)


def in_pem(data: bytes, rng: random.Random) -> bytes:
    """A PEM text whose DER inside is another."""
    found = list(PEM.finditer(data))
    if not found or rng.random() < 0.15:
        return in_bytes(data, rng)
    match = rng.choice(found)
    try:
        der = base64.b64decode(match[2])
    except ValueError:
        return in_bytes(data, rng)
    inner = base64.encodebytes(in_bytes(der, rng)).strip()
    return data[: match.start(2)] + inner + data[match.end(2) :]


def in_kit(data: bytes, rng: random.Random) -> bytes:
    """JSON in which a text may be PEM."""
    try:
        held = json.loads(data)
        key = rng.choice([k for k in held if "BEGIN" in str(held[k])])
        held[key] = in_pem(str(held[key]).encode(), rng).decode("latin-1")
    except (ValueError, TypeError, IndexError, RecursionError):
        return in_json(data, rng)
    return json.dumps(held).encode() if rng.random() < 0.5 else in_json(data, rng)


def by_first(kinds: Sequence[Mutator]) -> Mutator:
    """A mutator for inputs whose first byte says which of several readers gets the rest."""

    def mutate(data: bytes, rng: random.Random) -> bytes:
        if not data or rng.random() < 0.02:
            return bytes([rng.randrange(len(kinds))]) + data[1:]
        return data[:1] + kinds[data[0] % len(kinds)](data[1:], rng)

    return mutate
