"""Scores of several methods side by side: the demos and comparisons."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from flexp.plan.devices import format_bytes
from flexp.terminal.grids import Row, grid, short, value_of
from flexp.terminal.pages import show_voices


def show_demo(document: Row, console: Console) -> None:
    """Devices, cuts, memory, bytes, and own and global scores of every method."""
    methods: list[str] = document["methods"]
    rows: list[Row] = document["rows"]
    metric: str = document["metric"]
    wide = console.width >= 100
    lines: list[list[str]] = []
    for seat in document["seats"]:
        line = [
            short(seat["client"]),
            *([seat["about"], seat["device"]] if wide else []),
            f"{seat['front']}|{seat['server_blocks']}|{seat['back']}",
            format_bytes(seat["bytes"]),
            format_bytes(seat["sent"] + seat["received"]),
        ]
        lines.append(line + _pairs(rows, methods, seat["client"], metric))
    lines.append(["mean", *[""] * (5 if wide else 3), *_pairs(rows, methods, "all", metric)])
    columns = ["client", *(["data", "device"] if wide else []), "cut", "memory", "bytes", *methods]
    title = (
        f"{metric.capitalize()} of each client's model: own test texts / everybody's. "
        "Cut: blocks at the device's front | at the server | at its back"
    )
    console.print(grid(title, columns, lines))
    if "prompt" in document:
        console.print(document["prompt"], highlight=False, markup=False)
        show_voices(document["voices"], console)
        show_leak(document, console)
    for line in document["says"]:
        console.print(line, highlight=False, markup=False)


def _three(value: float) -> str:
    """Three or four digits, which is what a table has room for."""
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def show_leak(document: Row, console: Console) -> None:
    """What left one client's device, and what the demo's attacker makes of it."""
    leak: Row = document["leak"]
    seat = next(seat for seat in document["seats"] if seat["client"] == leak["client"])
    kinds = ", ".join(f"{kind} {format_bytes(size)}" for kind, size in seat["left"].items())
    name = short(leak["client"])
    for line in (
        f"What left {name}'s device under flexp: {kinds}.",
        f"A server that attacks recovers {100 * leak['rate']:.0f} % of the tokens of a speech from "
        f"the hidden states after block {leak['front']}:",
        f"  spoken:    {' '.join(leak['said'].split())}",
        f"  recovered: {' '.join(leak['recovered'].split())}",
    ):
        console.print(line, highlight=False, markup=False)


def _pairs(rows: Sequence[Row], methods: Sequence[str], client: str, metric: str) -> list[str]:
    out: list[str] = []
    for method in methods:
        mine = [row for row in rows if row["method"] == method]
        pair = [value_of(mine, client, data, metric) for data in ("own", "global")]
        scale = 100 if metric == "accuracy" else 1
        out.append("/".join(_three(scale * v) if v is not None else "–" for v in pair))
    return out
