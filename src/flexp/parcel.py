"""Tensors + facts, one encoding (safetensors, checked before parsing) for wire, disk and Ray.

Layout: tensors are named ``adapter/<slot>/<tensor name>`` and ``tensor/<name>``, with the slot
percent-encoded because slots may contain a slash. One metadata entry holds canonical JSON with the
format's version, the facts and the names of all slots (a slot may be empty).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, cast
from urllib.parse import quote, unquote

import torch
from safetensors import SafetensorError
from safetensors.torch import save as write_safetensors
from torch import Tensor

from flexp import headers, safe
from flexp.errors import ParcelError
from flexp.selection import Where
from flexp.tensors import Tensors

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"
Facts = Mapping[str, JSON]

VERSION = 1
MAX_DEPTH = 32  # of nested facts


# Without ==, because tensors have no single truth value: compare `encode` or `digest`.
@dataclass(frozen=True, eq=False)
class Parcel:
    """What travels or is saved: adapters by slot, loose tensors and facts.

    >>> sent = Parcel({"expert/3": {"w": torch.ones(2)}}, facts={"rows": 12})
    >>> got = decode(encode(sent))
    >>> got.adapters["expert/3"]["w"], got.facts
    (tensor([1., 1.]), {'rows': 12})
    """

    adapters: Mapping[str, Tensors] = field(default_factory=dict[str, Tensors])
    tensors: Tensors = field(default_factory=dict[str, Tensor])
    facts: Facts = field(default_factory=dict[str, JSON])
    far: Mapping[str, Where] = field(default_factory=dict[str, Where])


def encode(parcel: Parcel) -> bytes:
    """The parcel as bytes, always the same for the same content.

    ParcelError for facts that are not finite JSON, other dtypes, and more than a parcel may have.
    """
    meta: dict[str, JSON] = {
        "version": VERSION,
        "facts": plain_facts(parcel.facts),
        "slots": sorted(parcel.adapters),
    }
    # Clones, because safetensors refuses tensors that share memory.
    flat = {key: _at_rest(key, tensor).clone() for key, tensor in _keyed(parcel).items()}
    try:
        note = json.dumps(meta, sort_keys=True, separators=(",", ":"))
        data = write_safetensors(flat, {"flexp": note})
    except (ValueError, SafetensorError) as error:
        raise ParcelError(f"This parcel cannot be encoded: {error}.") from error
    most = headers.PARCEL
    if len(flat) > most.tensors or int.from_bytes(data[:8], "little") > most.header:
        raise ParcelError(
            f"A parcel holds at most {most.tensors} tensors and {most.header} bytes of "
            f"names and facts; this one has {len(flat)} tensors. Send or save it in parts."
        )
    return data


def decode(data: bytes, *, limit: int = safe.MAX_BYTES) -> Parcel:
    """The parcel in ``data``, or a ParcelError and nothing else.

    ``limit`` is the largest accepted size in bytes. Nothing is parsed before it has been checked.
    """
    flat, notes = safe.tensors_in(data, limit=limit)
    if notes.keys() != {"flexp"}:
        raise ParcelError("No FlexP metadata: these are safetensors, but not a parcel.")
    facts, slots = _meta(notes["flexp"])
    adapters: dict[str, Tensors] = {slot: {} for slot in slots}
    loose: Tensors = {}
    for key, tensor in flat.items():
        home, name = _home(key, adapters, loose)
        home[name] = tensor
    return Parcel(adapters, loose, facts)


def save(path: str | Path, parcel: Parcel) -> None:
    """Write the parcel so that after a crash either the old file or the new one is there."""
    write_atomic(path, encode(parcel))


def load(path: str | Path, *, limit: int = safe.MAX_BYTES) -> Parcel:
    """The parcel in that file; ParcelError names the file."""
    try:
        with Path(path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise ParcelError(f"{size} bytes are more than the limit of {limit}.")
            headers.length(file.read(8), size, headers.PARCEL)  # before the rest is read
            file.seek(0)
            return decode(file.read(size), limit=limit)  # room is made for what is asked for
    except OSError as error:
        raise ParcelError(f'"{path}" cannot be read: {error.strerror}. Check the path.') from error
    except ParcelError as error:
        raise ParcelError(f'"{path}" is not a usable parcel: {error}') from error


def file_name(client: str) -> str:
    """A client's id as the name of a file or folder, on any system.

    >>> file_name("carl dee"), file_name("../up"), file_name("..")
    ('carl dee', '..%2Fup', '%2E.')
    """
    name = quote(client, safe=" ()'&,+=@")
    return f"%2E{name[1:]}" if name.startswith(".") and not name.strip(".") else name


def write_atomic(path: str | Path, data: bytes) -> None:
    """Replace the file by ``data`` in one step that survives a crash and a power cut."""
    path = Path(path)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(path)
        except BaseException:
            with suppress(OSError):
                Path(name).unlink()
            raise
        sync(path.parent)
    except OSError as error:
        raise ParcelError(
            f'"{path}" cannot be written: {error.strerror}. Check the folder and its free space.'
        ) from error


def sweep(folder: Path) -> None:
    """Removes what writes that a kill cut short have left in a folder; for its only writer."""
    for left in folder.glob(".*.tmp"):
        if left.is_file():
            left.unlink()


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes; the order of the names does not matter.

    >>> digest({"a": torch.zeros(2)}) == digest({"a": torch.zeros(1, 2)})
    False
    """
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = _at_rest(name, tensors[name])
        line = json.dumps([name, safe.CODES[tensor.dtype], list(tensor.shape)])
        sha.update(line.encode() + b"\n")
        sha.update(safe.flat_bytes(tensor).numpy().tobytes())
    return sha.hexdigest()


