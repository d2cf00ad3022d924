"""A model's folder as a list of tensors: where each lies, its digest, and the digest of them all.

Two folders with the same digest hold the same model, however its tensors are spread over files. A
device that needs a few blocks fetches their tensors only, one file each, and checks every one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, cast

from flexp.errors import ModelError, ParcelError
from flexp.headers import INDEX, Table, check_name, is_file_name, of_model, strict_json
from flexp.parcel import write_atomic

# Config and tokenizer; whatever else lies in a folder is nobody's business.
SMALL = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.jinja",
)
_STEP = 1 << 22
# What reading a list of another shape than ours can raise.
_DAMAGE = (ParcelError, KeyError, TypeError, ValueError, AttributeError, OverflowError)


@dataclass(frozen=True)
class Piece:
    """One tensor of a model: type, shape, digest of its bytes, and where these are in a file."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str
    file: str
    begin: int
    end: int

    def same(self, other: Piece) -> bool:
        """Whether two pieces are the same tensor."""
        mine, theirs = (self.dtype, self.shape, self.sha256), (other.dtype, other.shape)
        return mine == (*theirs, other.sha256)


@dataclass(frozen=True)
class Manifest:
    """All tensors of a model, its small files with their digests, and its config's digest."""

    pieces: Mapping[str, Piece]
    small: Mapping[str, tuple[int, str]]
    config: str

    @property
    def digest(self) -> str:
        """SHA-256 over the config and all tensors by name; where they lie does not matter."""
        rows = {n: [p.dtype, list(p.shape), p.sha256] for n, p in self.pieces.items()}
        return _sha256(json.dumps([self.config, rows], sort_keys=True).encode())

    def to_json(self) -> str:
        """This manifest as text."""
        pieces = {
            n: [p.dtype, list(p.shape), p.sha256, p.file, p.begin, p.end]
            for n, p in self.pieces.items()
        }
        plain = {"pieces": pieces, "small": dict(self.small), "config": self.config}
        return json.dumps(plain, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """The manifest in a text that another machine sent; ModelError if it is none."""
        try:
            plain = strict_json(text)
            pieces = {
                str(name): Piece(
                    str(t), tuple(map(int, shape)), str(sha), str(file), int(a), int(b)
                )
                for name, (t, shape, sha, file, a, b) in plain["pieces"].items()
            }
            small = {str(n): (int(size), str(sha)) for n, (size, sha) in plain["small"].items()}
            found = cls(pieces, small, str(plain["config"]))
            for name, piece in pieces.items():
                check_name(name)
                if not 0 <= piece.begin <= piece.end:
                    raise ValueError(f'"{name:.80}" ends before it begins')
        except _DAMAGE as problem:
            raise ModelError(f"The list of the model's tensors is damaged: {problem}") from problem
        for name in (*small, *(p.file for p in pieces.values())):
            if not is_file_name(name):
                raise ModelError(f"{name!r:.80} is not the name of a file in a model's folder.")
        return found


def manifest(folder: Path) -> Manifest:
    """Reads every tensor of a folder once; ModelError if a file is none."""
    config = _plain_config(folder)
    pieces: dict[str, Piece] = {}
    for path, table in tables(folder).items():
        with path.open("rb") as file:
            for name, span in table.spans.items():
                begin, end = table.start + span.begin, table.start + span.end
                file.seek(begin)
                sha, left = hashlib.sha256(), end - begin
                while left and (data := file.read(min(_STEP, left))):
                    sha.update(data)
                    left -= len(data)
                digest = sha.hexdigest()
                pieces[name] = Piece(span.dtype, span.shape, digest, path.name, begin, end)
    small = {
        path.name: (path.stat().st_size, _sha256(path.read_bytes()))
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != INDEX and any(fnmatch(path.name, p) for p in SMALL)
    }
    return Manifest(dict(sorted(pieces.items())), small, config)


def tables(folder: Path) -> dict[Path, Table]:
    """The checked headers of a model's files; ModelError if one is odd."""
    try:
        return of_model(folder)
    except ParcelError as problem:
        raise ModelError(f"The weights in {folder} cannot be opened: {problem}") from problem


def check_config(text: str) -> None:
    """ModelError for a config, sent by another machine, that asks for code or inner settings."""
    try:
        plain: Any = strict_json(text)
    except ParcelError as problem:
        raise ModelError(f"The server's config.json is damaged: {problem}") from problem
    held = cast("dict[str, Any]", plain) if isinstance(plain, dict) else {"": None}
    odd = [k for k in held if k == "auto_map" or (k.startswith("_") and k != "_name_or_path")]
    if odd or "" in held:
        raise ModelError(
            f"The server's config.json sets {', '.join(odd) or 'nothing'}: a model that brings "
            "code or inner settings is not taken from another machine. Load it with --model."
        )


def wanted(names: Iterable[str], absent: Iterable[str]) -> list[str]:
    """Those of a model's tensors that are not in the modules at these paths.

    A checkpoint of the bare base model leaves out the prefix of its head's class, so a module is
    known by the end of its path from the first dot on as well.
    """
    stems = [stem for path in absent for stem in (path, path.partition(".")[2]) if stem]
    marks = tuple(f"{stem}." for stem in stems)
    return [n for n in names if not n.startswith(marks)]


def read_part(folder: Path, listed: Manifest, path: str, begin: int, size: int) -> bytes:
    """Some bytes of a file that is listed, or without a path of the list itself, after its length.

    ModelError for any other file.
    """
    begin = max(0, begin)
    if not path:
        text = listed.to_json().encode()
        return (len(text).to_bytes(8, "little") + text)[begin : begin + size]
    if path not in {*listed.small, *(piece.file for piece in listed.pieces.values())}:
        raise ModelError(f'There is no file "{path}" in the model.')
    with (folder / path).open("rb") as file:
        file.seek(begin)
        return file.read(size)


def head_of(name: str, piece: Piece) -> bytes:
    """What stands before a tensor's bytes in a file of its own."""
    row = {"dtype": piece.dtype, "shape": piece.shape, "data_offsets": [0, piece.end - piece.begin]}
    text = json.dumps({name: row, "__metadata__": {"format": "pt"}}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def file_of(name: str) -> str:
    """The file of one tensor in a folder that holds a part of a model."""
    return f"tensor-{hashlib.sha256(name.encode()).hexdigest()[:24]}.safetensors"


def write_index(folder: Path, names: Iterable[str]) -> None:
    """Lists the tensors that a folder holds, each in a file of its own."""
    listed = {name: file_of(name) for name in sorted(names)}
    plain = {"metadata": {}, "weight_map": listed}
    write_atomic(folder / INDEX, json.dumps(plain, indent=1).encode())


def _plain_config(folder: Path) -> str:
    """The digest of what the config says, not of how it is laid out."""
    try:
        plain = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise ModelError(f"{folder} has no config.json that can be read: {problem}") from problem
    return _sha256(json.dumps(plain, sort_keys=True).encode())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
