"""Front, trunk and tail of an unmodified Hugging Face model, without a line for any family.

Every block's ``forward`` is replaced *on the instance* by a ``Station``. A context variable says
for the present forward where it starts, where it stops and what hidden state it is fed, so one
model in memory serves all clients, all cuts and all threads. The model's own ``forward`` does the
rest: masks, rotary tables, final norm, pooling and head are its own code on both sides of a cut.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

from flexp.errors import CutError
from flexp.model.joint import Joint
from flexp.model.worn import Worn
from flexp.selection import Place

Labels = Literal["keep", "logits", "loss"]
AT_CUT = -2  # in place of a block's number


@dataclass(frozen=True)
class Cut:
    """The client runs the first ``front`` blocks and the last ``back``, the server the rest."""

    front: int
    back: int = 0

    def __str__(self) -> str:
        return f"({self.front}, {self.back})"


@dataclass(frozen=True)
class Seat:
    """Where and how a client computes: its cut, who sees labels and logits, its model and rank.

    ``labels``: "keep" is the U-shape (tail, head, loss and labels at the client); the other two
    are the V-shape, where the server also runs the tail and the head: with "logits" they come back
    and loss and labels stay, with "loss" the labels travel and only the loss comes back.
    ``model`` names its backbone, where that is not the run's.
    ``recompute`` is how many near blocks, from the first, run again in the backward pass instead
    of keeping what is inside them; ``accumulate`` takes each batch in that many parts. Both save
    memory and train alike.
    """

    cut: Cut
    labels: Labels = "keep"
    model: str = ""
    rank: int | None = None
    recompute: int = 0
    accumulate: int = 1

    def check(self, depth: int, *, open_profile: bool = False, who: str = "") -> None:
        """Raises CutError unless this is a legal cut of a model with ``depth`` blocks."""
        a, b = self.cut.front, self.cut.back
        name = f'client "{who}"' if who else "a client"
        if a < 0 or b < 0 or a + b > depth:
            raise CutError(
                f"{name} asked for {a} front and {b} back blocks, but the model has {depth}. "
                f"Both must be at least 0 and together at most {depth}."
            )
        if a == 0 and not open_profile:
            raise CutError(
                f"{name} asked for 0 front blocks: bare embeddings would leave the device. "
                'Run at least 1 block there, or set privacy.profile to "open".'
            )
        if self.labels != "keep" and b:
            raise CutError(
                f'{name} has labels "{self.labels}" with {b} back blocks, but then the server runs '
                'the tail. Set the back to 0, or labels to "keep".'
            )
        if self.accumulate < 1:
            raise CutError(
                f"{name} takes a batch in {self.accumulate} parts. Set accumulate to 1 or more."
            )

    def near_blocks(self, depth: int) -> list[int]:
        """The blocks that the client runs."""
        return [*range(self.cut.front), *range(depth - self.cut.back, depth)]

    def near_only(self, depth: int) -> bool:
        """Whether the client hosts every block and the head."""
        return self.labels == "keep" and self.cut.front + self.cut.back == depth

    def place(self, block: int, depth: int) -> Place:
        """Where a tensor of that block sits (-1 before the blocks, ``depth`` after them).

        ``AT_CUT`` is the server's first block, wherever that is; CutError if there is none.
        """
        last = depth - self.cut.back
        if block == AT_CUT:
            if self.cut.front >= min(last, depth):
                raise CutError("A prompt at the cut needs a block at the server. Move the cut.")
            return Place("far", "trunk", self.cut.front, depth)
        if block < self.cut.front:
            return Place("near", "front", block, depth, self.cut.front - 1 - block)
        if block == depth:
            if self.labels != "keep":
                return Place("far", "head", block, depth)
            return Place("near", "head", block, depth, self.cut.back)
        if block >= last:
            return Place("near", "tail", block, depth, block - last)
        return Place("far", "trunk", block, depth, last - 1 - block)


def uncut(depth: int) -> Seat:
    """The seat of a client that hosts the whole model."""
    return Seat(Cut(depth, 0))


@dataclass(frozen=True)
class Pass:
    """One forward: blocks ``first`` to ``last`` (None: and the head), fed or from the start.

    A ``joint`` one has members instead, each with its own first and last block.
    """

    first: int = 0
    last: int | None = None
    feed: Tensor | None = None
    worn: Worn | None = None
    tap: bool = False  # stop before the output embedding
    again: Collection[int] = ()  # blocks that keep only what enters them, and run twice
    joint: Joint | None = None

    @property
    def wears(self) -> Worn | None:
        """What is worn at present."""
        return self.worn if self.joint is None else self.joint.worn


PASS: ContextVar[Pass | None] = ContextVar("flexp_pass", default=None)


class Stopped(Exception):
    """Carries the hidden state out of a forward that ends before the model does."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__("the forward stopped at a station")
        self.hidden = hidden


