"""What `flexp bench` shows: numbers beside their targets and limits."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from flexp.terminal.grids import BLANK, Row, grid


def show_benchmarks(rows: Sequence[Row], console: Console) -> None:
    """Names, and what each measures."""
    lines = [[row["name"], row["what"]] for row in rows]
    console.print(grid("flexp bench NAME", ["name", "what it measures"], lines))


def show_bench(document: Row, console: Console) -> None:
    """The machine, and every row."""
    rows = document["rows"]
    if rows:
        machine = rows[0]["machine"]
        speeds = ", ".join(
            f"{way} {shown(speed, 'GFLOP/s')}" for way, speed in machine["gemm_gflops"].items()
        )
        told = f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}"
        console.print(f"{told}\nOne thread multiplies: {speeds}", highlight=False, markup=False)
    lines = [
        [
            row["name"],
            shown(row["value"], row["unit"]),
            aim(row),
            shown(row["floor"], row["unit"]),
            verdict(row),
        ]
        for row in rows
    ]
    columns = ["", "measured", "target", "limit", ""]
    console.print(grid(document["job"], columns, lines))
    for row in rows:
        gate = row["details"].get("gate")
        if gate is not None and not gate["holds"]:
            wrong = f"{row['name']}: not right: {gate['what']}: {gate['value']:.3g}"
            console.print(wrong, highlight=False, markup=False)
    if any(row["ok"] is None and row["target"] is not None for row in rows):
        note = "The targets are for another kind of processor, so nothing is said of them here."
        console.print(note, highlight=False)


def shown(value: float | None, unit: str) -> str:
    """A number with its unit; blank if there is none."""
    if value is None:
        return BLANK
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f} {unit}"


def aim(row: Row) -> str:
    """The target, and from which side it is reached."""
    if row["target"] is None:
        return BLANK
    side = "≥" if row["better"] == "higher" else "≤"
    return f"{side} {shown(row['target'], row['unit'])}"


def verdict(row: Row) -> str:
    """Whether the target is reached; blank where nothing is said."""
    return BLANK if row["ok"] is None else "reached" if row["ok"] else "short"
