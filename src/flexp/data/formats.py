"""File formats: bytes to numbered records, strictly; refusals name the place, never what is there.

A file is read as a stream, so what is refused is never held, and neither records nor refusals
depend on how many bytes are read at once. `lines` says how places are counted.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, cast

from flexp.data.lines import CHUNK, LONGEST, Line, Source, lines_of, opened, place
from flexp.errors import DataError, nearest

Plain = str | int | float | bool | None
Value = Plain | bytes  # of a file, as an image
Record = tuple[int, dict[str, Value]]  # number of the line or row, fields

_BLANK = re.compile(r"[ \t\r\n]*")


class _BrokenLineError(ValueError):
    """A line of JSON that is refused, with the position of the character that is at fault."""

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(reason)
        self.position = position


class _ConstantError(ValueError):
    """NaN or an infinity, which the json module would take."""


def jsonl(source: Source) -> Iterator[Record]:
    """One flat JSON object a line; empty lines are skipped."""
    for line in lines_of(source):
        text = line.text.removesuffix("\n").removesuffix("\r")
        if _skip(text, 0) == len(text):
            continue
        try:
            fields = _object(text)
        except _BrokenLineError as broken:
            at = place(source.where, line.number, line.offset, line.byte(broken.position))
            raise DataError(f"{at}: {broken}. Correct the line, or remove it.") from None
        yield line.number, fields


def texts(source: Source) -> Iterator[Record]:
    """Plain text: one example a line, in the column ``text``; empty lines are skipped."""
    for line in lines_of(source):
        text = line.text.removesuffix("\n").removesuffix("\r")
        if text.strip():
            yield line.number, {"text": text}


def commas(source: Source) -> Iterator[Record]:
    """A csv file with a header; every field stays text, so that ``007`` is not 7."""
    return _table(source, ",")


def tabs(source: Source) -> Iterator[Record]:
    """A tsv file with a header, quoted like csv."""
    return _table(source, "\t")


def parquet(source: Source) -> Iterator[Record]:
    """A parquet file of flat columns; needs the extra ``data``."""
    with extra("pyarrow"):
        import pyarrow as pa
        from pyarrow import parquet as written
    arrow, files = cast("Any", pa), cast("Any", written)  # without type stubs
    where = source.where
    try:
        with files.ParquetFile(source.file) as file:
            _distinct(where, list(file.schema_arrow.names))
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            for number, fields in enumerate(rows, start=1):
                yield number, flat(f"{where}, row {number}", fields)
    except (OSError, ValueError, arrow.ArrowException) as broken:
        raise DataError(
            f"{where}: not a parquet file that can be read ({type(broken).__name__}). "
            "Write it again."
        ) from broken


READERS: Mapping[str, Callable[[Source], Iterator[Record]]] = MappingProxyType(
    {".jsonl": jsonl, ".csv": commas, ".tsv": tabs, ".parquet": parquet, ".txt": texts}
)


def records(path: Path, *, chunk: int = CHUNK) -> Iterator[Record]:
    """The records of a file by the end of its name; DataError for a file that is not sound."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f'{path.as_posix()}: "{path.suffix}" is not a data format. '
            f"{nearest(path.suffix, READERS)} Convert the file, or move it elsewhere."
        )
    with opened(path, chunk) as source:
        yield from reader(source)


