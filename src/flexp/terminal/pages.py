"""What each command shows, but for scores of several methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from flexp.plan.devices import format_bytes
from flexp.terminal.grids import Row, codes, grid, short, shown, value_of


def show_run(document: Row, console: Console) -> None:
    """Own and global scores per client, and where everything was written."""
    rows: list[Row] = document["rows"]
    metric = rows[0]["metric"] if rows else "accuracy"
    main = {row["client"]: row["metric"] for row in reversed(rows)}  # a client's first one
    lines: list[list[str]] = []
    for client in dict.fromkeys(row["client"] for row in rows):
        mine = main[client]
        pair = [shown(mine, value_of(rows, client, data, mine)) for data in ("own", "global")]
        lines.append([client if mine == metric else f"{client} ({mine})", *pair])
    title = f"{document['method']}: {metric} of each personal model on its own and on all test data"
    console.print(grid(title, ["client", "own", "global"], lines))
    console.print(f"Results, events and checkpoints: {document['out']}", highlight=False)
    if document["adapters"]:
        console.print(f"PEFT adapters: {document['out']}/adapters", highlight=False)


def show_influence(document: Row, console: Console) -> None:
    """Who helped most first; with a check, the real changes beside the estimated ones."""
    real = any("real_change" in row for row in document["rows"])
    columns = ["client", "turns", "loss without it", "first order", "moved by"]
    lines: list[list[str]] = []
    for row in document["rows"]:
        line = [row["client"], str(row["turns"]), signed(row["change"]), signed(row["slope"])]
        line += [f"{row['norm']:.3g}"]
        if real:
            known = "real_change" in row
            line += [signed(row["real_change"]), f"{row['real_norm']:.3g}"] if known else ["", ""]
        lines.append(line)
    title = (
        f"{document['method']}, mode {document['mode']}: how much the loss on all test rows "
        f"({document['metrics']['loss']:.4f}) would be higher without a client"
    )
    console.print(grid(title, columns + ["really", "moved by"] * real, lines))
    told = [f"{k} {v:.3f}" for k, v in document["pearson"].items() if v is not None]
    if told:
        console.print(f"Pearson with what was trained: {', '.join(told)}", highlight=False)


def signed(number: float) -> str:
    """A change, with its sign."""
    return f"{number:+.3g}"


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
        f"{document['model']}, {document['blocks']} blocks, {document['dtype']}{codes(document)}: "
        "█ front and ▓ back on the device, ░ at the server"
    )
    console.print(grid(title, ["client", "device", "blocks", "memory"], lines))


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
    whose = document.get("adapter") or f"{document['client']}, through {document['server']}"
    console.print(whose, highlight=False, markup=False)
    found: list[Row] = document["predictions"]
    for each in found:
        if "label" not in each:
            console.print(each["text"], highlight=False, markup=False)
            said = {k: each[k] for k in ("base", "adapter") if k in each}
            show_voices(said, console)
    lines = [
        [p["text"], p["label"], f"{100 * max(p['probabilities'].values()):.1f} %"]
        for p in found
        if "label" in p
    ]
    if lines:
        console.print(grid("", ["text", "label", "probability"], lines))


def show_align(document: Row, console: Console) -> None:
    """How far each model was from the pivot, and is now."""
    far = "{:.3g}"
    lines = [
        [name, far.format(found["before"]), far.format(found["after"])]
        for name, found in document["models"].items()
    ]
    title = f"Distance to {document['pivot']} per number, on {document['rows']} rows"
    console.print(grid(title, ["model", "as drawn", "aligned"], lines))
    kept = "was there already" if document["kept"] else "is made"
    console.print(f"{document['file']} {kept}: adapter.aligned")


def show_doctor(document: Row, console: Console) -> None:
    """Facts, then clients and findings if a recipe was given."""
    lines = [[name, version] for name, version in document["facts"].items()]
    if "block_gflops" in document:
        lines += [["speed in this model", f"{document['block_gflops']:.3g} GFLOP/s"]]
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
    names = list(dict.fromkeys(label for c in document["clients"] for label in c["labels"]))
    rows = [
        [
            c["client"],
            str(c["train"]),
            str(c["val"]),
            str(c["test"]),
            *(str(c["labels"].get(name, "")) for name in names),
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
    """Methods by kind: what each does, and under it what a person asks before choosing."""
    for kind in dict.fromkeys(m["kind"] for m in document):
        console.print(f"[bold]{kind}[/bold]", highlight=False)
        for m in document:
            if m["kind"] == kind:
                show_method(m, console)
    moved = "Whatever the method: where a client's cut changes, the adapter of a block that becomes"
    console.print(f"{moved} the server's goes there with it.", highlight=False)


def show_method(m: Row, console: Console) -> None:
    """One method."""
    does = Padding(f"[bold]{m['method']}[/bold]  {escape(m['does'])}", (0, 0, 0, 2))
    console.print(does, highlight=False)
    leaves = "; ".join(f"{one['what']} ({one['part']}), {one['why']}" for one in m["leaves"])
    options = ", ".join(f"{k}={v}" for k, v in m["options"].items())
    for title, text in (
        ("after", m["reference"]),
        ("on a cut", m["split"]),
        ("personal", m["personal"]),
        ("leaves a client", leaves or "nothing but what the cut itself sends"),
        ("options", options),
        ("reconstruction", m["reconstruction"]),
    ):
        if text:
            console.print(Padding(escape(f"{title}: {text}"), (0, 0, 0, 6)), highlight=False)


def show_new_strategy(document: Row, console: Console) -> None:
    """The files of a new method, and what to call next."""
    for path in document["files"]:
        console.print(path, highlight=False, markup=False, soft_wrap=True)
    console.print("Next:", highlight=False)
    for line in document["next"]:
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)


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


def show_verified(document: Row, console: Console) -> None:
    """What is whole in a run's folder, and what is not."""
    rounds = ", ".join(map(str, document["rounds"])) or "none"
    console.print(f"checkpoints that can be used, after rounds: {rounds}", highlight=False)
    if document["records"]:
        told = f"audit log: {document['records']} records, the last {document['head']}"
        console.print(told, highlight=False)
    for path, problem in document["problems"].items():
        console.print(f"{path}: {problem}", style="red", highlight=False)
