"""A table that fits any terminal, and numbers and names as it shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table

Row = Mapping[str, Any]
BLANK = ""


def grid(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Group:
    """A title and a plain table, readable at 80 columns; columns of numbers are right-aligned."""
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    out.padding = (0, 0)
    for n, column in enumerate(columns):
        numeric = any(row[n] for row in rows) and all(_numeric(row[n]) for row in rows)
        out.add_column(column, justify="right" if numeric else "left")
    for row in rows:
        out.add_row(*row)
    return Group(escape(title), out)


def _numeric(text: str) -> bool:
    words = text.split(" ")
    return not text or words[0].replace(".", "", 1).lstrip("+-").isdigit()


def shown(metric: str, value: float | None) -> str:
    """A metric as people read it; blank if it was not measured."""
    if value is None:
        return BLANK
    return f"{100 * value:.1f} %" if metric == "accuracy" else f"{value:.3f}"


def value_of(rows: Sequence[Row], client: str, data: str, metric: str) -> float | None:
    """A metric of a client's personal model after training, or None if it was not measured."""
    for row in rows:
        if (row["client"], row["cell"], row["metric"]) == (
            client,
            f"personal/{data}/after",
            metric,
        ):
            return None if row["value"] is None else float(row["value"])
    return None


def codes(document: Row) -> str:
    """What a model's linear maps hold, behind a comma; blank if they are as in the checkpoint."""
    return BLANK if document["quantize"] == "none" else f", {document['quantize']} linear maps"


def short(client: str) -> str:
    """A client's name without what stands in brackets behind it."""
    return client.partition(" (")[0] or client
