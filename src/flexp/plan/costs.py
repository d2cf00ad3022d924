"""What a cut costs: bytes of memory near the data, and bytes that cross the link."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, cast

from torch import nn

from flexp.errors import CutError, ModelError, PlanError

Form = Literal["u", "logits", "loss"]


@dataclass(frozen=True)
class BlockCosts:
    """Sizes of a model and its training, all that the planner knows of either.

    ``block_bytes`` and ``adapter_block_bytes`` have one entry per block. ``batch`` is in rows,
    ``length`` in positions per row, ``itemsize`` in bytes per number. ``tied_bytes`` is the part
    of ``embed_bytes`` that is the head's weight too: counted once, needed at both ends.
    ``logits_bytes`` and ``label_bytes`` are of one batch, as they are held and sent.
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
    activation_factor: int = 14
    tied_bytes: int = 0
    logits_bytes: int = 0
    label_bytes: int = 0

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
    recompute: bool = False,
    accumulate: int = 1,
) -> Mapping[str, int]:
    """Memory in bytes at the client by part, and their sum as ``total``.

    Weights are the embeddings, the near blocks and the head if it is near; adapters count four
    times, for parameter, gradient and two moments of Adam; activations are those kept for the
    backward pass, with recomputation the inputs of blocks and the inside of one; the link holds one
    message on its way out and one in. Of a batch in ``accumulate`` parts one is held at a time.
    """
    if min(cut_front, cut_back) < 0 or cut_front + cut_back > costs.blocks:
        raise CutError(
            f"Cut ({cut_front}, {cut_back}) does not fit: the model has {costs.blocks} blocks. "
            "Choose a front and a back that together have no more."
        )
    if cut_back and not head_near:
        raise CutError(
            f"Cut ({cut_front}, {cut_back}) has blocks behind the server's, which has the head. "
            "Set the back to 0, or keep the labels."
        )
    near = [*range(cut_front), *range(costs.blocks - cut_back, costs.blocks)]
    whole = head_near and len(near) == costs.blocks
    rows = -(-costs.batch // accumulate)
    hidden = message_bytes(costs) * rows // costs.batch
    logits = costs.logits_bytes * rows // costs.batch
    inside = costs.activation_factor * (min(1, len(near)) if recompute else len(near))
    parts = {
        "weights": costs.embed_bytes
        + sum(costs.block_bytes[i] for i in near)
        + (costs.head_bytes if head_near else 0),
        "adapters": 4
        * (
            sum(costs.adapter_block_bytes[i] for i in near)
            + (costs.adapter_head_bytes if head_near else 0)
        ),
        "activations": (inside + (len(near) if recompute else 0)) * hidden
        + (2 * logits if head_near else 0),
        "link": 0 if whole else 2 * hidden,
    }
    return parts | {"total": sum(parts.values())}


def message_bytes(costs: BlockCosts) -> int:
    """S, the size of one hidden state: batch · length · width · itemsize."""
    return costs.batch * costs.length * costs.width * costs.itemsize


def step_bytes(costs: BlockCosts, form: Form = "u", front_trains: bool = True) -> int:
    """Bytes over the link in one training step, both ways; the cut does not matter.

    ``u``: 4 S. ``logits``: 2 S, and logits and their gradient. ``loss``: 2 S and the labels.
    Without a trainable tensor in the front its gradient, one S, stays away.
    """
    hidden = message_bytes(costs)
    extra = {
        "u": 2 * hidden,
        "logits": 2 * costs.logits_bytes,
        "loss": costs.label_bytes,
    }
    return (2 if front_trains else 1) * hidden + extra[form]


def measure_costs(
    model: nn.Module,
    blocks_path: str,
    adapters: Mapping[str, tuple[int, ...]],
    *,
    batch: int,
    length: int,
    itemsize: int,
) -> BlockCosts:
    """The sizes of a Hugging Face model, maybe on the meta device: no weight is read.

    Parameters outside the block list count as embeddings if they are the input embeddings or are
    registered before the blocks, else as head. Each is counted once, at ``itemsize`` bytes per
    number, and so are the adapter's tensors, given as name and shape; those outside the blocks
    count as head. Buffers are not counted.
    """
    blocks = _block_list(model, blocks_path)
    embed, head, seen_block = 0, 0, False
    sizes, early = [0] * len(blocks), set[int]()
    inputs = {id(p) for p in _input_embeddings(model)}
    for name, parameter in model.named_parameters():
        size = parameter.numel() * itemsize
        index = _block_of(name, blocks_path)
        if index is not None:
            sizes[index] += size
            seen_block = True
        elif id(parameter) in inputs or not seen_block:
            embed += size
            early.add(id(parameter))
        else:
            head += size
    adapter_sizes, adapter_head = _adapter_bytes(adapters, blocks_path, len(blocks), itemsize)
    return BlockCosts(
        blocks=len(blocks),
        width=_width(model),
        embed_bytes=embed,
        block_bytes=tuple(sizes),
        head_bytes=head,
        adapter_block_bytes=adapter_sizes,
        adapter_head_bytes=adapter_head,
        batch=batch,
        length=length,
        itemsize=itemsize,
        tied_bytes=_tied(model, blocks_path, early) * itemsize,
    )


def _block_list(model: nn.Module, path: str) -> nn.ModuleList:
    try:
        found = model.get_submodule(path)
    except AttributeError as error:
        raise ModelError(f'The model has no module "{path}": {error}. Check blocks_at.') from error
    if not isinstance(found, nn.ModuleList) or len(found) == 0:
        raise ModelError(f'"{path}" is no list of blocks but a {type(found).__name__}.')
    return found


def _input_embeddings(model: nn.Module) -> list[nn.Parameter]:
    try:
        return list(cast("Any", model).get_input_embeddings().parameters())
    except NotImplementedError:  # a few classes name none; order of registration decides then
        return []


def _width(model: nn.Module) -> int:
    config = cast("Any", model).config.get_text_config()
    width = getattr(config, "hidden_size", None)
    if not isinstance(width, int):
        raise ModelError(
            f"{type(config).__name__} has no hidden_size. Choose a model with one width throughout."
        )
    return width


def _block_of(name: str, path: str) -> int | None:
    """The block that a parameter belongs to; adapter names carry a prefix before the path."""
    match = re.search(rf"(?:^|\.){re.escape(path)}\.(\d+)\.", name)
    return int(match.group(1)) if match else None


def _adapter_bytes(
    adapters: Mapping[str, tuple[int, ...]], path: str, blocks: int, itemsize: int
) -> tuple[tuple[int, ...], int]:
    sizes, head = [0] * blocks, 0
    for name, shape in adapters.items():
        index = _block_of(name, path)
        if index is None:
            head += prod(shape) * itemsize
        elif index < blocks:
            sizes[index] += prod(shape) * itemsize
        else:
            raise ModelError(
                f'Adapter tensor "{name}" is in block {index}, but the model has {blocks}. '
                "Make the adapter for this model."
            )
    return tuple(sizes), head


def _tied(model: nn.Module, path: str, early: set[int]) -> int:
    """Numbers of the early parameters that are registered behind the blocks once more."""
    seen_block, tied = False, 0
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if _block_of(name, path) is not None:
            seen_block = True
        elif seen_block and id(parameter) in early:
            tied += parameter.numel()
    return tied
