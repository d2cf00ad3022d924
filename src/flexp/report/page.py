"""The page: one HTML file that needs nothing else, from what run folders hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

from flexp.errors import FlexpError
from flexp.events import Noted, SeatTaken, TurnFailed
from flexp.report import charts
from flexp.report.markup import Html, join, tag
from flexp.report.outcomes import bytes_sent, learning, own_and_global
from flexp.report.runs import Run, open_runs, rounds_done, server_blocks
from flexp.report.style import CSS
from flexp.report.tables import Formats, cell, rowhead, section, table, th

# Nothing may be fetched or run, whatever a client's name holds.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def write(runs: Sequence[Path], out: Path, formats: Formats) -> Path:
    """Writes the report of one run folder, or the comparison of several, and returns its path.

    Raises FlexpError if a folder is no run or the file cannot be written.
    """
    document = page(open_runs(runs), formats)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(document.encode("utf-8", "replace"))
    except OSError as problem:
        raise FlexpError(
            f"{out} cannot be written: {problem.strerror}. Choose another file."
        ) from problem
    return out


def page(runs: Sequence[Run], formats: Formats) -> str:
    """The whole document."""
    names = dict.fromkeys(run.start.name if run.start else run.folder.name for run in runs)
    title = next(iter(names)) if len(names) == 1 else "Comparison of " + ", ".join(names)
    parts = [
        header(runs, title),
        fleet(runs, formats),
        learning(runs),
        own_and_global(runs, formats),
        bytes_sent(runs, formats),
        messages(runs),
        repeat(runs),
    ]
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
    )
    styled = join([Html(head), tag("title", title), tag("style", Html(CSS))])
    body = join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{styled}</head><body>{body}</body></html>\n'


def when(at: float | None) -> str:
    """A time in UTC; blank if there is none."""
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M} UTC" if at is not None else ""


def facts(run: Run) -> dict[str, str]:
    """What a reader asks first about a run."""
    start = run.start
    told: Mapping[str, object] = start.facts if start else {}
    done = rounds_done(run)
    return {
        "run": start.name if start else run.folder.name,
        "method": start.method if start else "",
        "model": str(told.get("model", "")),
        "blocks": str(told.get("blocks", "")),
        "dtype": str(told.get("dtype", "")),
        "quantized": str(told.get("quantize", "")),
        "mode": start.mode if start else "",
        "seed": str(start.seed) if start else "",
        "recipe hash": start.recipe_hash[:12] if start else "",
        "rounds": "" if done is None else str(done) if run.ended else f"{done} so far",
        "started": when(run.started),
        "ended": when(run.ended) or "not yet",
    }


def header(runs: Sequence[Run], title: str) -> Html:
    """What all runs have in common, then what tells them apart."""
    told = [facts(run) for run in runs]
    same = [key for key in told[0] if len({t[key] for t in told}) == 1]
    differ = [key for key in told[0] if key not in (*same, "method")]
    pairs = [tag("div", tag("dt", key), tag("dd", told[0][key])) for key in same if told[0][key]]
    parts = [tag("h1", title), tag("dl", *pairs)]
    if len(runs) > 1:
        rows = [
            [rowhead(run.label), *(cell(t[key]) for key in differ)]
            for run, t in zip(runs, told, strict=True)
        ]
        columns = [th(key, None) for key in ("method", *differ)]
        parts.append(table(columns, rows, class_="full"))
    return tag("header", *parts)


def fleet(runs: Sequence[Run], formats: Formats) -> Html:
    """Where every client's model is cut, once for runs that agree."""
    plans: dict[tuple[SeatTaken, ...], list[Run]] = {}
    for run in runs:
        plans.setdefault(run.seats, []).append(run)
    parts: list[Html] = []
    for seats, alike in plans.items():
        if len(plans) > 1:
            parts.append(tag("h3", ", ".join(run.label for run in alike)))
        parts.append(_seats(alike[0], seats, formats))
        told = [
            f"Round {move.round + 1}: {move.client} sits on {move.device}, {move.front} | "
            f"{server_blocks(alike[0], move)} | {move.back} ({move.reason})"
            for move in alike[0].moves
        ]
        parts += [tag("ul", *(tag("li", line) for line in told))] if told else []
    looks = (
        ((1, 0, 0), "front, at the device"),
        ((0, 1, 0), "at the server"),
        ((0, 0, 1), "back, at the device"),
    )
    keys = [tag("li", tag("span", charts.blocks(*cut), class_="key"), text) for cut, text in looks]
    hint = "Which blocks of the model run on each client's device, and the memory they take there."
    return section("The fleet", hint, tag("ul", *keys, class_="legend"), *parts)


def _seats(run: Run, seats: Sequence[SeatTaken], formats: Formats) -> Html:
    rows: list[list[str]] = []
    for seat in seats:
        server = server_blocks(run, seat)
        strip = charts.blocks(seat.front, server, seat.back) if server is not None else ""
        rows.append(
            [
                rowhead(seat.client),
                cell(seat.device),
                cell(strip, "strip-cell"),
                f"{seat.front} | {'' if server is None else server} | {seat.back}",
                formats.size(seat.memory_bytes),
                cell(seat.reason, "why"),
            ]
        )
    columns = [
        *(th(name, None) for name in ("client", "device", "blocks")),
        "front | server | back",
        "predicted memory",
        th("why", "why"),
    ]
    return table(columns, rows, class_="full")


def messages(runs: Sequence[Run]) -> Html:
    """What was noted, and which turns failed."""
    items: list[Html] = []
    for run in runs:
        who = f"{run.label}: " if len(runs) > 1 else ""
        items += [tag("li", who, *_said(message)) for message in run.messages]
    title = "Warnings and failures"
    if not items:
        return section(title, "None.")
    return section(title, "", tag("ul", *items, class_="messages"))


def _said(message: Noted | TurnFailed) -> list[str]:
    if isinstance(message, Noted):
        return [tag("b", message.level), f": {message.text}"]
    return [tag("b", "failed"), f": {message.client} in round {message.round + 1}: {message.error}"]


def repeat(runs: Sequence[Run]) -> Html:
    """Recipes as they were run, with their hashes and the versions of what ran them."""
    parts: list[Html] = []
    for run in runs:
        if len(runs) > 1:
            parts.append(tag("h3", run.label))
        if run.start:
            parts.append(tag("p", "Recipe hash: ", tag("code", run.start.recipe_hash)))
        told = run.result.get("facts")
        if isinstance(told, dict):
            versions = cast("dict[str, object]", told).items()
            parts.append(tag("p", "Versions: ", ", ".join(f"{k} {v}" for k, v in versions)))
        if run.recipe is not None:
            parts.append(tag("details", tag("summary", "recipe.yaml"), tag("pre", run.recipe)))
    hint = "Save a recipe as recipe.yaml, then: flexp run recipe.yaml out=FOLDER"
    known = any(run.recipe is not None for run in runs)
    return section("To repeat this", hint if known else "No recipe is kept in the folder.", *parts)
