"""Cells of rows as text and labels, or the error that says which row and column to correct."""

from __future__ import annotations

import re
from collections.abc import Sequence

from flexp.data.sources import Row
from flexp.errors import DataError, nearest

_INTEGER = re.compile(r"-?\d+")


def label_names(rows: Sequence[Row], column: str) -> tuple[str, ...]:
    """The labels that occur, sorted; integers in the order of numbers."""
    names = {label_of(row, column) for row in rows}
    if all(is_integer(name) for name in names):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))


def _cell(row: Row, column: str) -> object:
    if column not in row.fields:
        raise DataError(
            f'{row.origin}: no column "{column}". {nearest(column, row.fields)} '
            "Name the right column in the recipe."
        )
    return row.fields[column]


def text_of(row: Row, column: str, *, empty: bool = False) -> str:
    """The text of a cell; blank text is refused unless ``empty`` is allowed."""
    value = _cell(row, column)
    if not isinstance(value, str):
        held = "nothing" if value is None else f"{value!r}, which is not text"
        raise DataError(f'{row.origin}: column "{column}" holds {held}. Write text there.')
    if not empty and not value.strip():
        raise DataError(f'{row.origin}: column "{column}" is empty. Fill it in, or remove the row.')
    return value


def label_of(row: Row, column: str) -> str:
    """The label as text: 1, 1.0 and "1" are one label, as tables write it in each way."""
    value = _cell(row, column)
    if value is None or value == "":
        raise DataError(f'{row.origin}: no label in column "{column}". Fill it in.')
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def is_integer(label: str) -> bool:
    """Whether the label is a whole number, like ``-1``."""
    return _INTEGER.fullmatch(label) is not None