def _keyed(parcel: Parcel) -> Tensors:
    """All tensors under the keys that they have in the file."""
    homes = {"tensor/": parcel.tensors}
    for slot, tensors in parcel.adapters.items():
        headers.check_name(slot)
        homes[f"adapter/{quote(slot, safe='')}/"] = tensors
    flat: Tensors = {}
    for prefix, tensors in homes.items():
        for name, tensor in tensors.items():
            if not name:
                raise ParcelError(f'A tensor under "{prefix}" has no name. Name every tensor.')
            headers.check_name(prefix + name)
            flat[prefix + name] = tensor
    return flat


def _home(key: str, adapters: Mapping[str, Tensors], loose: Tensors) -> tuple[Tensors, str]:
    """The dict and the name that a key stands for."""
    kind, _, rest = key.partition("/")
    if kind == "tensor" and rest:
        return loose, rest
    quoted, _, name = rest.partition("/")
    slot = unquote(quoted)
    if kind == "adapter" and name and slot in adapters and quote(slot, safe="") == quoted:
        return adapters[slot], name
    raise ParcelError(f'Tensor "{key:.80}" belongs to no slot of this parcel.')


def _meta(note: str) -> tuple[Facts, list[str]]:
    """Facts and slots of the metadata."""
    found = headers.strict_json(note)
    fields = cast("dict[str, Any]", found) if isinstance(found, dict) else {}
    if {key: type(value) for key, value in fields.items()} != {
        "version": int,
        "facts": dict,
        "slots": list,
    }:
        raise ParcelError("The parcel's metadata is damaged. Ask for the parcel again.")
    if fields["version"] != VERSION:
        raise ParcelError(
            f"The parcel has format {fields['version']}, this program reads {VERSION}. "
            "Install the same version of flexp-sfl on both sides."
        )
    slots = fields["slots"]
    if not all(isinstance(slot, str) for slot in slots) or slots != sorted(set(slots)):
        raise ParcelError("The parcel's slots are not sorted names. Ask for the parcel again.")
    for slot in slots:
        headers.check_name(slot)
    return plain_facts(fields["facts"]), slots


def plain_facts(facts: object) -> Facts:
    """Facts with mappings as dicts and sequences as lists; ParcelError unless finite JSON."""
    return cast("Facts", _plain(facts, "facts"))


def _plain(value: object, where: str, depth: int = 0) -> JSON:
    """The value with mappings as dicts and sequences as lists, if it is finite JSON."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, Mapping | list | tuple) and depth < MAX_DEPTH:
        if not isinstance(value, Mapping):
            items = cast("Sequence[object]", value)
            return [_plain(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(items)]
        pairs = cast("Mapping[object, object]", value)
        if all(isinstance(key, str) for key in pairs):
            return {str(k): _plain(v, f"{where}.{k}", depth + 1) for k, v in pairs.items()}
    raise ParcelError(
        f"{where} is {value!r:.60}. Facts are finite JSON with text keys, "
        f"nested at most {MAX_DEPTH} deep; put arrays into tensors."
    )


def _at_rest(name: str, tensor: Tensor) -> Tensor:
    """The tensor dense on the CPU, without its graph."""
    if tensor.dtype not in safe.CODES or tensor.layout is not torch.strided or tensor.is_meta:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in safe.CODES)
        raise ParcelError(
            f'Tensor "{name}" is {tensor.dtype}, {tensor.layout} on {tensor.device}. '
            f"A parcel holds dense tensors with values, of type {allowed}."
        )
    return tensor.detach().to("cpu").contiguous()


def sync(folder: Path) -> None:
    """Names in a folder survive a power cut from now on."""
    if os.name == "posix":  # elsewhere a folder cannot be opened
        held = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(held)
        finally:
            os.close(held)
