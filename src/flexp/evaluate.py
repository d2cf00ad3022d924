"""Named cells of evaluation: who, which model, on whose data, when.

A cell is ``model/data/when``: the model a client would deploy (``personal``), on the client's own
test rows (``own``) or on the pooled test rows of all (``global``), ``after`` training or after a
round (``round-3``). What cannot be measured is absent, never 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexp.data.examples import Examples, Shard, Split
from flexp.data.federation import Space, space_of
from flexp.data.tasks import Task
from flexp.engine.base import assigned
from flexp.engine.host import Host
from flexp.engine.look import Look
from flexp.strategies.base import ClientId, Strategy, Turn

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
    engine: Host,
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
    names = sorted(engine.shards if clients is None else clients)
    shards = {c: engine.shards[c] for c in names if c in engine.shards}
    look = Look(split, pools(engine, shards, global_rows, split))
    work = [assigned(strategy, engine, state, client, turn) for client in names]
    found = engine.look(strategy, work, turn, look)
    out = [
        Score(client, f"personal/{data}/{when}", metric, value)
        for client, cells in found.items()
        for data, metrics in cells.items()
        for metric, value in metrics.items()
    ]
    return out + means(out, {c: engine.task_of(c) for c in found})


def pools(
    engine: Host, shards: Mapping[ClientId, Shard], each: int | None, split: Split
) -> dict[Space, Examples]:
    """Everybody's rows of a split, by kind of task and labels; of one's own alone there is none."""
    groups: dict[Space, dict[ClientId, Shard]] = {}
    for client, shard in shards.items():
        groups.setdefault(space_of(engine.task_of(client)), {})[client] = shard
    return {s: pooled(g, each, split) for s, g in groups.items() if len(g) > 1 or len(groups) < 2}


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
