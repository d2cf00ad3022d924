"""What is looked at between turns: a client's personal model, on its own and everybody's rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flexp.client.desk import Desk
from flexp.data.examples import Examples, Split
from flexp.data.federation import Space, space_of
from flexp.data.tasks import Batch, Task
from flexp.parcel import digest
from flexp.strategies.base import Served

Cells = dict[str, dict[str, float]]  # metrics by whose data: "own", "global"


@dataclass(frozen=True)
class Look:
    """A split to score, and everybody's rows of it by kind of task and labels.

    ``known`` has scores on everybody's rows of adapters that were seen already.
    """

    split: Split = "test"
    everybody: Mapping[Space, Examples] = field(default_factory=dict[Space, Examples])
    known: dict[tuple[Space, str], dict[str, float]] = field(
        default_factory=dict[tuple[Space, str], dict[str, float]]
    )

    def at(self, desk: Desk, served: Served) -> Cells:
        """The scores at a desk; "global" only if there are such rows."""
        space = space_of(desk.task)
        mine = desk.shard.split(self.split)
        cells = {"own": measure(served, desk.task, mine, prior=desk.prior)}
        if space in self.everybody:
            # Who serves the same adapter says the same, wherever the cut is.
            worn = served.adapter
            alike = digest(desk.whole(worn)) if isinstance(worn, str | tuple) else desk.client
            same = (space, alike)
            if same not in self.known:
                self.known[same] = measure(served, desk.task, self.everybody[space])
            cells["global"] = self.known[same]
        return cells


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
