"""What run folders hold, and the numbers that a report shows of them."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from flexp.errors import FlexpError
from flexp.events import (
    Event,
    Noted,
    RunEnded,
    RunStarted,
    Scored,
    SeatMoved,
    SeatTaken,
    TurnEnded,
    TurnFailed,
    read_timed,
)
from flexp.plain import finite

EVERYBODY = "all"  # the client of a score that is the mean over clients
LOG = "events.jsonl"


@dataclass(frozen=True)
class Run:
    """One run folder; None and empty are what it does not hold (yet).

    ``label`` tells it from the other runs of the report; times are in seconds since 1970.
    """

    folder: Path
    label: str
    start: RunStarted | None
    started: float | None
    ended: float | None
    events: tuple[Event, ...]
    recipe: str | None
    result: Mapping[str, Any]

    @property
    def seats(self) -> tuple[SeatTaken, ...]:
        return tuple(e for e in self.events if isinstance(e, SeatTaken))

    @property
    def moves(self) -> tuple[SeatMoved, ...]:
        return tuple(e for e in self.events if isinstance(e, SeatMoved))

    @property
    def turns(self) -> tuple[TurnEnded, ...]:
        return tuple(e for e in self.events if isinstance(e, TurnEnded))

    @property
    def messages(self) -> tuple[Noted | TurnFailed, ...]:
        return tuple(e for e in self.events if isinstance(e, Noted | TurnFailed))

    @property
    def clients(self) -> tuple[str, ...]:
        """In the order in which they took their seats; without "all"."""
        named = (e for e in self.events if isinstance(e, SeatTaken | TurnEnded | Scored))
        return tuple(c for c in dict.fromkeys(e.client for e in named) if c != EVERYBODY)

    @property
    def blocks(self) -> int | None:
        found = self.start.facts.get("blocks") if self.start else None
        return found if isinstance(found, int) else None


def open_runs(folders: Sequence[Path]) -> list[Run]:
    """Reads run folders; raises FlexpError if one is none."""
    if not folders:
        raise FlexpError("A report needs a run. Name one folder of a run, or several to compare.")
    found = [_open(folder) for folder in dict.fromkeys(folders)]
    return _told_apart(_told_apart(found, whole=False), whole=True)


def _open(folder: Path) -> Run:
    log = folder / LOG
    if not log.is_file():
        inside = sorted(path.parent.name for path in folder.glob(f"*/{LOG}"))
        hint = f" It has runs inside; name those: {', '.join(inside)}." if inside else ""
        raise FlexpError(
            f"{folder} holds no {LOG}, so it is not the folder of a run. "
            f'Give a folder that "flexp run" wrote, such as runs/NAME.{hint}'
        )
    timed = list(read_timed(log))
    events = tuple(event for _, event in timed)
    start = next((e for e in events if isinstance(e, RunStarted)), None)
    return Run(
        folder=folder,
        label=start.method if start else folder.name,
        start=start,
        started=timed[0][0] if timed else None,
        ended=next((at for at, e in reversed(timed) if isinstance(e, RunEnded)), None),
        events=events,
        recipe=_text(folder / "recipe.yaml"),
        result=_result(folder / "result.json"),
    )


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def _result(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(path) or "{}")
    except (ValueError, RecursionError) as error:
        raise FlexpError(f"{path} is not JSON: {error}. Restore or remove it.") from error
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}


def _told_apart(runs: list[Run], *, whole: bool) -> list[Run]:
    """Two runs of one method get their folders' names behind the method, or the whole paths."""
    count = Counter(run.label for run in runs)
    names = [f"{run.label} ({run.folder if whole else run.folder.name})" for run in runs]
    return [
        run if count[run.label] == 1 else replace(run, label=name)
        for run, name in zip(runs, names, strict=True)
    ]


