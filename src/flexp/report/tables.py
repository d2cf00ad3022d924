"""Tables and sections, and how numbers are written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flexp.report.markup import Html, tag


@dataclass(frozen=True)
class Formats:
    """How numbers are written for people; given by the caller, for they load torch.

    ``size`` is for bytes, ``score`` for a metric's value, which may be missing.
    """

    size: Callable[[int], str]
    score: Callable[[str, float | None], str]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], **attributes: str) -> Html:
    """A table; a row is a list of cells, and one that is no cell yet becomes a number."""
    head = tag("thead", tag("tr", *(c if isinstance(c, Html) else th(c) for c in columns)))
    body = [
        tag("tr", *(c if isinstance(c, Html) else tag("td", c, class_="n") for c in row))
        for row in rows
    ]
    return tag("div", tag("table", head, tag("tbody", *body), **attributes), class_="wide")


def th(text: str, kind: str | None = "n") -> Html:
    """The name of a column; of numbers unless ``kind`` says otherwise."""
    return tag("th", text, class_=kind, scope="col")


def rowhead(text: str, rows: int = 1) -> Html:
    """The name of one or several rows."""
    return tag("th", text, scope="row" if rows == 1 else "rowgroup", rowspan=str(rows))


def cell(text: str, kind: str | None = None) -> Html:
    """A cell of words."""
    return tag("td", text, class_=kind)


def section(title: str, hint: str, *parts: str) -> Html:
    return tag("section", tag("h2", title), tag("p", hint, class_="hint"), *parts)
