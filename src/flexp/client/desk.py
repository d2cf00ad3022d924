"""What a client has while it works, and ``fit``, the only training loop."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import count, islice
from typing import Literal

import torch
from torch import Tensor

from flexp.client.lanes import side_by_side
from flexp.client.memory import Memory
from flexp.client.parts import LossFn, Part, rows_of
from flexp.client.session import Session
from flexp.data.examples import Batch, Shard, Split
from flexp.data.tasks import Task
from flexp.dice import Dice
from flexp.errors import AdapterError
from flexp.model.cut import Seat
from flexp.model.ops import Assign, Dot, Grad, Op, Optim, Pull, SlotSpec, Step
from flexp.model.personal import PersonalModel
from flexp.parcel import JSON, Facts, Parcel
from flexp.selection import ALL, Where, select
from flexp.tensors import (
    BlockScalars,
    Mix,
    Tensors,
    Term,
    Wear,
    add_blocks,
    slots_of,
    total,
)


@dataclass(frozen=True)
class Training:
    """How clients train unless a strategy says otherwise."""

    optim: Optim = field(default_factory=Optim)
    batch: int = 8
    steps: int | None = None
    epochs: int | None = None
    clip_norm: float | None = None
    label_prior: bool = False
    still: Literal["refuse", "allow"] = "refuse"

    def specs(self, slots: Mapping[str, SlotSpec]) -> dict[str, SlotSpec]:
        """A strategy's slots, with this optimizer where they name none."""
        return {s: replace(spec, optim=spec.optim or self.optim) for s, spec in slots.items()}


@dataclass(frozen=True)
class Drag:
    """A proximal term of ``fit``: pulls what trains towards slot ``to``.

    Adds ``weight / 2 * |slot - to|^2`` to the loss, on tensors or on LoRA products.
    """

    to: str
    weight: float
    where: Where = ALL
    form: Literal["factors", "product"] = "factors"


