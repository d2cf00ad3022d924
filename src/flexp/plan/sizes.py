"""The sizes of a model without weights, and of a step of its training."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import prod
from typing import Any, cast

import torch
from torch import nn

from flexp.errors import ModelError
from flexp.model.adapter import Layout
from flexp.model.quantize import Quantize, quantizable, shape_of
from flexp.model.skeleton import Skeleton, TaskKind, inputs_of
from flexp.plan.costs import BlockCosts, message_bytes
from flexp.plan.trial import Held, Shape, Trial, Weights, attempt
from flexp.quantized import quantized_bytes

PROCESS = 20_000_000  # bytes that no tensor holds, measured: benchmarks/results/memory.json
ROUGH = 20  # hidden states that a block keeps, where it cannot be tried


def tried(
    costs: BlockCosts,
    bones: Skeleton,
    task: TaskKind,
    adapter: Layout,
    shape: Shape,
    *,
    dtype: torch.dtype,
    quantize: Quantize | None = None,
) -> BlockCosts:
    """The costs with a step tried at the batch's rows and at one.

    A family that does not run on fake tensors gets a rough formula: so many hidden states.
    """
    asked = _Asked(_told(bones.config), task, tuple(adapter.items()), shape, dtype, quantize, bones)
    try:
        trials = _trials(asked)
    except Exception:  # noqa: BLE001 what a family's own code raises on fake tensors is not known
        trials = [_rough(costs, n) for n in (shape.rows, 1)]
    return replace(costs, full=trials[0], single=trials[1], process_bytes=PROCESS)


def _told(config: Any) -> str:
    """What a config says of a model, wherever it lies."""
    told = json.loads(config.to_json_string())
    return json.dumps({k: v for k, v in told.items() if k != "_name_or_path"}, sort_keys=True)


@dataclass(frozen=True)
class _Asked:
    """What a trial depends on, comparable; the skeleton itself is not compared."""

    config: str
    task: TaskKind
    adapter: tuple[tuple[str, tuple[int, ...]], ...]
    shape: Shape
    dtype: torch.dtype
    quantize: Quantize | None
    bones: Skeleton = field(compare=False)


@lru_cache(maxsize=32)
def _trials(asked: _Asked) -> list[Trial]:
    """At the batch's rows and at one; a recipe is planned more than once in a process."""
    bones, adapter = asked.bones, dict(asked.adapter)
    shapes = [replace(asked.shape, rows=n) for n in (asked.shape.rows, 1)]
    how = Weights(asked.dtype, asked.quantize)
    return [attempt(bones, asked.task, adapter, shape, how) for shape in shapes]


def _rough(costs: BlockCosts, rows: int) -> Trial:
    message = message_bytes(costs) * rows // costs.batch
    one, again = Held(ROUGH * message, ROUGH * message), Held(message, 2 * ROUGH * message)
    blocks = costs.blocks
    return Trial(
        rows, message, (one,) * blocks, (one,) * blocks, (again,) * blocks, one, rough=True
    )


def measure_costs(
    model: nn.Module,
    blocks_path: str,
    adapters: Mapping[str, tuple[int, ...]],
    *,
    batch: int,
    length: int,
    itemsize: int,
    states: tuple[tuple[int, ...], ...] = (),
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
    embeddings = inputs_of(model)  # a few classes name none; order of registration decides then
    inputs = {id(p) for p in embeddings.parameters()} if embeddings is not None else set[int]()
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
    adapter_sizes, adapter_head = adapter_bytes(adapters, blocks_path, len(blocks), itemsize)
    return BlockCosts(
        blocks=len(blocks),
        width=0 if states else _width(model),
        embed_bytes=embed,
        block_bytes=tuple(sizes),
        head_bytes=head,
        adapter_block_bytes=adapter_sizes,
        adapter_head_bytes=adapter_head,
        batch=batch,
        length=length,
        itemsize=itemsize,
        tied_bytes=_tied(model, blocks_path, early) * itemsize,
        states=states,
    )


def quantized_costs(costs: BlockCosts, bones: Skeleton, how: Quantize) -> BlockCosts:
    """The costs with codes in the blocks' linear maps."""
    sizes = list(costs.block_bytes)
    for path in quantizable(bones.model, bones.blocks_path, how.kind):
        index, shape = _block_of(f"{path}.", bones.blocks_path), shape_of(bones.model, path)
        assert index is not None
        sizes[index] += quantized_bytes(shape, how.form) - prod(shape) * costs.itemsize
    return replace(costs, block_bytes=tuple(sizes), wide_bytes=costs.block_bytes)


def _block_list(model: nn.Module, path: str) -> nn.ModuleList:
    try:
        found = model.get_submodule(path)
    except AttributeError as error:
        raise ModelError(f'The model has no module "{path}": {error}. Check blocks_at.') from error
    if not isinstance(found, nn.ModuleList) or len(found) == 0:
        raise ModelError(f'"{path}" is no list of blocks but a {type(found).__name__}.')
    return found


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


def adapter_bytes(
    adapters: Mapping[str, tuple[int, ...]], path: str, blocks: int, itemsize: int
) -> tuple[tuple[int, ...], int]:
    """Bytes of an adapter's tensors: in each block, and outside all of them."""
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
