"""What a cut costs: bytes of memory near the data, and bytes that cross the link."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

from flexp.errors import CutError, PlanError
from flexp.model.quantize import together
from flexp.plan.trial import Held, Trial

Form = Literal["u", "logits", "loss"]


@dataclass(frozen=True)
class BlockCosts:
    """Sizes of a model and its training, all that the planner knows of either.

    ``block_bytes`` and ``adapter_block_bytes`` have one entry per block. ``batch`` is in rows,
    ``length`` in positions per row, ``itemsize`` in bytes per number. ``tied_bytes`` is the part
    of ``embed_bytes`` that is the head's weight too: counted once, needed at both ends.
    ``logits_bytes`` and ``label_bytes`` are of one batch, as they cross the link. ``full`` is a
    step tried at ``batch`` rows and ``single`` at one; without them activations count as nothing.
    ``moments`` are kept by the optimizer per number; ``file_itemsize`` is that of the checkpoint
    where it is another (None: the same). ``wide_bytes`` are of each block before it is
    quantized, a few at a time (empty: blocks stay as they are). ``packed_bytes`` is one
    hidden state as it crosses the link (None: as it is held). ``window`` parts of a batch are under
    way at a time; with ``ahead`` the fronts of as many more are there while these wait for their
    gradients.
    ``states`` are the shapes of one row's hidden state before each block and behind the last, where
    these differ (empty: length · width), ``packed_states`` their batches' bytes as they cross.
    ``cache_bytes`` of hidden states may be kept in front of what trains.
    """

    blocks: int
    width: int
    embed_bytes: int
    block_bytes: tuple[int, ...]
    head_bytes: int
    adapter_block_bytes: tuple[int, ...]
    adapter_head_bytes: int
    batch: int
    length: int
    itemsize: int
    tied_bytes: int = 0
    logits_bytes: int = 0
    label_bytes: int = 0
    moments: int = 2
    file_itemsize: int | None = None
    wide_bytes: tuple[int, ...] = ()
    process_bytes: int = 0
    packed_bytes: int | None = None
    window: int = 1
    ahead: bool = False
    cache_bytes: int = 0
    states: tuple[tuple[int, ...], ...] = ()
    packed_states: tuple[int, ...] = ()
    full: Trial | None = None
    single: Trial | None = None

    def __post_init__(self) -> None:
        for field in ("block_bytes", "adapter_block_bytes"):
            if len(getattr(self, field)) != self.blocks:
                raise PlanError(
                    f"{field} has {len(getattr(self, field))} entries for {self.blocks} blocks. "
                    "Give one per block."
                )


def near_bytes(
    costs: BlockCosts,
    cut_front: int,
    cut_back: int,
    *,
    head_near: bool = True,
    recompute: int = 0,
    accumulate: int = 1,
) -> Mapping[str, int]:
    """What a device must lend, in bytes by part, and their sum as ``total``.

    Weights are the embeddings, the near blocks and the head if it is near. Adapters are there as
    they begin, as they are, as gradient and as moments of the optimizer. Activations are the most
    that opening, training or stepping needs beside those. The link holds one message on its way
    out and one in, and as many again if the next forward goes ahead. Parts under way together have
    activations and a gradient each; that they do not work at the same moment is not counted. A
    front that lacks a step keeps the adapters from before it. The process is what no tensor holds:
    code, buffers of libraries, the allocator. The cache counts whole, even where all trains.
    """
    _check(costs, cut_front, cut_back, head_near)
    near = [*range(cut_front), *range(costs.blocks - cut_back, costs.blocks)]
    whole = head_near and len(near) == costs.blocks
    outside = costs.embed_bytes + (costs.head_bytes if head_near else 0)
    weights = outside + sum(costs.block_bytes[i] for i in near)
    adapter = sum(costs.adapter_block_bytes[i] for i in near)
    adapter += costs.adapter_head_bytes if head_near else 0
    window, ahead = (1, False) if whole else (costs.window, costs.ahead)
    rows = min(costs.batch, window * -(-costs.batch // accumulate))
    reading = _reading(costs, near, outside, weights)
    training = _training(
        _Rows(costs, rows, frozenset(near[:recompute])), (cut_front, cut_back), head_near, ahead
    )
    comes_back = costs.blocks - cut_back if head_near else cut_front
    both = message_bytes(costs, cut_front) + message_bytes(costs, comes_back)
    # A step copies what it moves: the tensors, the scaled gradient and the moments.
    parts = {
        "weights": weights,
        "adapters": (2 + ahead + window + costs.moments) * adapter,
        "activations": max(training, (2 + costs.moments) * adapter, reading),
        "link": 0 if whole else (1 + ahead) * both * rows // costs.batch,
        "process": costs.process_bytes,
    }
    if costs.cache_bytes:
        parts["cache"] = costs.cache_bytes
    if not head_near:  # logits that come back, their softmax and their gradient
        parts["link"] += 3 * costs.logits_bytes * rows // costs.batch
    return parts | {"total": sum(parts.values())}


def _reading(costs: BlockCosts, near: list[int], outside: int, weights: int) -> int:
    """Bytes beside the weights while they are read: a file of another type, blocks still wide."""
    extra = costs.file_itemsize or 0
    if not costs.wide_bytes:
        return weights * extra // costs.itemsize
    sizes = {i: costs.wide_bytes[i] for i in near}
    most = max((sum(sizes[i] for i in some) for some in together(sizes)), default=0)
    return max(outside * extra, most * (costs.itemsize + extra)) // costs.itemsize


def _check(costs: BlockCosts, front: int, back: int, head_near: bool) -> None:
    if min(front, back) < 0 or front + back > costs.blocks:
        raise CutError(
            f"Cut ({front}, {back}) does not fit: the model has {costs.blocks} blocks. "
            "Choose a front and a back that together have no more."
        )
    if back and not head_near:
        raise CutError(
            f"Cut ({front}, {back}) has blocks behind the server's, which has the head. "
            "Set the back to 0, or keep the labels."
        )


@dataclass(frozen=True)
class _Rows:
    """What blocks hold at some number of rows: between the trials, and on a line beyond them."""

    costs: BlockCosts
    rows: int
    again: frozenset[int]

    def at(self, of: Callable[[Trial], int]) -> int:
        full, single = self.costs.full, self.costs.single
        if full is None:
            return 0
        if single is None or single.rows == full.rows:
            return of(full)
        slope = (of(full) - of(single)) / (full.rows - single.rows)
        return round(of(single) + slope * (self.rows - single.rows))

    @property
    def message(self) -> int:
        return self.at(lambda t: t.message)

    def block(self, i: int, trained: bool) -> Held:
        """Block ``i``; ``trained``: something before it trains, so gradients go through it."""
        if not trained and not self.costs.adapter_block_bytes[i]:
            return Held(0, self.at(lambda t: t.first[i].work))

        def of(trial: Trial) -> Held:
            if i in self.again:
                return trial.again[i]
            return (trial.blocks if trained else trial.first)[i]

        return Held(self.at(lambda t: of(t).kept), self.at(lambda t: of(t).work))


def _training(held: _Rows, cut: tuple[int, int], head_near: bool, ahead: bool) -> int:
    """The most bytes of activations: in the end, in the tail, or in the front with the tail done.

    What a block keeps is there until its backward pass, which comes in the opposite order, so a
    block that runs again has only those in front of it beside it. A front
    that is computed ahead has the one before beside it, whose tail is done; its own tail is not
    begun before that one is gone.
    """
    (cut_front, cut_back), costs = cut, held.costs
    before = [any(costs.adapter_block_bytes[:i]) for i in range(costs.blocks)]
    front = [held.block(i, before[i]) for i in range(cut_front)]
    tail = [held.block(i, before[i]) for i in range(costs.blocks - cut_back, costs.blocks)]
    kept, most = _through(front, held.message)  # the embeddings' output feeds block 0
    crossing, most = kept, most + (kept if ahead else 0)
    kept, there = _through(tail, kept)
    most = max(most, there)
    if head_near:
        most = max(most, kept + held.at(lambda t: t.end.kept + t.end.work))
    whole = head_near and len(front) + len(tail) == costs.blocks
    # While anything works, one of the link's two messages is gone already.
    gone = held.message
    if costs.states:
        ends = cut_front, costs.blocks - cut_back
        gone = min(message_bytes(costs, at) for at in ends) * held.rows // costs.batch
    return most if whole else max(crossing, most - gone)


def message_bytes(costs: BlockCosts, at: int | None = None) -> int:
    """S, the size of one hidden state: batch · length · width · itemsize.

    Where they differ, that before block ``at``, or the largest.
    """
    sizes = [prod(shape) for shape in costs.states] or [costs.length * costs.width]
    size = sizes[at] if costs.states and at is not None else max(sizes)
    return costs.batch * size * costs.itemsize


def crossing_bytes(costs: BlockCosts, at: int | None = None) -> int:
    """What crosses the link for one hidden state, or for its gradient: S, or less if packed."""
    if costs.packed_states:
        return max(costs.packed_states) if at is None else costs.packed_states[at]
    return message_bytes(costs, at) if costs.packed_bytes is None else costs.packed_bytes


def step_bytes(
    costs: BlockCosts,
    form: Form = "u",
    front_trains: bool = True,
    cut: tuple[int, int] | None = None,
) -> int:
    """Bytes over the link in one training step, both ways.

    ``u``: 4 S. ``logits``: 2 S, and logits and their gradient. ``loss``: 2 S and the labels.
    Without a trainable tensor in the front its gradient, one S, stays away. The ``cut`` matters
    only where hidden states differ in shape.
    """
    front, back = cut or (None, None)
    hidden = crossing_bytes(costs, front)
    extra = {
        "u": 2 * crossing_bytes(costs, None if back is None else costs.blocks - back),
        "logits": 2 * costs.logits_bytes,
        "loss": costs.label_bytes,
    }
    return (2 if front_trains else 1) * hidden + extra[form]


def frame_bytes(costs: BlockCosts, scored: int, slots: int) -> int:
    """The most that one message may take: a batch, rows to be scored, or adapters and moments.

    Twice that, and room for masks, labels, names and whatever else a method sends.
    """
    rows = max(costs.batch, scored)
    hidden = rows * message_bytes(costs) // (costs.batch * costs.itemsize) * max(4, costs.itemsize)
    logits = rows * costs.logits_bytes // costs.batch
    adapter = sum(costs.adapter_block_bytes) + costs.adapter_head_bytes
    return (16 << 20) + 2 * max(hidden, logits, (1 + costs.moments) * max(1, slots) * adapter)


def _through(blocks: Sequence[Held], kept: int) -> tuple[int, int]:
    """What lies there behind some blocks, with what lay there before, and the most on the way."""
    most = kept
    for block in blocks:
        kept += block.kept
        most = max(most, kept + block.work)
    return kept, most