@dataclass
class Desk:
    """A client at work: its seat, model, shard, memory and dice. Raw rows never leave it."""

    client: str
    seat: Seat
    model: PersonalModel
    shard: Shard
    task: Task
    memory: Memory
    dice: Dice
    session: Session
    specs: Mapping[str, SlotSpec]
    training: Training
    counter: int = 0
    rows: int = 0
    prior: Tensor | None = None

    def batches(
        self,
        *,
        steps: int | None = None,
        epochs: int | None = None,
        size: int | None = None,
        split: Split = "train",
    ) -> Iterator[Batch]:
        """Shuffled batches: that many steps over repeated passes, or whole epochs.

        Without either, what the recipe says. The order depends on client and round alone.
        """
        if steps is None and epochs is None:
            steps, epochs = self.training.steps, self.training.epochs
        data = self.shard.split(split)
        size = min(size or self.training.batch, len(data))
        if steps is None:
            for epoch in range(epochs or 1):
                order = self.dice("epoch", n=epoch).shuffle(len(data))
                for at in range(0, len(order), size):
                    yield self.task.collate(data, order[at : at + size])
            return
        stream = (n for epoch in count() for n in self.dice("epoch", n=epoch).shuffle(len(data)))
        for _ in range(steps):
            yield self.task.collate(data, list(islice(stream, size)))

    def fit(
        self,
        loss: LossFn | None = None,
        *,
        wear: Wear = "personal",
        train: Mapping[str, Where] | Where = ALL,
        add: Mix = (),
        pull: Sequence[Drag] = (),
        clip_norm: float | None = None,
        batches: Iterator[Batch] | None = None,
        steps: int | None = None,
    ) -> Facts:
        """Trains slots: gradient of the loss, plus ``add``, plus pulls, clipped, one step each.

        ``train`` names slots and what of each moves; a bare ``Where`` means every slot of the
        wear. The clip is by the global norm over near and far. A step whose loss, clipped norm or
        gradient at the cut is not finite is skipped and counted. Returns loss (mean, nats), steps,
        skipped and rows.
        """
        chosen = dict.fromkeys(slots_of(wear), train) if isinstance(train, Where) else dict(train)
        clip = self.training.clip_norm if clip_norm is None else clip_norm
        losses, skipped, rows = list[float](), 0, 0
        # Threads are made when the first part asks for one.
        with ThreadPoolExecutor(self.session.window, thread_name_prefix="flexp-part") as crew:
            for batch in batches if batches is not None else self.batches(steps=steps):
                losses.append(self._descend(batch, loss, wear, chosen, crew))
                rows += batch.rows
                self._bend(chosen, add, pull)
                skipped += not self._move(chosen, losses[-1], clip)
        good = [x for x in losses if math.isfinite(x)]
        mean = sum(good) / len(good) if good else None
        return {"loss": mean, "steps": len(losses), "skipped": skipped, "rows": rows}

    def _descend(
        self,
        batch: Batch,
        loss: LossFn | None,
        wear: Wear,
        chosen: Mapping[str, Where],
        crew: ThreadPoolExecutor,
    ) -> float:
        """The loss of a batch; its gradient goes into the slots "<name>@g".

        Of a batch in parts each part counts by what its mean is over, so that the sum is the
        batch's own. A loss of the caller's counts as a mean over the same.
        """
        self.counter += 1
        parts = batch.parts(self.seat.accumulate) if self.seat.accumulate > 1 else [batch]
        works: list[Part] = []
        total, row = 0.0, 0
        with self.model.training(chosen, self.dice("dropout", step=self.counter)):
            for n, part in enumerate(parts):
                model = self.model.twin(n) if parts[1:] else self.model
                share = part.counted / batch.counted if parts[1:] else None
                works.append(Part(model, part, rows_of(wear, row, part.rows), loss, share))
                row += part.rows
            together = bool(parts[1:]) and self.session.window > 1 and self.model.far is not None
            descend, apart = [work.descend for work in works], (work.descend() for work in works)
            done = side_by_side(self.session, descend, crew) if together else apart
            for work, value in zip(works, done, strict=True):
                self._collect(work.model)
                total += float(value)
                if not together or work is works[-1]:  # what is under way together is one step
                    self.session.next_step()
        self._gathered(list(chosen), [f"{slot}@g" for slot in chosen])
        return total

    def _bend(self, chosen: Mapping[str, Where], add: Mix, pull: Sequence[Drag]) -> None:
        for slot, where in chosen.items():
            grad = f"{slot}@g"
            if add:
                self.assign(grad, (Term(grad), *add), where=where)
            for drag in pull:
                if drag.weight:
                    both = where & drag.where
                    self._apply(Pull(slot, drag.to, drag.weight, grad, both, drag.form))

    def _move(self, chosen: Mapping[str, Where], loss: float, clip: float | None) -> bool:
        """One step of each slot; False, and no step, if the loss or the norm is not finite."""
        norm = self._norm(chosen) if clip is not None else 0.0
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return False
        scale = min(1.0, clip / (norm + 1e-6)) if clip is not None else 1.0
        for slot, where in chosen.items():
            self.step(slot, scale=scale, where=where)
        if any(self.specs[slot].eager for slot in chosen if slot in self.specs):
            self.session.flush()
        return True

    def _norm(self, chosen: Mapping[str, Where]) -> float:
        dots = [self.dot(f"{s}@g", f"{s}@g", where=w) for s, w in chosen.items()]
        return math.sqrt(sum(total(d) for d in dots))

    # ---- verbs: the same on both sides of the cut

    def grad(self, loss: Tensor, of: Sequence[str], into: Sequence[str]) -> None:
        """Differentiates a loss into slots, without a step; other slots' gradients are dropped."""
        self._differentiate(loss)
        self._gathered(of, into)

    def _differentiate(self, loss: Tensor) -> None:
        """Adds the gradient of a loss to what is gathered, and counts its rows on both sides."""
        if loss.requires_grad:
            loss.backward()  # pyright: ignore[reportUnknownMemberType]
        self._collect(self.model)
        self.session.next_step()

    def _collect(self, model: PersonalModel) -> None:
        """Adds what a graph's leaves hold to what is gathered."""
        self.rows, model.rows = self.rows + model.rows, 0
        for slot, held in model.leaves.grads().items():
            model.near.gather(slot, held)
        model.leaves = type(model.leaves)()

    def _gathered(self, of: Sequence[str], into: Sequence[str]) -> None:
        self._apply(Grad(tuple(of), tuple(into)))

    def step(
        self, slot: str, *, grad: str | None = None, scale: float = 1.0, where: Where = ALL
    ) -> None:
        """One optimizer step of a slot along a gradient slot."""
        self._apply(Step(slot, grad or f"{slot}@g", scale, where))

    def assign(
        self,
        slot: str,
        mix: Mix,
        *,
        where: Where = ALL,
        clip: tuple[float, float] | None = None,
    ) -> None:
        """``slot := mix`` where selected."""
        plain = tuple(
            Term(t.slot, float(t.coef.detach()) if isinstance(t.coef, Tensor) else t.coef, t.times)
            for t in mix
        )
        self._apply(Assign(slot, plain, where, clip))

    def dot(self, a: str, b: str, *, where: Where = ALL) -> BlockScalars:
        """The inner product of two slots per block; ``tensors.total`` sums it."""
        op = Dot(a, b, where)
        near = self.model.near.do([op])[0]
        return near if self.model.far is None else add_blocks(near, self.session.do([op])[-1])

    def _apply(self, op: Op) -> None:
        self.model.near.do([op])
        if self.model.far is not None:
            self.session.queue(op)

    def score(self, wear: Wear = "personal", split: Split = "val") -> Facts:
        """The task's metrics of a wear on a split of the client's own data."""
        data = self.shard.split(split)
        sums: dict[str, tuple[float, float]] = {}
        with torch.no_grad():
            for at in range(0, len(data), self.task.rows_at_once):
                rows = range(at, min(at + self.task.rows_at_once, len(data)))
                batch = self.task.collate(data, list(rows))
                logits = self.model.logits(batch, wear)
                logits = logits if self.prior is None else logits + self.prior
                found = self.task.measure(logits, batch.labels)
                for metric, (value, count) in found.items():
                    held = sums.get(metric, (0.0, 0.0))
                    sums[metric] = (held[0] + value, held[1] + count)
        return dict(self.task.finish(sums))

    def reply(
        self,
        *slots: str,
        where: Where = ALL,
        tensors: Mapping[str, Tensor] | None = None,
        facts: Mapping[str, JSON] | None = None,
    ) -> Parcel:
        """What the client gives back: near tensors now, far ones by name (the server has them)."""
        place = self.model.near.place
        near = {s: select(self.model.near[s], where, place) for s in slots}
        return Parcel(near, dict(tensors or {}), dict(facts or {}), dict.fromkeys(slots, where))

    def whole(self, wear: Wear = "personal") -> Tensors:
        """The adapter that a wear stands for, near and far together: what PEFT would load."""
        if not isinstance(wear, str):
            if not isinstance(wear, tuple):
                raise AdapterError("A stacked or per-row wear is not one PEFT adapter.")
            self.assign("export@tmp", wear)
            wear = "export@tmp"
        out = dict(self.model.near[wear])
        if self.model.far is not None:
            out |= self.session.fetch(wear, far=True)
        return dict(sorted(out.items()))
