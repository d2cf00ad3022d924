"""``PersonalModel``: what a strategy trains, whole or cut, without knowing which."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from flexp.dice import Dice
from flexp.errors import AdapterError, CutError
from flexp.model.backbone import Backbone
from flexp.model.cut import Seat
from flexp.model.dress import Leaves, Train, dress, dropping, spread
from flexp.model.far import Ask, Crossing, Far, Until
from flexp.model.prefix import Entry, Prefix, Wearer
from flexp.model.prompts import AT_CUT, entered, taken_out, widened
from flexp.model.slots import Slots
from flexp.model.surgery import operated
from flexp.model.worn import Worn
from flexp.selection import ALL, Where
from flexp.tensors import PerRow, Stacked, Tensors, Wear, slots_of, terms


class Start(NamedTuple):
    """The inputs of a forward, and what enters the first block if that is not the model's own."""

    inputs: dict[str, Tensor]
    feed: Tensor | None


class Inputs(Protocol):
    """A batch as the model sees it: named inputs and labels, one row per example."""

    @property
    def inputs(self) -> Mapping[str, Tensor]: ...
    @property
    def labels(self) -> Tensor: ...


class Objective(Protocol):
    """The task's own loss, in nats, averaged over rows or tokens."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor: ...


@runtime_checkable
class Fused(Protocol):
    """An objective that takes what the output embedding reads, and never makes all logits."""

    def fused(self, hidden: Tensor, output: nn.Linear, labels: Tensor) -> Tensor: ...


class PersonalModel:
    """One client's model on the shared backbone: near slots here, far slots behind ``far``.

    Not an ``nn.Module``: it owns no parameter of the backbone, and must not move or save it.
    """

    def __init__(
        self,
        backbone: Backbone,
        seat: Seat,
        near: Slots,
        *,
        task: Objective,
        far: Far | None = None,
        layout: Sequence[str] = (),
        dropout: float = 0.0,
        prefix: Prefix | None = None,
        moves: Mapping[tuple[str, Where], int] | None = None,
    ) -> None:
        self.backbone, self.seat, self.near = backbone, seat, near
        self.past: Slots | None = None  # what the front wears instead, if it lacks a step
        self.task, self.far, self.layout = task, far, tuple(layout)
        self.prefix = prefix  # what the front gave for rows of earlier batches, if it is kept
        self.moves = moves  # how often parts of slots were changed in this turn, near and far
        self.turn = object()
        self.leaves = Leaves()
        self.train: Train = None
        self.dropout_rate = dropout
        self.dropout: Dice | None = None
        self.calls = 0
        self.rows = 0  # of the largest forward that was differentiated since the last step
        if far is None and not seat.near_only(backbone.depth):
            raise CutError(f"A seat with cut {seat.cut} needs a server for the blocks between.")

    @contextmanager
    def training(self, train: Train, dropout: Dice | None) -> Generator[None]:
        """Within this, only selected tensors get gradients, and dropout is on."""
        before = self.train, self.dropout
        self.train, self.dropout, self.calls = train, dropout, 0
        try:
            yield
        finally:
            self.train, self.dropout = before

    def twin(
        self, part: int | None = None, *, past: Slots | None = None, ahead: bool = False
    ) -> PersonalModel:
        """The same model with a graph of its own; for a part of a batch, with its own dropout dice.

        ``past`` are the near slots that its front wears (None: those that there are). ``ahead``: it
        begins before the last step is done, which it must meet at the server.
        """
        twin = copy.copy(self)
        twin.leaves, twin.calls, twin.rows, twin.past = Leaves(), 0, 0, past
        twin.moves = None if ahead else twin.moves
        if twin.dropout is not None and part is not None:
            twin.dropout = twin.dropout("part", n=part)
        return twin

    def logits(
        self, batch: Inputs, wear: Wear = "personal", *, near: Tensors | None = None
    ) -> Tensor:
        """Logits [rows, classes] or [rows, length, vocabulary].

        ``near`` replaces near tensors of the same names for this call, in the graph.
        """
        return self._forward(batch, wear, "logits", near)

    def loss(self, batch: Inputs, wear: Wear = "personal") -> Tensor:
        """The task's loss in nats, at the client or, with labels "loss", at the server."""
        if self.seat.labels == "loss":
            return self._forward(batch, wear, "loss", None)
        output = self.backbone.output
        if self.seat.labels == "keep" and output is not None and isinstance(self.task, Fused):
            return self.task.fused(self._forward(batch, wear, "tap", None), output, batch.labels)
        return self.task.loss(self.logits(batch, wear), batch.labels)

    def hidden(
        self, batch: Inputs, wear: Wear = "personal", *, at: Literal["cut", "last"] = "last"
    ) -> Tensor:
        """The hidden state [rows, length, width] at the first cut, or after the last block."""
        if at == "last":
            return self._forward(batch, wear, "hidden", None)
        worn, start = self._begin(batch, wear, None)[:2]
        return self._near(start.inputs, worn, last=self.seat.cut.front, feed=start.feed)

    # ---- inside

    def _begin(
        self, batch: Inputs, wear: Wear, near: Tensors | None
    ) -> tuple[Worn, Start, list[Tensor | None], Dice | None]:
        depth = self.backbone.depth
        coefs: list[Tensor | None] = [
            spread(t.coef, depth) if isinstance(t.coef, Tensor) else None for t in terms(wear)
        ]
        dice = None
        noisy = isinstance(wear, Stacked) and wear.noise
        if self.dropout is not None and (self.dropout_rate or noisy):
            dice = self.dropout("call", n=self.calls)
            self.calls += 1
        worn = self._worn(self.past or self.near, wear, coefs, near, dice)
        return worn, Start(*entered(self.backbone, batch.inputs, worn.inputs)), coefs, dice

    def _worn(
        self,
        slots: Slots,
        wear: Wear,
        coefs: Sequence[Tensor | None],
        near: Tensors | None,
        dice: Dice | None,
    ) -> Worn:
        worn = dress(slots, wear, coefs, self.train, self.leaves, over=near)
        return dropping(worn, self.dropout_rate, dice)

    def _forward(
        self, batch: Inputs, wear: Wear, until: Until | Literal["tap"], near: Tensors | None
    ) -> Tensor:
        worn, start, coefs, dice = self._begin(batch, wear, near)
        inputs, put_in = start.inputs, worn.behind
        rows = len(next(iter(inputs.values())))
        if isinstance(wear, PerRow) and len(wear.row) != rows:
            raise AdapterError(f"{len(wear.row)} rows wear something, but the batch has {rows}.")
        depth, cut = self.backbone.depth, self.seat.cut
        stop = depth if until == "hidden" else None
        tap, whole = until == "tap", self.seat.near_only(depth)
        kept = near is None and start.feed is None and not worn.operated
        entry = self._entry(inputs, wear, worn) if kept else None
        way = {"feed": start.feed} if entry is None else {"first": entry.first, "feed": entry.feed}
        if whole or (entry is not None and entry.first > cut.front):
            out = self._near(inputs, worn, last=stop, tap=tap, **way)
        else:
            front = self._near(inputs, worn, last=cut.front, **way)
            front, inputs = operated(front, inputs, worn.inputs, "cut")
            ends_far = self.seat.labels != "keep"
            ask = Ask(
                wear=_bare(wear),
                train=self.train,
                until=until if ends_far and until != "tap" else "hidden",
                shapes={k: tuple(v.shape) for k, v in inputs.items()},
                mask=inputs.get("attention_mask"),
                labels=batch.labels if until == "loss" else None,
                dropout=dice,
                rows=entry.rows if entry is not None and entry.first == cut.front else (),
                wants=front.requires_grad,
            )
            out = self._cross(ask, front, [c for c in coefs if c is not None])
            more = out.shape[1] - front.shape[1] if out.dim() == 3 and front.dim() == 3 else 0
            put_in += more  # by the server, at the cut
            if not ends_far:
                first = depth - cut.back
                if self.past is not None:
                    worn = self._worn(self.near, wear, coefs, near, dice)
                if more:
                    shapes, mask = widened(ask.shapes, ask.mask, more)
                    inputs = self.backbone.blanks(shapes, mask)
                out = self._near(inputs, worn, first=first, last=stop, feed=out, tap=tap)
        if until in ("logits", "tap") and out.dim() == 3:
            out = taken_out(out[:, worn.front :], put_in)
        if out.requires_grad:
            count = partial(self._count, rows)
            out.register_hook(count)  # pyright: ignore[reportUnknownMemberType]
        return out

    def _entry(self, inputs: Mapping[str, Tensor], wear: Wear, worn: Worn) -> Entry | None:
        """Where a forward that trains begins, if what is in front of that is kept."""
        if self.prefix is None or self.train is None or not torch.is_grad_enabled():
            return None
        depth, front, drops = self.backbone.depth, self.seat.cut.front, worn.dice is not None
        still = self.moves is not None and self.seat.labels == "keep" and not drops
        still = still and AT_CUT not in self.layout and not self._far_trains(wear, self.train)
        most = depth if self.far is None or still else front
        slots = self.past or self.near
        now = Wearer(slots, wear, self.train, drops=drops, front=front, far=self._token)
        return self.prefix.entry(now, inputs, most, partial(self._up_to, wear, worn))

    def _up_to(self, wear: Wear, worn: Worn, inputs: Mapping[str, Tensor], last: int) -> Tensor:
        """The hidden state in front of a block, that may lie behind the server's."""
        front = self.seat.cut.front
        out = self._near(inputs, worn, last=min(last, front))
        if last > front and self.far is not None:
            ask = Ask(
                wear=_bare(wear),
                train=self.train,
                until="hidden",
                shapes={k: tuple(v.shape) for k, v in inputs.items()},
                mask=inputs.get("attention_mask"),
                wants=False,
            )
            first = self.backbone.depth - self.seat.cut.back
            out = self._near(inputs, worn, first=first, last=last, feed=self._cross(ask, out, []))
        return out

    def _token(self, wear: Wear) -> object:
        """What a wear is at the server: the same as long as nothing of it was changed there."""
        slots, moves = slots_of(wear), self.moves or {}
        return self.turn, sum(n for (s, w), n in moves.items() if s in slots and self._is_far(w))

    def _is_far(self, where: Where) -> bool:
        """Whether a selection takes anything that is at the server."""
        places = ((k, self.near.place(k)) for k in self.layout)
        return any(p.side == "far" and where.holds(k, p) for k, p in places)

    def _near(self, inputs: Mapping[str, Tensor], worn: Worn, **way: Any) -> Tensor:
        again = self.seat.near_blocks(self.backbone.depth)[: self.seat.recompute]
        return self.backbone.run(inputs, worn, again=again, **way)

    def _count(self, rows: int, grad: Tensor) -> None:
        del grad
        self.rows = max(self.rows, rows)

    def _cross(self, ask: Ask, hidden: Tensor, coefs: list[Tensor]) -> Tensor:
        far = self.far
        if far is None:
            raise CutError("This model has no link to a server.")
        keep = torch.is_grad_enabled() and (
            hidden.requires_grad
            or any(c.requires_grad for c in coefs)
            or self._far_trains(ask.wear, ask.train)
        )
        if not keep:
            plain = [c.detach() for c in coefs]
            return far.forward(ask, hidden.detach(), plain, keep=False)[1]
        # Far slots train even when nothing in the front does, so the graph must reach the trunk.
        hidden = hidden if ask.wants else hidden.detach().requires_grad_()
        apply = cast(Callable[..., Tensor], Crossing.apply)  # pyright: ignore[reportUnknownMemberType]
        return apply(far, ask, hidden, *coefs)

    def _far_trains(self, wear: Wear, train: Train) -> bool:
        wheres = [ALL if train is None else train.get(s, ~ALL) for s in slots_of(wear)]
        return any(self._is_far(where) for where in wheres)


def _bare(wear: Wear) -> Wear:
    """The wear with learned coefficients left out: their values travel as tensors."""
    if isinstance(wear, str | PerRow):
        return wear
    mix = tuple(
        replace(t, coef=float("nan")) if isinstance(t.coef, Tensor) else t for t in terms(wear)
    )
    return replace(wear, mix=mix) if isinstance(wear, Stacked) else mix
