"""Named cells of evaluation: who, which model, on whose data, when.

A cell is ``model/data/when``: the model a client would deploy (``personal``), on the client's own
test rows (``own``) or on the pooled test rows of all (``global``), ``after`` training or after a
round (``round-3``). What cannot be measured is absent, never 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexp.data.examples import Examples, Shard, Split
from flexp.data.federation import Space, space_of
from flexp.data.tasks import Batch, Task
from flexp.engine.base import assigned
from flexp.engine.local import LocalEngine
from flexp.link.metered import Ledger
from flexp.parcel import digest
from flexp.strategies.base import ClientId, Served, Strategy, Turn

EVERYBODY = "all"


@dataclass(frozen=True)
class Score:
    """One number of one cell; ``client`` "all" is the mean over clients."""

    client: ClientId
    cell: str
    metric: str
    value: float


def pooled(shards: Mapping[ClientId, Shard], each: int | None, split: Split = "test") -> Examples:
    """Everybody's rows of a split, at most ``each`` of a client, in order of clients."""
    held = [shards[c].split(split) for c in sorted(shards)]
    picked = [h.pick(range(min(len(h), each or len(h)))) for h in held]
    return Examples(
        tuple(i for p in picked for i in p.ids),
        tuple(label for p in picked for label in p.labels),  # pyright: ignore[reportArgumentType]
        tuple(o for p in picked for o in p.origins),
    )


def evaluate(
    engine: LocalEngine,
    strategy: Strategy[Any],
    state: Any,
    turn: Turn,
    *,
    when: str,
    clients: Sequence[ClientId] | None = None,
    global_rows: int | None = None,
    split: Split = "test",
) -> list[Score]:
    """Scores of every client's personal model on its own and on everybody's rows of a split.

    Only of ``clients``, if given: who has not come yet has no row, and gives none to the pool.
    Everybody are those with the same labels and the same task; a client that is the only one with
    its own, while others have others, has no "global" cell.
    The main metric comes first; "all" rows are means over clients. Choose settings on "val".
    """
    shards = engine.shards if clients is None else {c: engine.shards[c] for c in clients}
    everybody = pools(engine, shards, global_rows, split)
    known: dict[tuple[Space, str], dict[str, float]] = {}
    out: list[Score] = []
    for client in sorted(shards):
        work = assigned(strategy, engine, state, client, turn)
        with engine.visit(strategy, work, turn, Ledger()) as (desk, offer):
            served = strategy.personal(desk, offer)
            mine = shards[client].split(split)
            task, space = desk.task, space_of(desk.task)
            cells = {"own": measure(served, task, mine, prior=desk.prior)}
            # Who serves the same adapter says the same, wherever the cut is.
            worn = served.adapter
            alike = digest(desk.whole(worn)) if isinstance(worn, str | tuple) else client
            if space in everybody:
                same = (space, alike)
                if same not in known:
                    known[same] = measure(served, task, everybody[space])
                cells["global"] = known[same]
            for data, found in cells.items():
                cell = f"personal/{data}/{when}"
                out += [Score(client, cell, metric, value) for metric, value in found.items()]
    return out + means(out, {c: engine.task_of(c) for c in shards})


def pools(
    engine: LocalEngine, shards: Mapping[ClientId, Shard], each: int | None, split: Split
) -> dict[Space, Examples]:
    """Everybody's rows of a split, by kind of task and labels; of one's own alone there is none."""
    groups: dict[Space, dict[ClientId, Shard]] = {}
    for client, shard in shards.items():
        groups.setdefault(space_of(engine.task_of(client)), {})[client] = shard
    return {s: pooled(g, each, split) for s, g in groups.items() if len(g) > 1 or len(groups) < 2}


def measure(
    served: Served, task: Task, examples: Examples, *, prior: Tensor | None = None
) -> dict[str, float]:
    """The task's metrics of a predictor on examples, the main one first.

    ``prior`` is added to the logits: a client's own log label frequencies, on its own rows.
    """
    sums: dict[str, tuple[float, float]] = {}
    # Rows of like length share a batch: padding is computed for nothing.
    order = sorted(range(len(examples)), key=lambda n: len(examples.ids[n]))
    with torch.no_grad():
        for at in range(0, len(order), task.rows_at_once):
            batch: Batch = task.collate(examples, order[at : at + task.rows_at_once])
            logits = served.predict(batch)
            logits = logits if prior is None else logits + prior
            for metric, (value, count) in task.measure(logits, batch.labels).items():
                held = sums.get(metric, (0.0, 0.0))
                sums[metric] = (held[0] + value, held[1] + count)
    found = task.finish(sums)
    first = {task.metric: found[task.metric]} if task.metric in found else {}
    return {**first, **found}


def means(scores: Sequence[Score], tasks: Mapping[ClientId, Task]) -> list[Score]:
    """The mean over clients of every cell and metric that some client has.

    Where kinds of tasks differ, a metric is averaged over those for which it is the main one: one
    token's accuracy and one text's are not the same thing.
    """
    cells: dict[tuple[str, str], list[Score]] = {}
    for s in scores:
        cells.setdefault((s.cell, s.metric), []).append(s)
    out: list[Score] = []
    for (cell, metric), every in cells.items():
        mixed = len({tasks[s.client].name for s in every}) > 1
        held = [s for s in every if not mixed or tasks[s.client].metric == metric]
        if held:
            mean = sum(s.value for s in held) / len(held)
            out.append(Score(EVERYBODY, cell, metric, mean))
    return out