class Station:
    """Replaces ``block.forward`` on the instance; the block keeps its place and its names."""

    def __init__(self, block: nn.Module, index: int, depth: int, in_tuple: bool) -> None:
        self.forward: Callable[..., Any] = block.forward
        self.index, self.depth, self.in_tuple = index, depth, in_tuple

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        now = PASS.get()
        if now is None:
            return self.forward(*args, **kwargs)
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        if now.joint is not None:
            return self._jointly(now.joint, hidden, args, kwargs)
        if self.index < now.first:
            ends_here = self.index == self.depth - 1 and now.feed is not None
            return self._wrap(now.feed if ends_here else hidden)
        if self.index == now.first and now.feed is not None:
            hidden = now.feed
        if self.index == now.last:
            raise Stopped(hidden)
        if self.index in now.again and torch.is_grad_enabled():
            out = self._twice(now, hidden, args, kwargs)
        else:
            out = self._block(hidden, args, kwargs)
        if self.index == self.depth - 1 and now.last == self.depth:
            raise Stopped(out[0] if self.in_tuple else out)
        return out

    def _jointly(
        self, joint: Joint, hidden: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        there = joint.arrives(self.index, hidden)
        if there is None:
            if joint.done:
                raise Stopped(hidden)
            return self._wrap(hidden)
        out = self._block(there, *joint.sliced(self.index, args, kwargs))
        if self.index == self.depth - 1:
            joint.over(out[0] if self.in_tuple else out)
            raise Stopped(hidden)
        return out

    def _block(self, hidden: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if args:
            return self.forward(hidden, *args[1:], **kwargs)
        return self.forward(**{**kwargs, "hidden_states": hidden})

    def _twice(
        self, now: Pass, hidden: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """The block now and again in the backward, wearing what it wears now."""

        def again(hidden: Tensor) -> Any:
            # By the backward the pass is over; without it the block would run undressed.
            token = PASS.set(now)
            try:
                return self._block(hidden, args, kwargs)
            finally:
                PASS.reset(token)

        # No generator needs to be put back: dropout is keyed by call and layer.
        return cast("Any", checkpoint)(again, hidden, use_reentrant=False, preserve_rng_state=False)

    def _wrap(self, hidden: Tensor | None) -> Any:
        return (hidden,) if self.in_tuple else hidden


class Tap:
    """Replaces the output embedding's forward on the instance: a loss can have what it reads."""

    def __init__(self, module: nn.Module) -> None:
        self.forward: Callable[..., Any] = module.forward

    def __call__(self, hidden: Tensor) -> Any:
        now = PASS.get()
        if now is not None and now.tap:
            raise Stopped(hidden)
        return self.forward(hidden)


def run(model: nn.Module, now: Pass, inputs: Mapping[str, Any]) -> Tensor:
    """One forward under a pass: the hidden state at ``last`` or at the tap, or the logits."""
    if now.worn is not None and now.worn.gates:
        now = replace(now, worn=replace(now.worn, mask=inputs.get("attention_mask")))
    token = PASS.set(now)
    try:
        return model(**inputs).logits
    except Stopped as stopped:
        return stopped.hidden
    finally:
        PASS.reset(token)
