"""What `flexp plan` shows: the seats of a recipe, or the cuts of a model on devices."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from flexp.plan.devices import format_bytes, format_seconds
from flexp.terminal.grids import BLANK, Row, codes, grid

MANY = 8  # depths that are shown one by one


def show_plan(document: Row, console: Console) -> None:
    """Blocks, bytes and seconds of every client."""
    timed = any(seat["seconds"] is not None for seat in document["seats"])
    lines: list[list[str]] = []
    for seat in document["seats"]:
        held = seat["bytes"]
        lines.append(
            [
                seat["client"],
                seat["device"],
                blocks(seat),
                format_bytes(held["weights"]),
                format_bytes(held["total"] - held["weights"]),
                format_bytes(held["total"]),
                crossing(seat),
                *([seconds(seat)] if timed else []),
            ]
        )
    columns = ["client", "device", "front|server|back", "weights", "training", "total", "link"]
    title = (
        f"{document['model']}, {document['blocks']} blocks{codes(document)}: what runs on each "
        f"device, and memory; link and time of a step of {document['batch']} rows"
    )
    console.print(grid(title, [*columns, *(["time"] if timed else [])], lines))
    for reason in dict.fromkeys(f"{s['device']}: {s['reason']}" for s in document["seats"]):
        console.print(reason, highlight=False, markup=False)
    for move in document["changes"]:
        where = f"{move['client']} on {move['device']}, {blocks(move)}"
        told = f"from round {move['round']}: {where}: {move['reason']}"
        console.print(told, highlight=False, markup=False)


def show_cuts(document: Row, console: Console, *, every: bool = False) -> None:
    """A table of cuts for each device, what is chosen and why."""
    server = document["server"]
    weights = f"{document['dtype']}{codes(document)}"
    title = (
        f"{document['model']}, {document['blocks']} blocks, {weights}, LoRA of rank "
        f"{document['rank']}: a step of {document['batch']} rows of {document['length']} tokens"
    )
    console.print(title, highlight=False, markup=False)
    speed = f"{server['flops'] / 1e9:,.0f} GFLOP/s"
    console.print(f"Server: {server['name']}, {speed}. Goal: {document['goal']}", highlight=False)
    for device in document["devices"]:
        rows = [row for row in document["cuts"] if row["device"] == device["name"]]
        _device(device, rows, rows if every else selection(rows), console)


def _device(device: Row, rows: Sequence[Row], some: Sequence[Row], console: Console) -> None:
    lines = [
        [
            blocks(row),
            format_bytes(row["bytes"]["total"]),
            parts(row),
            crossing(row),
            seconds(row),
            verdict(row),
        ]
        for row in some
    ]
    speed = f"{device['flops'] / 1e9:,.0f} GFLOP/s"
    title = f"\n{device['name']}: {format_bytes(device['memory'])} for training, {speed}"
    columns = ["front|server|back", "memory", "parts", "link", "time", ""]
    console.print(grid(title, columns, lines))
    chosen = device["chosen"]
    told = device["problem"] or f"Chosen: {chosen['front']} front, {chosen['back']} back. "
    told += "" if device["problem"] else f"{chosen['reason']}."
    console.print(told, highlight=False, markup=False)
    if len(some) < len(rows):
        left = f"{len(some)} of {len(rows)} cuts are shown; --all shows the others."
        console.print(left, highlight=False)


def blocks(row: Row) -> str:
    """Front, server and back."""
    return f"{row['front']} | {row['server_blocks']} | {row['back']}"


def crossing(row: Row) -> str:
    """Bytes over the link in a step; blank if all runs at the client."""
    return format_bytes(row["step_bytes"]) if row["step_bytes"] else BLANK


def seconds(row: Row) -> str:
    """Of a step; blank if a speed is not known."""
    return BLANK if row["seconds"] is None else format_seconds(row["seconds"])


def parts(row: Row) -> str:
    """In how many parts a batch goes, and how many blocks are computed again."""
    out = [str(row["accumulate"])] if row["accumulate"] > 1 else []
    return ", ".join([*out, *([f"recompute {row['recompute']}"] if row["recompute"] else [])])


def verdict(row: Row) -> str:
    """Whether a cut fits, and whether it is the one."""
    if row["chosen"]:
        return "chosen"
    return f"{format_bytes(row['missing'])} too much" if row["missing"] else "fits"


def selection(rows: Sequence[Row]) -> list[Row]:
    """Of one device's cuts those to show: a cut for round depths, where memory ends, the chosen."""
    by_depth: dict[int, list[Row]] = {}
    for row in rows:
        by_depth.setdefault(row["front"] + row["back"], []).append(row)
    depths = list(by_depth)
    fits = [d for d in depths if any(not row["missing"] for row in by_depth[d])]
    wanted = {d for d in depths if len(depths) <= MANY or d < 3 or d % _step(len(depths)) == 0}
    wanted |= {depths[0], depths[-1]}
    if fits:
        wanted |= {fits[-1], *(d for d in depths if d == fits[-1] + 1)}
    out: list[Row] = []
    for depth in depths:
        usual = min(by_depth[depth], key=lambda row: abs(row["back"] - depth // 3))
        out += [r for r in by_depth[depth] if r["chosen"] or (r is usual and depth in wanted)]
    return out


def _step(depths: int) -> int:
    return next((n for n in (2, 4, 5, 10, 20) if depths / n <= MANY), 50)
