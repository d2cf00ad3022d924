"""Named cells of evaluation: who, which model, on whose data, when.

A cell is ``model/data/when``: the model a client would deploy (``personal``) or the pretrained one
(``base``), on the client's own test rows (``own``) or on the pooled test rows of all (``global``),
before or after training. What cannot be measured is absent, never 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flexp.data.examples import Examples, Shard
from flexp.data.tasks import Batch, Task
from flexp.engine.base import Assignment
from flexp.engine.local import LocalEngine
from flexp.link.metered import Ledger
from flexp.strategies.base import ClientId, Served, Strategy, Turn

EVERYBODY = "all"


@dataclass(frozen=True)
class Score:
    """One number of one cell; ``client`` "all" is the mean over clients."""

    client: ClientId
    cell: str
    metric: str
    value: float


def pooled(shards: Mapping[ClientId, Shard], each: int | None) -> Examples:
    """Everybody's test rows, at most ``each`` of a client, in order of clients."""
    picked = [shards[c].test.pick(range(min(len(shards[c].test), each or len(shards[c].test))))
              for c in sorted(shards)]
    return Examples(
        tuple(i for p in picked for i in p.ids),
        tuple(label for p in picked for label in p.labels),  # pyright: ignore
        tuple(o for p in picked for o in p.origins),
    )


def evaluate(
    engine: LocalEngine,
    strategy: Strategy[Any],
    state: Any,
    turn: Turn,
    *,
    when: str,
    global_rows: int | None = None,
) -> list[Score]:
    """Scores of every client's personal model on its own and on everybody's test rows.

    The main metric comes first; "all" rows are means over clients.
    """
    everybody = pooled(engine.shards, global_rows)
    out: list[Score] = []
    for client in sorted(engine.shards):
        work = Assignment(client, turn.seats[client], strategy.offer(state, client, turn))
        with engine.visit(strategy, work, turn, Ledger()) as (desk, offer):
            served = strategy.personal(desk, offer)
            for data, examples in (("own", engine.shards[client].test), ("global", everybody)):
                cell = f"personal/{data}/{when}"
                found = measure(served, engine.task, examples)
                out += [Score(client, cell, metric, value) for metric, value in found.items()]
    return out + means(out)


def measure(served: Served, task: Task, examples: Examples) -> dict[str, float]:
    """The task's metrics of a predictor on examples, the main one first."""
    sums: dict[str, tuple[float, float]] = {}
    # Rows of like length share a batch: padding is computed for nothing.
    order = sorted(range(len(examples)), key=lambda n: len(examples.ids[n]))
    with torch.no_grad():
        for at in range(0, len(order), 64):
            batch: Batch = task.collate(examples, order[at : at + 64])
            for metric, (value, count) in task.measure(served.predict(batch), batch.labels).items():
                held = sums.get(metric, (0.0, 0.0))
                sums[metric] = (held[0] + value, held[1] + count)
    found = task.finish(sums)
    first = {task.metric: found[task.metric]} if task.metric in found else {}
    return {**first, **found}


def means(scores: Sequence[Score]) -> list[Score]:
    """The mean over clients of every cell and metric that some client has."""
    cells: dict[tuple[str, str], list[float]] = {}
    for s in scores:
        cells.setdefault((s.cell, s.metric), []).append(s.value)
    return [
        Score(EVERYBODY, cell, metric, sum(values) / len(values))
        for (cell, metric), values in cells.items()
    ]
