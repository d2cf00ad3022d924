"""The training loop of ``Desk.fit``: batches in parts, and one step of each slot for each batch.

With ``Training.ahead`` the front of a batch wears what the slots were before the last step, so that
it can be computed and sent while the server is at the backward of the batch before. That is so
whether anything is sent ahead or not, so the numbers are the same over any link.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from flexp.client.lanes import Crew, UnderWay
from flexp.client.parts import LossFn, Part, rows_of
from flexp.data.examples import Batch
from flexp.errors import StrategyError
from flexp.model.ops import Assign, Grad, Op, Pull, Step
from flexp.model.slots import Slots
from flexp.parcel import Facts
from flexp.selection import Where
from flexp.tensors import Mix, Term, Wear, plain, total

if TYPE_CHECKING:
    from flexp.client.desk import Desk, Drag


@dataclass
class Fit:
    """One call of ``Desk.fit``: what it was asked for, and what has come of it so far."""

    desk: Desk
    loss: LossFn | None
    wear: Wear
    chosen: Mapping[str, Where]
    add: Mix
    pull: Sequence[Drag]
    clip: float | None
    apart: bool = False
    fade: float = 1.0
    counts: Mapping[str, float] = field(default_factory=dict[str, float])
    losses: list[float] = field(default_factory=list[float])
    skipped: int = 0
    rows: int = 0

    def __post_init__(self) -> None:
        if self.ahead and self.clip is not None:
            raise StrategyError(
                "With link.ahead the far step is sent before the near gradient is there, so it "
                "cannot be clipped by the norm of both. Switch link.ahead off, or do not clip."
            )

    @property
    def ahead(self) -> bool:
        """Whether fronts lack a step; a client with the whole model has no reason to."""
        return self.desk.training.ahead and self.desk.model.far is not None

    def run(self, batches: Iterator[Batch]) -> Facts:
        """Trains on all batches: loss (mean, nats), steps, skipped and rows."""
        session = self.desk.session
        sends_ahead = self.ahead and session.posts
        # Who waits for the last gradient still has a thread when the next part begins.
        with Crew(session, session.window * (2 if sends_ahead else 1)) as crew:
            if sends_ahead:
                self._ahead(batches, crew)
            else:
                self._in_turn(batches, crew)
        good = [x for x in self.losses if math.isfinite(x)]
        mean = sum(good) / len(good) if good else None
        steps = len(self.losses)
        return {"loss": mean, "steps": steps, "skipped": self.skipped, "rows": self.rows}

    # ---- one batch after another

    def _in_turn(self, batches: Iterator[Batch], crew: Crew) -> None:
        desk, past = self.desk, None
        for batch in batches:
            with self._training():
                works = self._parts(batch, past)
                value = added(self._descended(works, crew))
            self._counted(works, value)
            desk.apply(*self._bent())
            past = self._now() if self.ahead else None
            norms = {} if self.clip is None else self._norms()
            if self._moves(value, *norms.values()):
                self._move(norms)

    def _descended(self, works: Sequence[Part], crew: Crew) -> Iterator[Tensor]:
        """The losses of a batch's parts; their gradients are gathered."""
        desk = self.desk
        together = bool(works[1:]) and desk.session.window > 1 and desk.model.far is not None
        descend, apart = [work.descend for work in works], (work.descend() for work in works)
        done = crew.begin(descend).results() if together else apart
        for work, value in zip(works, done, strict=True):
            desk.collect(work.model)
            if not together or work is works[-1]:  # what is under way together is one step
                desk.session.next_step()
            yield value

    def _move(self, norms: Mapping[str, float]) -> None:
        desk, clip = self.desk, self.clip or 0.0
        desk.apply(*self._steps({s: min(1.0, clip / (n + 1e-6)) for s, n in norms.items()}))
        if any(desk.specs[slot].eager for slot in self.chosen if slot in desk.specs):
            desk.session.flush()

    def _norms(self) -> dict[str, float]:
        """By slot the norm that its step is clipped by: that of all, or its own."""
        chosen = self.chosen.items()
        squares = {s: total(self.desk.dot(f"{s}@g", f"{s}@g", where=w)) for s, w in chosen}
        if self.apart:
            return {slot: math.sqrt(square) for slot, square in squares.items()}
        return dict.fromkeys(squares, math.sqrt(sum(squares.values())))

    # ---- the next batch sent ahead of the gradient of this one

    def _ahead(self, batches: Iterator[Batch], crew: Crew) -> None:
        """While a batch waits for its gradient, the next one's front is computed and sent.

        The server hears what it hears of one batch after another, in that order: the far step
        rides on the next forward, behind the backward.
        """
        near, session = self.desk.model.near, self.desk.session
        now = self._sent_off(batches, None, crew)
        while now is not None:
            works, under_way = now
            with crew.baton(under_way.through):
                value = added(under_way.values())
                self._counted(works, value)
                ops = [*self._bent(), *(self._steps() if self._moves(value) else ())]
                session.queue(*ops)
                session.next_step()
                now = self._sent_off(batches, under_way, crew)
            for work, _ in zip(works, under_way.results(), strict=True):
                self.desk.collect(work.model)
            with crew.baton():
                near.do(ops)
                under_way.settled = True

    def _sent_off(
        self, batches: Iterator[Batch], before: UnderWay | None, crew: Crew
    ) -> tuple[list[Part], UnderWay] | None:
        """The next batch on its way; None if there is no more."""
        batch = next(batches, None)
        if batch is None:
            return None
        with self._training():
            works = self._parts(batch, None if before is None else self._now())
        return works, crew.begin([work.descend for work in works], before)

    # ---- what both ways are made of

    def _training(self) -> AbstractContextManager[None]:
        """Within this, the model is as the next batch trains it."""
        desk = self.desk
        desk.counter += 1
        return desk.model.training(self.chosen, desk.dice("dropout", step=desk.counter))

    def _parts(self, batch: Batch, past: Slots | None) -> list[Part]:
        """The parts of a batch, each with a graph of its own where there may be several.

        Each part counts by what its mean is over, so that the sum is the batch's own. A loss of the
        caller's counts as a mean over the same.
        """
        model, count = self.desk.model, self.desk.seat.accumulate
        parts = batch.parts(count) if count > 1 else [batch]
        if not parts[1:]:
            alone = model.twin(past=past, ahead=True) if self.ahead else model
            return [Part(alone, batch, self.wear, self.loss, None)]
        works, row = list[Part](), 0
        for n, part in enumerate(parts):
            wear, share = rows_of(self.wear, row, part.rows), part.counted / batch.counted
            works.append(
                Part(model.twin(n, past=past, ahead=self.ahead), part, wear, self.loss, share)
            )
            row += part.rows
        return works

    def _now(self) -> Slots:
        """The near slots as they are, whatever steps come: what trains is kept, the rest stays."""
        near = self.desk.model.near
        return replace(near, values={s: near[s] for s in self.chosen}, missing=near.__getitem__)

    def _counted(self, works: Sequence[Part], value: float) -> None:
        self.losses.append(value)
        self.rows += sum(work.batch.rows for work in works)

    def _moves(self, *numbers: float) -> bool:
        """Whether there is a step: not if the loss or a norm is not finite."""
        good = all(map(math.isfinite, numbers))
        self.skipped += not good
        return good

    def _bent(self) -> list[Op]:
        """The gathered gradient into the slots "<name>@g", with what is added and the pulls."""
        ops: list[Op] = [Grad(tuple(self.chosen), tuple(f"{slot}@g" for slot in self.chosen))]
        for slot, where in self.chosen.items():
            grad = f"{slot}@g"
            if self.add:
                ops.append(Assign(grad, plain((Term(grad), *self.add)), where))
            for drag in self.pull:
                if drag.weight:
                    both = where & drag.where
                    ops.append(Pull(slot, drag.to, drag.weight, grad, both, drag.form))
        return ops

    def _steps(self, scales: Mapping[str, float] | None = None) -> list[Op]:
        scales, fade = scales or {}, self.fade ** (len(self.losses) - 1)
        shares = {slot: fade * self.counts.get(slot, 1.0) for slot in self.chosen}
        chosen = self.chosen.items()
        return [Step(s, f"{s}@g", scales.get(s, 1.0), w, shares[s]) for s, w in chosen]


def together(runs: Sequence[Facts]) -> Facts:
    """The facts of several runs as those of one: the loss is the mean over steps that counted."""
    told: Any = runs
    out = {k: sum(one[k] for one in told) for k in ("steps", "skipped", "rows")}
    good = [(one["loss"], one["steps"] - one["skipped"]) for one in told]
    good = [(loss, count) for loss, count in good if loss is not None and count]
    steps = sum(count for _, count in good)
    loss = sum(loss * count for loss, count in good) / steps if steps else None
    return {"loss": loss, **out}


def added(values: Iterable[Tensor]) -> float:
    """The sum of the parts' losses, one after another: ``sum`` would round otherwise."""
    out = 0.0
    for value in values:
        out += float(value)
    return out
