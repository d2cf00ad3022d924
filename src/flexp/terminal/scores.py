"""Scores of several methods side by side: the demos and comparisons."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from flexp.plan.devices import format_bytes
from flexp.terminal.grids import Row, grid, short, value_of
from flexp.terminal.pages import show_voices

COSTS = ("sent_bytes", "received_bytes", "client_flops", "peak_bytes", "simulated_seconds")


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


def show_compare(document: Row, console: Console) -> None:
    """Scores of every method, then what each costs: means over seeds, and their deviations."""
    metric: str = document["metric"]
    higher: bool = document["higher_is_better"]
    found: Row = document["summary"]
    scale = 100 if higher else 1
    lines = [
        [
            label,
            *(_spread(row[name], scale) for name in ("own", "global", "worst_decile")),
        ]
        for label, row in found.items()
    ]
    title = (
        f"{metric.capitalize()} of each client's model on its own test rows, on everybody's, and "
        "of the worst tenth of clients on their own: mean ± deviation over "
        f"{len(document['seeds'])} seeds"
    )
    console.print(grid(title, ["method", "own", "everybody's", "worst tenth"], lines))
    lines = [[label, _gain(row["gain"]), _gain(row["gain_global"])] for label, row in found.items()]
    title = (
        f"Gain over local, client by client, in {'points' if higher else '% lower'}, with its 95 % "
        "interval over clients and seeds"
    )
    if "local" in found:
        gains = [line for line in lines if line[0] != "local"]
        console.print(grid(title, ["method", "own", "everybody's"], gains))
    lines = [[label, *_costs(row)] for label, row in found.items()]
    heads = ["method", "sent", "received", "client GFLOP", "peak memory", "time"]
    title = (
        "What a run costs: bytes and operations of all clients together, the largest client's "
        "memory, and the simulated clock's seconds on the declared devices"
    )
    console.print(grid(title, heads, lines))
    for label, why in document["refused"].items():
        console.print(f"{label}: {why}", highlight=False, markup=False)
    if any(row["sent_bytes"] is None for row in found.values()):
        text = "Blank costs: not federated; all rows lie in one place."
        console.print(text, highlight=False, markup=False)
    if all(row["simulated_seconds"] is None for row in found.values()):
        text = "No time: declare gflops, up_mbit and down_mbit of devices, and of plan.server."
        console.print(text, highlight=False, markup=False)
    text = f"Rows of every client: {document['out']}/comparison.json"
    console.print(text, highlight=False, markup=False)


def _spread(held: Row | None, scale: float) -> str:
    if held is None:
        return ""
    mean, deviation = scale * held["mean"], held["deviation"]
    return _three(mean) if deviation is None else f"{_three(mean)} ±{scale * deviation:.1f}"


def _gain(held: Row | None) -> str:
    if held is None:
        return ""
    mean, low, high = (100 * held[name] for name in ("mean", "low", "high"))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def _costs(row: Row) -> list[str]:
    values = [None if row[k] is None else row[k]["mean"] for k in COSTS]
    sent, received, flops, peak, seconds = values
    return [
        *("" if size is None else format_bytes(int(size)) for size in (sent, received)),
        "" if flops is None else f"{flops / 1e9:,.1f}",
        "" if peak is None else format_bytes(int(peak)),
        "" if seconds is None else f"{seconds:,.0f} s",
    ]
