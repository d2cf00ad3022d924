"""File formats: bytes on disk to numbered records, strictly; refusals name file, line and byte.

Lines, bytes and rows count from 1; a byte counts within its line, as an editor's column does.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, cast

from flexp.errors import DataError

Value = str | int | float | bool | None
Record = tuple[int, dict[str, Value]]  # number of the line or row, fields

_BOM = b"\xef\xbb\xbf"
_BLANK = re.compile(r"[ \t\r\n]*")


class _BrokenLineError(ValueError):
    """A line of JSON that is refused, with the position of the character that is at fault."""

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(reason)
        self.position = position


def jsonl(path: Path) -> Iterator[Record]:
    """One flat JSON object a line; empty lines are skipped."""
    text, bom = _decode(path)
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = _object(line)
        except _BrokenLineError as broken:
            byte = len(line[: broken.position].encode()) + 1 + (bom if number == 1 else 0)
            raise DataError(
                f"{path.as_posix()}, line {number}, byte {byte}: {broken}. "
                "Correct the line, or remove it."
            ) from None
        yield number, fields


def lines(path: Path) -> Iterator[Record]:
    """Plain text: one example a line, in the column ``text``; empty lines are skipped."""
    text, _ = _decode(path)
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, {"text": line.removesuffix("\r")}


def commas(path: Path) -> Iterator[Record]:
    """A csv file with a header; every field stays text, so that ``007`` is not 7."""
    return _table(path, ",")


def tabs(path: Path) -> Iterator[Record]:
    """A tsv file with a header, quoted like csv."""
    return _table(path, "\t")


def parquet(path: Path) -> Iterator[Record]:
    """A parquet file of flat columns; needs the extra ``data``."""
    with _extra("pyarrow"):
        import pyarrow as pa
        from pyarrow import parquet as written
    arrow, files = cast("Any", pa), cast("Any", written)  # without type stubs
    try:
        with files.ParquetFile(path) as file:
            _distinct(path.as_posix(), list(file.schema_arrow.names))
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            for number, fields in enumerate(rows, start=1):
                yield number, flat(f"{path.as_posix()}, row {number}", fields)
    except (OSError, arrow.ArrowException) as broken:
        raise DataError(
            f"{path.as_posix()}: not a parquet file that can be read ({broken}). Write it again."
        ) from broken


def is_saved(folder: Path) -> bool:
    """Whether the folder was written by ``save_to_disk`` of the datasets library."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def saved(folder: Path) -> Iterator[tuple[str | None, Record]]:
    """Split (None for a data set without splits) and record of a data set saved on disk."""
    with _extra("datasets"):
        import datasets
    library = cast("Any", datasets)  # its types are partly unknown
    try:
        opened = library.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as broken:
        raise DataError(
            f"{folder.as_posix()}: not a data set that can be opened ({broken}). "
            "Save it again with save_to_disk."
        ) from broken
    splits: dict[str | None, Any] = (
        dict(opened) if isinstance(opened, library.DatasetDict) else {None: opened}
    )
    for split, rows in splits.items():
        where = folder.as_posix() if split is None else f"{folder.as_posix()}/{split}"
        for number, fields in enumerate(rows.with_format(None), start=1):
            yield split, (number, flat(f"{where}, row {number}", fields))


READERS: Mapping[str, Callable[[Path], Iterator[Record]]] = MappingProxyType(
    {".jsonl": jsonl, ".csv": commas, ".tsv": tabs, ".parquet": parquet, ".txt": lines}
)


def flat(where: str, fields: Mapping[str, object]) -> dict[str, Value]:
    """The fields, when each is text, a number, true, false or null."""
    for name, value in fields.items():
        if not (value is None or isinstance(value, str | int | float)):
            raise DataError(
                f'{where}: column "{name}" holds a {type(value).__name__}; only text, numbers, '
                "true, false and null can be used. Flatten the column, or remove it."
            )
    return cast("dict[str, Value]", dict(fields))


