"""From finished runs to one table: means and deviations over seeds, gains over ``local``."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from flexp.events import Interleaved, SeatMoved, SeatTaken, TurnEnded, read
from flexp.plan.clock import Load, Work, finish_times, run_seconds
from flexp.plan.costs import BlockCosts, near_bytes
from flexp.plan.devices import Device

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, Any]
EVERYBODY = "all"
DRAWS = 10_000  # of the bootstrap
AFTER = {"own": "personal/own/after", "global": "personal/global/after"}
LOSSES = {f"{name}_loss": cell for name, cell in AFTER.items()}  # tell apart what a metric cannot
COSTS = (
    "sent_bytes",
    "received_bytes",
    "client_flops",
    "peak_bytes",
    "simulated_seconds",
)
SCORES = ("own", "global", "worst_decile", *LOSSES)


def worst_decile(values: Sequence[float], *, higher: bool) -> float:
    """The mean of the worst tenth of the clients, at least of one.

    >>> worst_decile([0.9, 0.2, 0.8], higher=True)
    0.2
    """
    order = sorted(values, reverse=not higher)
    return statistics.fmean(order[: max(1, len(order) // 10)])


def gains(
    mine: Sequence[float], others: Sequence[float], *, higher: bool, draws: int = DRAWS
) -> dict[str, float]:
    """How much better ``mine`` is than ``others``, pair by pair, with a 95 % bootstrap interval.

    Where higher is better, in the metric's units; else the fall of its logarithm, so that 0.1 is
    about 10 % lower. The interval resamples the pairs (percentiles; a fixed seed).
    """
    a, b = np.asarray(mine, dtype=float), np.asarray(others, dtype=float)
    pairs = a - b if higher else np.log(b) - np.log(a)
    drawn = np.random.default_rng(0).integers(0, len(pairs), (draws, len(pairs)))
    low, high = np.quantile(pairs[drawn].mean(axis=1), (0.025, 0.975))
    return {"mean": float(pairs.mean()), "low": float(low), "high": float(high)}


@dataclass(frozen=True)
class Ground:
    """What all runs of a comparison stand on: devices, the server's speed, sizes of the model."""

    devices: Mapping[str, Device]
    server: float | None
    costs: BlockCosts

    def weights(self, seat: SeatTaken | SeatMoved) -> int:
        """Bytes of the frozen weights that a seat holds."""
        head = seat.labels == "keep"
        return near_bytes(self.costs, seat.front, seat.back, head_near=head)["weights"]


def of_run(folder: Path, label: str, seed: int, ground: Ground) -> list[Row]:
    """A finished run as rows: one per client, then one of all together.

    Bytes and operations are sums over the run; ``peak_bytes`` are near weights and the most that a
    turn held beside them, the largest client's for all together. What a method that is not
    federated would take is no question, so it is blank, and so is the simulated time of a run in
    which a client changed its device. Who never took part has no row.
    """
    result = cast("Row", json.loads((folder / "result.json").read_text("utf-8")))
    scores = cast("list[Row]", result["rows"])
    metric: str = scores[0]["metric"]  # the main one comes first
    events = list(read(folder / "events.jsonl"))
    turns = [e for e in events if isinstance(e, TurnEnded)]
    rows: list[Row] = []
    seats = [e for e in events if isinstance(e, SeatTaken | SeatMoved)]
    known = {s["client"] for s in scores}
    for seat in (e for e in seats if isinstance(e, SeatTaken) and e.client in known):
        held = [t for t in turns if t.client == seat.client]
        row: Row = {"method": label, "seed": seed, "client": seat.client, "metric": metric}
        row |= {name: _score(scores, seat.client, cell, metric) for name, cell in AFTER.items()}
        row["worst_decile"] = None
        row |= {name: _score(scores, seat.client, cell, "loss") for name, cell in LOSSES.items()}
        row |= {
            "sent_bytes": sum(t.sent_bytes for t in held),
            "received_bytes": sum(t.received_bytes for t in held),
            "client_flops": sum(_count(t, "near_flops") for t in held),
            "peak_bytes": max(ground.weights(s) for s in seats if s.client == seat.client)
            + max((_count(t, "peak_bytes") for t in held), default=0),
            "simulated_seconds": None,
        }
        rows.append(row)
    every = _all_together(rows, higher=bool(result["higher_is_better"]))
    if all(e.device == ground.devices[e.client].name for e in seats if isinstance(e, SeatMoved)):
        work = [work_of(turn) for turn in turns]
        if any(isinstance(e, Interleaved) for e in events):
            ends = finish_times(work, ground.devices, ground.server)
            every["simulated_seconds"] = None if ends is None else max(ends)
        else:
            every["simulated_seconds"] = run_seconds(work, ground.devices, ground.server)
    rows.append(every)
    if result["kind"] == "centralised":
        rows = [{**row, **dict.fromkeys(COSTS)} for row in rows]
    return rows


