"""What a person sees in a terminal: live progress and tables, from events and documents alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from flexp.events import (
    Event,
    Noted,
    RoundStarted,
    RunEnded,
    Scored,
    TurnEnded,
    TurnFailed,
)
from flexp.plan.devices import format_bytes

Row = Mapping[str, Any]
BLANK = ""


class Live:
    """A progress bar per run, fed by its events; without a terminal it prints only what is said."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn("{task.description:<8}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.progress.stop()

    def say(self, text: str) -> None:
        """One line of plain text above the bars."""
        self.console.print(text, highlight=False)

    def begin(self, title: str, rounds: int) -> Bar:
        """The bar of a run."""
        return Bar(self, self.progress.add_task(title, total=rounds, note="starting"), rounds)


@dataclass
class Bar:
    """The sink of one run's events."""

    live: Live
    task: TaskID
    rounds: int
    losses: list[float] = field(default_factory=list[float])

    def __call__(self, event: Event) -> None:
        move = self.live.progress.update
        if isinstance(event, TurnFailed):
            self.live.say(f"round {event.round + 1}: {event.client} failed: {event.error}")
        elif isinstance(event, Noted):
            self.live.say(f"{event.level}: {event.text}")
        elif isinstance(event, RoundStarted):
            self.losses = []
            move(self.task, completed=event.round)
        elif isinstance(event, TurnEnded):
            self.losses.append(event.loss)
            mean = sum(self.losses) / len(self.losses)
            note = f"round {event.round + 1} of {self.rounds}, {event.client}, loss {mean:.3f}"
            move(self.task, note=note)
        elif isinstance(event, Scored):
            move(self.task, note="scoring")
        elif isinstance(event, RunEnded):
            move(self.task, completed=event.rounds, note="done")


def grid(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A plain table that stays readable at 80 columns; columns of numbers are right-aligned."""
    out = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    out.padding = (0, 0)
    for n, column in enumerate(columns):
        numeric = any(row[n] for row in rows) and all(_numeric(row[n]) for row in rows)
        out.add_column(column, justify="right" if numeric else "left")
    for row in rows:
        out.add_row(*row)
    return out


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


def show_predictions(document: Row, console: Console) -> None:
    """One line per text."""
    lines = [
        [p["text"], p["label"], f"{100 * max(p['probabilities'].values()):.1f} %"]
        for p in document["predictions"]
    ]
    console.print(grid(document["adapter"], ["text", "label", "probability"], lines))


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
            seat["client"],
            *([seat["about"]] if wide else []),
            seat["device"],
            f"{seat['front']}|{seat['server_blocks']}|{seat['back']}",
            format_bytes(seat["bytes"]),
            format_bytes(seat["sent"] + seat["received"]),
        ]
        lines.append(line + _pairs(rows, methods, seat["client"], metric))
    lines.append(["mean", *[""] * (5 if wide else 4), *_pairs(rows, methods, "all", metric)])
    columns = ["client", *(["data"] if wide else []), "device", "cut", "memory", "bytes", *methods]
    title = (
        f"{metric.capitalize()} of each client's model: own test texts / everybody's. "
        "Cut: blocks at the device's front | at the server | at its back"
    )
    console.print(grid(title, columns, lines))
    for line in document["says"]:
        console.print(line, highlight=False)


def _pairs(rows: Sequence[Row], methods: Sequence[str], client: str, metric: str) -> list[str]:
    out: list[str] = []
    for method in methods:
        mine = [row for row in rows if row["method"] == method]
        pair = [value_of(mine, client, data, metric) for data in ("own", "global")]
        scale = 100 if metric == "accuracy" else 1
        out.append("/".join(f"{scale * v:.1f}" if v is not None else "–" for v in pair))
    return out
