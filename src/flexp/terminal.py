"""What a person reads in a terminal when a command is done: tables, from documents alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from flexp.plan.devices import format_bytes

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
            return float(row["value"])
    return None


def show_run(document: Row, console: Console) -> None:
    """Own and global scores per client, and where everything was written."""
    rows: list[Row] = document["rows"]
    metric = rows[0]["metric"] if rows else "accuracy"
    clients = list(dict.fromkeys(row["client"] for row in rows))
    lines = [
        [
            client,
            *(shown(metric, value_of(rows, client, data, metric)) for data in ("own", "global")),
        ]
        for client in clients
    ]
    title = f"{document['method']}: {metric} of each personal model on its own and on all test data"
    console.print(grid(title, ["client", "own", "global"], lines))
    console.print(f"Results, events and checkpoints: {document['out']}", highlight=False)
    if document["adapters"]:
        console.print(f"PEFT adapters: {document['out']}/adapters", highlight=False)


def show_plan(document: Row, console: Console) -> None:
    """Blocks and bytes of every client."""
    lines: list[list[str]] = []
    for seat in document["seats"]:
        held: Mapping[str, int] = seat["bytes"]
        training = held["total"] - held["weights"]
        lines.append(
            [
                seat["client"],
                seat["device"],
                f"{seat['front']} | {seat['server_blocks']} | {seat['back']}",
                format_bytes(held["weights"]),
                format_bytes(training),
                format_bytes(held["total"]),
            ]
        )
    columns = ["client", "device", "front|server|back", "weights", "training", "total"]
    title = f"{document['model']}, {document['blocks']} blocks: what runs on each device"
    console.print(grid(title, columns, lines))
    for reason in dict.fromkeys(f"{s['device']}: {s['reason']}" for s in document["seats"]):
        console.print(reason, highlight=False)


BAR = 30  # columns of a bar of blocks


def bar(front: int, server: int, back: int) -> str:
    """Blocks as a bar: full at the device, light at the server, half-tone at the device's back."""
    scale = max(1.0, (front + server + back) / BAR)
    f, b = (round(n / scale) if n > scale else min(n, 1) for n in (front, back))
    return "█" * f + "░" * max(0, round((front + server + back) / scale) - f - b) + "▓" * b


def show_fleet(document: Row, console: Console) -> None:
    """Every client's device, its blocks as a bar, and the memory that they take there."""
    lines = [
        [
            short(seat["client"]),
            seat["device"],
            bar(seat["front"], seat["server_blocks"], seat["back"]),
            format_bytes(seat["bytes"]["total"]),
        ]
        for seat in document["seats"]
    ]
    title = (
        f"{document['model']}, {document['blocks']} blocks, {document['dtype']}: "
        "█ front and ▓ back on the device, ░ at the server"
    )
    console.print(grid(title, ["client", "device", "blocks", "memory"], lines))


def short(client: str) -> str:
    """A client's name without what stands in brackets behind it."""
    return client.partition(" (")[0] or client


def show_voices(said: Mapping[str, str], console: Console) -> None:
    """What everybody says to one text, side by side."""
    table = Table(box=box.SIMPLE_HEAD, expand=True)
    for name in said:
        table.add_column(escape(short(name)), ratio=1)
    table.add_row(*(escape(text) for text in said.values()))
    console.print(table)


def show_export(document: Row, console: Console) -> None:
    """Which files were written, and how to open them."""
    what = "the model with the adapter merged" if document["merged"] else "a PEFT adapter"
    console.print(f"{document['out']}: {what}", highlight=False)
    for name, size in document["files"].items():
        console.print(f"  {name}  {format_bytes(size)}", highlight=False)


def show_predictions(document: Row, console: Console) -> None:
    """One line per text; what a language model says, under it."""
    console.print(document["adapter"], highlight=False, markup=False)
    found: list[Row] = document["predictions"]
    for each in found:
        if "label" not in each:
            console.print(each["text"], highlight=False, markup=False)
            show_voices({"base": each["base"], "adapter": each["adapter"]}, console)
    lines = [
        [p["text"], p["label"], f"{100 * max(p['probabilities'].values()):.1f} %"]
        for p in found
        if "label" in p
    ]
    if lines:
        console.print(grid("", ["text", "label", "probability"], lines))


def show_doctor(document: Row, console: Console) -> None:
    """Facts, then clients and findings if a recipe was given."""
    lines = [[name, version] for name, version in document["facts"].items()]
    lines += [
        ["free memory", format_bytes(document["memory_bytes"])],
        ["threads", str(document["threads"])],
        ["CUDA", "yes" if document["cuda"] else "no"],
        ["bfloat16", "yes" if document["bfloat16"] else "no"],
        ["assets here", ", ".join(document["assets"]) or "none"],
    ]
    console.print(grid("This machine", ["what", "value"], lines))
    if "clients" not in document:
        return
    names = list(document["clients"][0]["labels"])
    rows = [
        [
            c["client"],
            str(c["train"]),
            str(c["val"]),
            str(c["test"]),
            *map(str, c["labels"].values()),
        ]
        for c in document["clients"]
    ]
    skew = document["skew"]
    title = "Rows of each client, and labels in its training rows"
    title += f" (label skew {skew:.2f} of 1)" if skew is not None else ""
    console.print(grid(title, ["client", "train", "val", "test", *names], rows))
    for finding in document["findings"]:
        console.print(f"warning: {finding}", highlight=False)


def show_methods(document: Sequence[Row], console: Console) -> None:
    """A line per method, and under it what a person asks before choosing one."""
    for m in document:
        console.print(f"[bold]{m['method']}[/bold]  {escape(m['paper'])}", highlight=False)
        leaves = "; ".join(leave["what"] for leave in m["leaves"])
        options = ", ".join(f"{k}={v}" for k, v in m["options"].items())
        for title, text in (
            ("on a cut", m["split"]),
            ("options", options),
            ("leaves a client", leaves or "nothing but what the cut itself sends"),
            ("reconstruction", m["reconstruction"]),
        ):
            if text:
                console.print(Padding(escape(f"{title}: {text}"), (0, 0, 0, 4)), highlight=False)


def show_assets(document: Row, console: Console) -> None:
    """One line per asset, then where it comes from, then what `verify` found."""
    lines = [
        [
            row["name"],
            row["kind"],
            "yes" if row["present"] else "no",
            format_bytes(row["download"]),
            row["licence"],
        ]
        for row in document["assets"]
    ]
    columns = ["asset", "kind", "here", "download", "licence"]
    console.print(grid(f"Assets in {document['cache']}", columns, lines))
    for row in document["assets"]:
        console.print(f"{row['name']}: {row['source']}", highlight=False)
    for name, problems in document["problems"].items():
        for problem in problems:
            console.print(f"{name}: {problem}", highlight=False)
        if not problems:
            console.print(f"{name}: every byte as pinned", highlight=False)


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