def _decode(path: Path) -> tuple[str, int]:
    """Text of a UTF-8 file without its byte order mark, and the length of that mark."""
    try:
        data = path.read_bytes()
    except OSError as broken:
        reason = broken.strerror or str(broken)
        raise DataError(f"{path.as_posix()}: cannot be read ({reason}).") from broken
    bom = len(_BOM) if data.startswith(_BOM) else 0
    try:
        return data[bom:].decode(), bom
    except UnicodeDecodeError as broken:
        at = broken.start + bom
        line, byte = data.count(b"\n", 0, at) + 1, at - data.rfind(b"\n", 0, at)
        raise DataError(
            f"{path.as_posix()}, line {line}, byte {byte}: not UTF-8. Save the file as UTF-8."
        ) from broken


def _table(path: Path, delimiter: str) -> Iterator[Record]:
    text, _ = _decode(path)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            where = f"{path.as_posix()}, line {line}"
            if not cells:
                pass
            elif header is None:
                header = cells
                _distinct(where, header)
            elif len(cells) != len(header):
                raise DataError(
                    f"{where}: {len(cells)} fields, but the header has {len(header)}. "
                    "Correct the line, or quote the field that holds a separator."
                )
            else:
                yield line, dict(zip(header, cells, strict=True))
            line = reader.line_num + 1
    except csv.Error as broken:
        raise DataError(
            f"{path.as_posix()}, line {line}: {broken}. Check the quotes of this record."
        ) from broken


def _distinct(where: str, names: list[str]) -> None:
    """Refuse a header with an empty name, or with one name twice."""
    for at, name in enumerate(names):
        if not name or name in names[:at]:
            what = f'column "{name}" is there twice' if name else f"column {at + 1} has no name"
            raise DataError(f"{where}: {what}. Give every column a name of its own.")


def _object(line: str) -> dict[str, Value]:
    """The flat object that a line holds; the json module alone cannot say where a key repeats."""
    fields: dict[str, Value] = {}
    at = _skip(line, 0)
    if not line.startswith("{", at):
        raise _BrokenLineError(at, 'not an object like {"text": "..."}')
    while True:
        name_at = _skip(line, at + 1)
        if not line.startswith('"', name_at):
            raise _BrokenLineError(name_at, "a field name in double quotes is missing")
        name, at = _value(line, name_at)
        if name in fields:
            raise _BrokenLineError(name_at, f'field "{name}" is there twice')
        at = _skip(line, at)
        if not line.startswith(":", at):
            raise _BrokenLineError(at, "a colon after the field name is missing")
        fields[str(name)], at = _value(line, _skip(line, at + 1))
        at = _skip(line, at)
        if line.startswith("}", at):
            break
        if not line.startswith(",", at):
            raise _BrokenLineError(at, "a comma or a closing brace is missing")
    rest = _skip(line, at + 1)
    if rest == len(line):
        return fields
    raise _BrokenLineError(rest, "more text after the object")


def _value(line: str, at: int) -> tuple[Value, int]:
    """The scalar at this position, and the position after it."""
    if line.startswith(("{", "["), at):
        raise _BrokenLineError(at, "a nested value; only text, numbers, true, false, null are read")
    try:
        value, end = _DECODER.raw_decode(line, at)
    except json.JSONDecodeError as broken:
        raise _BrokenLineError(broken.pos, broken.msg) from None
    except ValueError as broken:
        raise _BrokenLineError(at, str(broken)) from None
    if isinstance(value, float) and not math.isfinite(value):
        raise _BrokenLineError(at, "a number too large for a float")
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise _BrokenLineError(at, "half a surrogate pair, which is not text")
    return value, end


def _skip(line: str, at: int) -> int:
    found = _BLANK.match(line, at)
    return found.end() if found else at


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON; write null for a value that is missing")


_DECODER = json.JSONDecoder(parse_constant=_constant)


@contextmanager
def _extra(library: str) -> Generator[None]:
    """Imports of an optional library; a missing one names the extra that brings it."""
    try:
        yield
    except ImportError as missing:
        raise DataError(
            f'Reading this data needs {library}. Install it: pip install "flexp-sfl[data]"'
        ) from missing