def _all_together(rows: Sequence[Row], *, higher: bool) -> Row:
    out: Row = {**rows[0], "client": EVERYBODY}
    named = (*AFTER, *LOSSES)
    known = {name: [row[name] for row in rows if row[name] is not None] for name in named}
    out |= {name: statistics.fmean(held) if held else None for name, held in known.items()}
    out["worst_decile"] = worst_decile(known["own"], higher=higher) if known["own"] else None
    for name in ("sent_bytes", "received_bytes", "client_flops"):
        out[name] = sum(row[name] for row in rows)
    out["peak_bytes"] = max(row["peak_bytes"] for row in rows)
    return out


def work_of(turn: TurnEnded) -> Work:
    """What a measured turn took, for the simulated clock."""
    near, far = _count(turn, "near_flops"), _count(turn, "far_flops")
    crossed = turn.sent_bytes, turn.received_bytes, _count(turn, "messages")
    return Work(turn.round, turn.wave, turn.client, Load(near, far, *crossed))


def _score(scores: Sequence[Row], client: str, cell: str, metric: str) -> float | None:
    for s in scores:
        if (s["client"], s["cell"], s["metric"]) == (client, cell, metric):
            return math.nan if s["value"] is None else float(s["value"])
    return None


def _count(turn: TurnEnded, name: str) -> int:
    found = turn.measured.get(name, 0)
    return found if isinstance(found, int) else 0


def summary(rows: Sequence[Row], *, higher: bool) -> dict[str, Row]:
    """Per method: mean and standard deviation over seeds, and gains over ``local`` per client."""
    out: dict[str, Row] = {}
    for label in dict.fromkeys(row["method"] for row in rows):
        together = [r for r in rows if r["method"] == label and r["client"] == EVERYBODY]
        out[label] = {name: _spread([r[name] for r in together]) for name in (*SCORES, *COSTS)}
        out[label]["seeds"] = len(together)
        out[label]["gain"] = _gain(rows, label, "own", higher=higher)
        out[label]["gain_global"] = _gain(rows, label, "global", higher=higher)
    return out


def _gain(rows: Sequence[Row], label: str, what: str, *, higher: bool) -> Row | None:
    def values(method: str) -> dict[tuple[int, str], float]:
        return {
            (r["seed"], r["client"]): r[what]
            for r in rows
            if r["method"] == method and r["client"] != EVERYBODY and r[what] is not None
        }

    mine, local = values(label), values("local")
    both = sorted(mine.keys() & local.keys())
    if label == "local" or not both:
        return None
    return gains([mine[k] for k in both], [local[k] for k in both], higher=higher)


def _spread(values: Sequence[float | None]) -> Row | None:
    known = [v for v in values if v is not None]
    if len(known) < len(values) or not known:
        return None
    deviation = statistics.stdev(known) if len(known) > 1 else None
    return {"mean": statistics.fmean(known), "deviation": deviation}


def frame(document: Mapping[str, Any]) -> pd.DataFrame:
    """The rows of a comparison as a DataFrame: one per method, seed and client (extra ``data``)."""
    import pandas as pd

    return pd.DataFrame(document["rows"])
