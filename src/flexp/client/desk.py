"""What a client has while it works, and its verbs: the same on both sides of the cut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, islice
from typing import Literal

import torch
from torch import Tensor

from flexp.client.fit import Fit
from flexp.client.memory import Memory
from flexp.client.parts import LossFn
from flexp.client.session import Session
from flexp.data.examples import Batch, Examples, Shard, Split, grouped
from flexp.data.tasks import Task
from flexp.dice import Dice
from flexp.errors import AdapterError, StrategyError
from flexp.model.backbone import Backbone
from flexp.model.cut import Seat
from flexp.model.ops import Assign, Dot, Grad, Op, Optim, SlotSpec, Step
from flexp.model.personal import PersonalModel
from flexp.parcel import JSON, Facts, Parcel
from flexp.products import lora_pairs, worn_sum
from flexp.selection import ALL, Where, select
from flexp.tensors import (
    BlockScalars,
    Mix,
    Stacked,
    Tensors,
    Wear,
    add_blocks,
    plain,
    slots_of,
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
    ahead: bool = False  # the front of a batch lacks the last step, and need not wait for it
    cache: int = 0  # bytes of hidden states that a client keeps in front of what trains
    group_by_length: bool = False  # batches of rows about as long

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
    probe: Backbone | None = None  # a small model, the same for all, that each has whole

    @property
    def steps(self) -> int:
        """How many steps the recipe gives a turn."""
        told, rows = self.training, len(self.shard.train)
        passes = -(-rows // min(told.batch, rows))
        return told.steps if told.steps is not None else passes * (told.epochs or 1)

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
                order = self._order(data, epoch, size)
                for at in range(0, len(order), size):
                    yield self.task.collate(data, order[at : at + size])
            return
        passes = (self._order(data, n, size, begun=n * len(data) % size) for n in count())
        stream = (row for order in passes for row in order)
        for _ in range(steps):
            yield self.task.collate(data, list(islice(stream, size)))

    def _order(self, data: Examples, epoch: int, size: int, *, begun: int = 0) -> Sequence[int]:
        """The rows of one pass."""
        order = self.dice("epoch", n=epoch).shuffle(len(data))
        if not self.training.group_by_length:
            return order
        lengths = [len(row) for row in data.ids]
        return grouped(order, lengths, size, self.dice("groups", n=epoch), begun=begun)

    def fit(
        self,
        loss: LossFn | None = None,
        *,
        wear: Wear = "personal",
        train: Mapping[str, Where] | Where = ALL,
        add: Mix = (),
        pull: Sequence[Drag] = (),
        clip_norm: float | None = None,
        apart: bool = False,
        fade: float = 1.0,
        counts: Mapping[str, float] | None = None,
        batches: Iterator[Batch] | None = None,
        steps: int | None = None,
    ) -> Facts:
        """Trains slots: gradient of the loss, plus ``add``, plus pulls, clipped, one step each.

        ``train`` names slots and what of each moves; a bare ``Where`` means every slot of the
        wear. The clip is by the global norm over near and far, and over all slots unless these are
        clipped ``apart``. Each step's rate is ``fade`` times that of the one before, and ``counts``
        says how much of it counts for a slot. A step whose loss, clipped norm or gradient at the
        cut is not finite is skipped on both sides and counted. Returns loss (mean, nats), steps,
        skipped and rows.

        With ``Training.ahead`` the front of each batch but the first wears what trains as it was
        before the last step, in all forwards of its loss; tail and trunk wear it as it is. There a
        step is decided without its near gradient, and a clip is a StrategyError.
        """
        chosen = dict.fromkeys(slots_of(wear), train) if isinstance(train, Where) else dict(train)
        clip = self.training.clip_norm if clip_norm is None else clip_norm
        fit = Fit(self, loss, wear, chosen, add, pull, clip, apart, fade, counts or {})
        return fit.run(batches if batches is not None else self.batches(steps=steps))

    # ---- verbs: the same on both sides of the cut

    def grad(self, loss: Tensor, of: Sequence[str], into: Sequence[str]) -> None:
        """Differentiates a loss into slots, without a step; other slots' gradients are dropped."""
        self._differentiate(loss)
        self._gathered(of, into)

    def _differentiate(self, loss: Tensor) -> None:
        """Adds the gradient of a loss to what is gathered, and counts its rows on both sides."""
        if loss.requires_grad:
            loss.backward()  # pyright: ignore[reportUnknownMemberType]
        self.collect(self.model)
        self.session.next_step()

    def collect(self, model: PersonalModel) -> None:
        """Adds what a graph's leaves hold to what is gathered."""
        self.rows, model.rows = self.rows + model.rows, 0
        for slot, held in model.leaves.grads().items():
            model.near.gather(slot, held)
        model.leaves = type(model.leaves)()

    def _gathered(self, of: Sequence[str], into: Sequence[str]) -> None:
        self.apply(Grad(tuple(of), tuple(into)))

    def step(
        self, slot: str, *, grad: str | None = None, scale: float = 1.0, where: Where = ALL
    ) -> None:
        """One optimizer step of a slot along a gradient slot."""
        self.apply(Step(slot, grad or f"{slot}@g", scale, where))

    def assign(
        self,
        slot: str,
        mix: Mix,
        *,
        where: Where = ALL,
        clip: tuple[float, float] | None = None,
    ) -> None:
        """``slot := mix`` where selected."""
        self.apply(Assign(slot, plain(mix), where, clip))

    def dot(
        self,
        a: str,
        b: str,
        *,
        where: Where = ALL,
        form: Literal["factors", "product"] = "factors",
    ) -> BlockScalars:
        """The inner product of two slots per block; ``tensors.total`` sums it."""
        op = Dot(a, b, where, form)
        near = self.model.near.do([op])[0]
        return near if self.model.far is None else add_blocks(near, self.session.do([op])[-1])

    def apply(self, *ops: Op) -> None:
        """Does operations on both sides: near ones now, far ones with the next forward."""
        for op in ops:
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

    def loss(self, wear: Wear = "personal", split: Split = "val") -> float:
        """The mean over a split of what the client minimises, in nats.

        StrategyError if it has no row there.
        """
        if not len(self.shard.split(split)):
            raise StrategyError(
                f'Client "{self.client}" has no {split} rows to compare models on. Set data.split.'
            )
        with torch.no_grad():
            batches = list(self.batches(epochs=1, split=split))
            sums = [float(self.model.loss(batch, wear)) * batch.counted for batch in batches]
        return sum(sums) / sum(batch.counted for batch in batches)

    def reply(
        self,
        *slots: str,
        where: Mapping[str, Where] | Where = ALL,
        tensors: Mapping[str, Tensor] | None = None,
        facts: Mapping[str, JSON] | None = None,
    ) -> Parcel:
        """What the client gives back: near tensors now, far ones by name (the server has them).

        ``where`` is what of the slots, or names slots and what of each.
        """
        given = dict.fromkeys(slots, where) if isinstance(where, Where) else dict(where)
        place = self.model.near.place
        near = {s: select(self.model.near[s], part, place) for s, part in given.items()}
        return Parcel(near, dict(tensors or {}), dict(facts or {}), given)

    def whole(self, wear: Wear = "personal") -> Tensors:
        """The adapter that a wear stands for, near and far together: what PEFT would load."""
        if isinstance(wear, Stacked):
            return self._stack(plain(wear.mix))
        if not isinstance(wear, str):
            if not isinstance(wear, tuple):
                raise AdapterError("A wear per row is not one PEFT adapter.")
            self.assign("export@tmp", wear)
            wear = "export@tmp"
        out = dict(self.model.near[wear])
        if self.model.far is not None:
            out |= self.session.fetch(wear, far=True)
        return dict(sorted(out.items()))

    def _stack(self, mix: Mix) -> Tensors:
        """A stack as one adapter: ranks of pairs add up, everything else is summed."""
        held = [(self.whole((replace(term, coef=1.0),)), float(term.coef)) for term in mix]
        pairs = lora_pairs(held[0][0])
        if any(f"{path}.lora_magnitude_vector" in held[0][0] for path in pairs):
            raise AdapterError("A stack of pairs with magnitudes is not one PEFT adapter.")
        out: Tensors = {}
        for one, coef in held:
            for k, v in one.items():
                out[k] = out[k] + v * coef if k in out else v * coef
        for a, b in pairs.values():
            out[a], out[b] = worn_sum([(one[a], one[b], coef) for one, coef in held])
        return out
