"""Cells of rows as text and labels, or the error that says which row and column to correct.

No error tells what a cell holds, and none lists columns: where a table has no header, its first
row would be what they are called.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence

from flexp.data.formats import Plain, Value
from flexp.data.sources import Row
from flexp.errors import DataError

_INTEGER = re.compile(r"-?[0-9]{1,18}")


def label_names(rows: Sequence[Row], column: str) -> tuple[str, ...]:
    """The labels that occur, in their order."""
    return in_order({label_of(row, column) for row in rows})


def in_order(names: Collection[str]) -> tuple[str, ...]:
    """Names of labels, sorted; integers in the order of numbers.

    >>> in_order({"10", "9", "007", "7"}), in_order({"10", "9", "--1"})
    (('007', '7', '9', '10'), ('--1', '10', '9'))
    """
    if all(is_integer(name) for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))  # 7 and 007 are two
    return tuple(sorted(names))


def cell_of(row: Row, column: str) -> Plain:
    """What a row holds in a column; DataError if there is no such column, or a file in it."""
    value = file_of(row, column)
    if isinstance(value, bytes):
        raise DataError(f'{row.origin}: column "{column}" holds a file. Name another column.')
    return value


def file_of(row: Row, column: str) -> Value:
    """The same where it may be the bytes of a file."""
    if column not in row.fields:
        close = difflib.get_close_matches(column, row.fields, n=1)
        hint = f'Did you mean "{close[0]}"?' if close else f"There are {len(row.fields)} others."
        raise DataError(
            f'{row.origin}: no column "{column}". {hint} Name the right column in the recipe; '
            "in a table the first line names them."
        )
    return row.fields[column]


def text_of(row: Row, column: str, *, empty: bool = False) -> str:
    """The text of a cell; blank text is refused unless ``empty`` is allowed."""
    value = cell_of(row, column)
    if not isinstance(value, str):
        held = "nothing" if value is None else "a number, true or false"
        raise DataError(f'{row.origin}: column "{column}" holds {held}. Write text there.')
    if not empty and not value.strip():
        raise DataError(f'{row.origin}: column "{column}" is empty. Fill it in, or remove the row.')
    return value


def label_of(row: Row, column: str) -> str:
    """The label as text: 1, 1.0 and "1" are one label, as tables write it in each way."""
    value = cell_of(row, column)
    if value is None or value == "":
        raise DataError(f'{row.origin}: no label in column "{column}". Fill it in.')
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def is_integer(label: str) -> bool:
    """Whether the label is a whole number, like ``-1``; one of 19 digits or more is a name."""
    return _INTEGER.fullmatch(label) is not None