def mean(values: Iterable[float]) -> float | None:
    """The mean of what was measured (NaN was not), or None."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else None


def losses(run: Run) -> dict[str, dict[int, float]]:
    """Training loss by client and round, each the mean of its waves; "all" is the mean of clients.

    Rounds without a loss are absent.
    """
    found: dict[str, dict[int, list[float]]] = {client: {} for client in run.clients}
    for turn in run.turns:
        found[turn.client].setdefault(turn.round, []).append(turn.loss)
    own = {
        client: {r: value for r, held in rounds.items() if (value := mean(held)) is not None}
        for client, rounds in found.items()
    }
    everybody: dict[int, float] = {}
    for r in sorted({r for rounds in own.values() for r in rounds}):
        value = mean(rounds[r] for rounds in own.values() if r in rounds)
        if value is not None:
            everybody[r] = value
    return {EVERYBODY: everybody, **own}


def rounds_done(run: Run) -> int | None:
    """Rounds that have had a turn."""
    return max((turn.round + 1 for turn in run.turns), default=None)


def scores(run: Run) -> tuple[Scored, ...]:
    """Those of the newest evaluation."""
    found = [e for e in run.events if isinstance(e, Scored)]
    last = max((e.round for e in found), default=None)
    return tuple(e for e in found if e.round == last)


def column(score: Scored) -> str:
    """Which model on whose data, as "personal/own": the cell without its time."""
    return "/".join(score.cell.split("/")[:2])


def metrics(runs: Sequence[Run]) -> list[str]:
    """Every metric of the newest evaluations; the main one comes first."""
    return list(dict.fromkeys(score.metric for run in runs for score in scores(run)))


def cells(run: Run, metric: str) -> dict[tuple[str, str], float]:
    """The newest evaluation by client and column; what was not measured is absent."""
    return {
        (score.client, column(score)): score.value
        for score in scores(run)
        if score.metric == metric and not math.isnan(score.value)
    }


def traffic(run: Run) -> dict[str, tuple[int, int]]:
    """Bytes that each client has sent and received; "all" is their sum, and it comes first."""
    found: dict[str, tuple[int, int]] = {}
    for turn in run.turns:
        for client in (EVERYBODY, turn.client):
            sent, received = found.get(client, (0, 0))
            found[client] = (sent + turn.sent_bytes, received + turn.received_bytes)
    return found


def kinds(run: Run) -> dict[str, int]:
    """Bytes of all clients by way and kind of tensor, as "up hidden"."""
    found: Counter[str] = Counter()
    for turn in run.turns:
        found.update({kind: n for kind, n in turn.kinds.items() if isinstance(n, int)})
    return dict(sorted(found.items()))


def summary(runs: Sequence[Path]) -> dict[str, Any]:
    """The numbers of the report as plain data; None is what was not measured."""
    opened = open_runs(runs)
    return {
        "metric": next(iter(metrics(opened)), None),
        "runs": [_plain(run) for run in opened],
    }


def _plain(run: Run) -> dict[str, Any]:
    start = asdict(run.start) if run.start else {}
    facts = start.pop("facts", {})
    rounds = range(rounds_done(run) or 0)
    document: dict[str, Any] = {
        "folder": str(run.folder),
        "label": run.label,
        **start,
        **facts,
        "started": run.started,
        "ended": run.ended,
        "rounds": rounds_done(run),
        "seats": [asdict(seat) | {"server": server_blocks(run, seat)} for seat in run.seats],
        "moves": [asdict(seat) | {"server": server_blocks(run, seat)} for seat in run.moves],
        "loss": {c: [held.get(r) for r in rounds] for c, held in losses(run).items()},
        "scores": [asdict(score) for score in scores(run)],
        "bytes": {c: {"sent": s, "received": r} for c, (s, r) in traffic(run).items()},
        "kinds": kinds(run),
        "messages": [asdict(message) for message in run.messages],
    }
    return finite(document)


def server_blocks(run: Run, seat: SeatTaken | SeatMoved) -> int | None:
    """Blocks of the model that the server holds for a seat."""
    return None if run.blocks is None else run.blocks - seat.front - seat.back