def is_saved(folder: Path) -> bool:
    """Whether the folder was written by ``save_to_disk`` of the datasets library."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def saved(folder: Path) -> Iterator[tuple[str | None, Record]]:
    """Split (None for a data set without splits) and record of a data set saved on disk."""
    with extra("datasets"):
        import datasets
    library = cast("Any", datasets)  # its types are partly unknown
    try:
        opened = library.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as broken:
        raise DataError(
            f"{folder.as_posix()}: not a data set that can be opened ({type(broken).__name__}). "
            "Save it again with save_to_disk."
        ) from broken
    splits: dict[str | None, Any] = (
        dict(opened) if isinstance(opened, library.DatasetDict) else {None: opened}
    )
    for split, found in splits.items():
        rows = found
        for column, feature in dict(found.features).items():
            if isinstance(feature, library.Image):  # or it would be decoded
                rows = rows.cast_column(column, library.Image(decode=False))
        where = folder.as_posix() if split is None else f"{folder.as_posix()}/{split}"
        for number, fields in enumerate(rows.with_format(None), start=1):
            yield split, (number, flat(f"{where}, row {number}", fields))


def flat(where: str, fields: Mapping[str, object]) -> dict[str, Value]:
    """The fields, when each is text, a number, true, false, null, or the bytes of a file.

    An image of the datasets library is its bytes, or else its path.
    """
    fields = {name: _filed(value) for name, value in fields.items()}
    for name, value in fields.items():
        if not (value is None or isinstance(value, str | int | float | bytes)):
            raise DataError(
                f'{where}: column "{name}" holds a {type(value).__name__}; only text, numbers, '
                "true, false and null can be used. Flatten the column, or remove it."
            )
    return cast("dict[str, Value]", dict(fields))


def _filed(value: object) -> object:
    held = cast("dict[str, object]", value) if isinstance(value, dict) else {}
    if held.keys() != {"bytes", "path"}:
        return cast("object", value)
    return held["path"] if held["bytes"] is None else held["bytes"]


class _Feed:
    """Lines for the csv module, and the one at which the record began that it is reading."""

    def __init__(self, source: Source) -> None:
        self._source, self._lines = source, lines_of(source)
        self.first: Line | None = None  # of the record; None between two records

    def __iter__(self) -> Iterator[str]:
        for line in self._lines:
            self.first = self.first or line
            if line.offset - self.first.offset > LONGEST:
                raise DataError(
                    f"{self.place()}: a record of more than {LONGEST} bytes. "
                    "Check the quotes of this record, or split it."
                )
            yield line.text

    def place(self) -> str:
        """The line at which the record began."""
        first = self.first or Line(1, 0, "")
        return place(self._source.where, first.number, first.offset)


def _table(source: Source, delimiter: str) -> Iterator[Record]:
    feed = _Feed(source)
    reader = csv.reader(iter(feed), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    try:
        for cells in reader:
            if not cells:
                pass
            elif header is None:
                header = cells
                _distinct(feed.place(), header)
            elif len(cells) != len(header):
                raise DataError(
                    f"{feed.place()}: {len(cells)} fields, but the header has {len(header)}. "
                    "Correct the line, or quote the field that holds a separator."
                )
            elif feed.first:
                yield feed.first.number, dict(zip(header, cells, strict=True))
            feed.first = None
    except csv.Error as broken:
        # The module would have the file opened in another way.
        bare = "new-line" in str(broken)
        reason = "a carriage return that neither ends the line nor is quoted" if bare else broken
        raise DataError(f"{feed.place()}: {reason}. Check the quotes of this record.") from broken


def _distinct(where: str, names: list[str]) -> None:
    """Refuse a header with an empty name, or one name twice; it may be a row, so none is told."""
    first: dict[str, int] = {}
    for at, name in enumerate(names, start=1):
        if not name:
            raise DataError(f"{where}: column {at} has no name. Give every column one of its own.")
        if first.setdefault(name, at) != at:
            raise DataError(
                f"{where}: columns {first[name]} and {at} have the same name. Give every column "
                "one of its own; the first line names them."
            )


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
            raise _BrokenLineError(name_at, "this field name is there twice")
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
    except _ConstantError as broken:
        raise _BrokenLineError(at, str(broken)) from None
    except ValueError:
        raise _BrokenLineError(at, "an integer with too many digits") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise _BrokenLineError(at, "a number too large for a float")
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise _BrokenLineError(at, "half a surrogate pair, which is not text")
    return value, end


def _skip(line: str, at: int) -> int:
    found = _BLANK.match(line, at)
    return found.end() if found else at


def _constant(name: str) -> NoReturn:
    raise _ConstantError(f"{name} is not JSON; write null for a value that is missing")


_DECODER = json.JSONDecoder(parse_constant=_constant)


@contextmanager
def extra(library: str, name: str = "data") -> Generator[None]:
    """Imports of an optional library; a missing one names the extra that brings it."""
    try:
        yield
    except ImportError as missing:
        raise DataError(
            f'Reading this data needs {library}. Install it: pip install "flexp-sfl[{name}]"'
        ) from missing
