"""What came of the runs: learning curves, own against global, bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from flexp.report import charts
from flexp.report.markup import Html, join, tag
from flexp.report.runs import (
    EVERYBODY,
    Run,
    cells,
    kinds,
    losses,
    metrics,
    scores,
    traffic,
)
from flexp.report.tables import Formats, cell, rowhead, section, table, th


def learning(runs: Sequence[Run]) -> Html:
    """Training loss over rounds: the mean of each method, and each client's if there is one."""
    found = [losses(run) for run in runs]
    series = [
        charts.Series(run.label, _points(held[EVERYBODY]), look)
        for look, (run, held) in enumerate(zip(runs, found, strict=True))
    ]
    title, hint = "Learning curves", "Training loss by round, the mean over clients."
    if not any(charts.drawable(s).points for s in series):
        return section(title, "No client has reported a loss yet.")
    rows = [
        [rowhead(run.label), *_first_last(held[EVERYBODY])]
        for run, held in zip(runs, found, strict=True)
    ]
    thin: list[charts.Series] = []
    if len(runs) == 1:
        clients = {c: held for c, held in found[0].items() if c != EVERYBODY}
        thin = [charts.Series(client, _points(held)) for client, held in clients.items()]
        rows = [[rowhead(name), *_first_last(held)] for name, held in found[0].items()]
        rows[0][0] = rowhead("mean")
        hint += " The thin lines are the clients."
    chart = charts.lines([*thin, *series], ("round", "loss"), f"Loss by round of {_names(runs)}")
    key = charts.legend([run.label for run in runs])
    columns = [th("client" if thin else "method", None), "first round", "last round"]
    return section(
        title, hint, tag("div", tag("figure", key, chart), table(columns, rows), class_="pair")
    )


def _points(held: dict[int, float]) -> tuple[tuple[float, float], ...]:
    return tuple((r + 1.0, value) for r, value in sorted(held.items()))


def _first_last(held: dict[int, float]) -> list[str]:
    return [f"{held[r]:.3f}" for r in (min(held), max(held))] if held else ["", ""]


def _names(runs: Sequence[Run]) -> str:
    return ", ".join(run.label for run in runs)


def clients_of(runs: Sequence[Run]) -> list[str]:
    """Everybody first, then the clients of all runs."""
    return [EVERYBODY, *dict.fromkeys(client for run in runs for client in run.clients)]


def own_and_global(runs: Sequence[Run], formats: Formats) -> Html:
    """Scores of personal models: the main metric as table and picture, the others folded."""
    title, found = "Own against global", metrics(runs)
    if not found:
        return section(title, "Nothing has been evaluated yet.")
    main = found[0]
    hint = f"{main.capitalize()} of every personal model on its client's own test rows and on all."
    parts = [_score_table(runs, main, formats)]
    if picture := _scatter(runs, main, formats):
        parts.insert(0, picture)
    early = [f"{run.label}: after {when_scored(run)}" for run in runs if when_scored(run)]
    notes = [tag("p", "Before the end of the run. " + "; ".join(early))] if early else []
    others = [
        tag("details", tag("summary", metric), _score_table(runs, metric, formats))
        for metric in found[1:]
    ]
    return section(title, hint, *notes, tag("div", *parts, class_="pair"), *others)


def when_scored(run: Run) -> str:
    """The round of an evaluation that is not the last one, as "round 3"; blank otherwise."""
    found = "/".join(next(iter(scores(run))).cell.split("/")[2:]) if scores(run) else "after"
    return found.replace("-", " ") if found != "after" else ""


def _score_table(runs: Sequence[Run], metric: str, formats: Formats) -> Html:
    held = [cells(run, metric) for run in runs]
    places = list(dict.fromkeys(place for each in held for _, place in each))
    rows: list[list[str]] = []
    for client in clients_of(runs):
        for run, each in zip(runs, held, strict=True):
            numbers = [formats.score(metric, each.get((client, place))) for place in places]
            rows.append([*_row_names(runs, run, client, "mean"), *numbers])
    names = [place.removeprefix("personal/") for place in places]
    return table([*_column_names(runs), *names], rows)


def _row_names(runs: Sequence[Run], run: Run, client: str, everybody: str) -> list[str]:
    """A client's name above its methods, and the method if there are several."""
    name = everybody if client == EVERYBODY else client
    first: list[str] = [rowhead(name, len(runs))] if run is runs[0] else []
    return [*first, cell(run.label)] if len(runs) > 1 else first


def _column_names(runs: Sequence[Run]) -> list[str]:
    return [th("client", None), *([th("method", None)] if len(runs) > 1 else [])]


def _scatter(runs: Sequence[Run], metric: str, formats: Formats) -> Html | None:
    marks: list[charts.Mark] = []
    for look, run in enumerate(runs):
        held = cells(run, metric)
        for client in clients_of([run]):
            own, whole = (held.get((client, f"personal/{data}")) for data in ("own", "global"))
            if own is not None and whole is not None:
                bold = client == EVERYBODY
                name = "mean" if bold else client
                marks.append(charts.Mark(name, run.label, own, whole, look, bold))
    marks = [m for m in marks if math.isfinite(m.x) and math.isfinite(m.y)]
    if not marks:
        return None
    names = (f"own {metric}", f"global {metric}")
    alt = f"Own against global {metric} of every client under {_names(runs)}"
    chart = charts.scatter(marks, names, lambda value: formats.score(metric, value), alt)
    text = "One mark per client; the large ones are means. On the dotted line both are equal."
    key = charts.legend([run.label for run in runs], joined=False)
    return tag("figure", key, chart, tag("figcaption", text))


def bytes_sent(runs: Sequence[Run], formats: Formats) -> Html:
    """Totals of every client as bars, then all clients' by kind of tensor."""
    held = [traffic(run) for run in runs]
    single = [pair for each in held for client, pair in each.items() if client != EVERYBODY]
    if not single:
        return section("Bytes", "No client has finished a turn yet.")
    most = max(1, *(max(pair) for pair in single))
    rows: list[list[str]] = []
    for client in clients_of(runs):
        for look, (run, each) in enumerate(zip(runs, held, strict=True)):
            row = _row_names(runs, run, client, "all together")
            for size in each.get(client, (None, None)):
                bar = "" if client == EVERYBODY or size is None else charts.bar(size / most, look)
                row += [cell(bar, "strip-cell"), "" if size is None else formats.size(size)]
            rows.append(row)
    columns = [*_column_names(runs), th("", None), "sent", th("", None), "received"]
    bars = table(columns, rows, class_="full")
    hint = "What every client sent and received in the whole run."
    return section("Bytes", hint, bars, _kinds(runs, formats))


def _kinds(runs: Sequence[Run], formats: Formats) -> Html:
    held = [kinds(run) for run in runs]
    names = sorted({name for each in held for name in each})
    if not names:
        return Html("")
    rows = [
        [rowhead(name), *(formats.size(each[name]) if name in each else "" for each in held)]
        for name in names
    ]
    columns = [th("", None), *(run.label for run in runs)]
    return join([tag("h3", "By kind, all clients together"), table(columns, rows)])
