"""A model before its weights: its config, the list of its blocks, and the leaves of its head.

Nothing here knows a family: the block list is the largest list of equal modules, the head is what
the checkpoint lacks behind the blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from flexp import libraries
from flexp.errors import ModelError
from flexp.model import vision

TaskKind = Literal["classification", "causal-lm", "images"]
Shape = tuple[int, ...]

_AUTO: Mapping[TaskKind, str] = {
    "classification": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
    "images": "AutoModelForImageClassification",
}
PEFT_TASK: Mapping[TaskKind, str] = {
    "classification": "SEQ_CLS",
    "causal-lm": "CAUSAL_LM",
    "images": "FEATURE_EXTRACTION",
}


def auto(task: TaskKind) -> Any:
    """The class that makes and loads models for a task, whatever their family."""
    if task == "images":
        vision.register()
    return getattr(libraries.transformers(), _AUTO[task])


def block_list(model: nn.Module, at: str | None = None) -> tuple[str, nn.ModuleList]:
    """Path and module of the list of blocks: the one named, or the largest list of equal modules.

    Raises ModelError when there is none.
    """
    if at is not None:
        try:
            named = model.get_submodule(at)
        except AttributeError:
            raise ModelError(f'model.blocks_at: the model has no module "{at}".') from None
        if not isinstance(named, nn.ModuleList):
            raise ModelError(f'model.blocks_at: "{at}" is a {type(named).__name__}, not a list.')
        return at, named
    found = [
        (sum(p.numel() for p in m.parameters()), path, m)
        for path, m in modules(model).items()
        if isinstance(m, nn.ModuleList) and len(m) > 1 and len({type(b) for b in m}) == 1
    ]
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no list of two or more equal blocks to cut between. "
            "Name the list with model.blocks_at, or choose a transformer with a block list."
        )
    _, path, blocks = max(found, key=lambda one: one[0])
    return path, blocks


def head_leaves(model: nn.Module, lacking: set[str] | None, blocks_path: str) -> tuple[str, ...]:
    """Paths of the leaf modules that make the head: what the checkpoint lacks, behind the blocks.

    Without a checkpoint (``lacking`` is None): what lies outside the base model, except tied or
    pretrained output embeddings.
    """
    base = f"{getattr(model, 'base_model_prefix', '')}."
    output = cast(Any, model).get_output_embeddings()
    behind, out = False, dict[str, None]()
    for name, _ in model.named_parameters():
        path = name.rpartition(".")[0]
        if name.startswith(f"{blocks_path}."):
            behind = True
            continue
        if model.get_submodule(path) is output:
            continue
        fresh = name in lacking if lacking is not None else not name.startswith(base)
        if fresh and not behind:
            raise ModelError(f'The checkpoint has no "{name}", which lies before the blocks.')
        if fresh:
            out[path] = None
    return tuple(out)


@dataclass(frozen=True)
class Skeleton:
    """A model without weights: all that a plan needs before anything is downloaded."""

    model: nn.Module
    blocks_path: str
    depth: int
    config: Any


def skeleton(source: str | Path, task: TaskKind, *, classes: int = 2, **options: Any) -> Skeleton:
    """The model of a folder's or hub id's config on the meta device; no weights are read.

    ``options``: ``revision`` and ``blocks_at``. Raises ModelError.
    """
    config = read_config(source, task, classes, options.get("revision"))
    return bare(config, task, blocks_at=options.get("blocks_at"))


def bare(config: Any, task: TaskKind, *, blocks_at: str | None = None) -> Skeleton:
    """The skeleton of a config; ModelError if it is of no model for the task."""
    try:
        with torch.device("meta"):
            model = auto(task).from_config(config)
    except ValueError as problem:
        raise ModelError(
            f'A model of type "{config.model_type}" has no class for task.kind "{task}". Choose '
            "another model, or another kind."
        ) from problem
    path, blocks = block_list(model, blocks_at)
    return Skeleton(model, path, len(blocks), config)


def read_config(source: str | Path, task: TaskKind, classes: int, revision: str | None) -> Any:
    """The config of a model folder or hub id; encoder-decoders are refused."""
    more = {"num_labels": classes} if task != "causal-lm" else {}
    if task == "images":
        vision.register()
    try:
        make = libraries.transformers().AutoConfig
        config = make.from_pretrained(source, revision=revision, **more)
    except (OSError, ValueError) as problem:
        first = str(problem).strip().splitlines()[0]
        raise ModelError(
            f'"{source}" cannot be opened as a model: {first} Give an asset (`flexp assets`), a '
            "folder with config.json, or a hub id."
        ) from problem
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f'"{source}" is an encoder-decoder. Its decoder reads the encoder in every block, so '
            "one hidden state at the cut is not enough. Choose an encoder or a decoder."
        )
    return config


def drawn(config: Any) -> bool:
    """Whether there is no checkpoint: all of the model's weights are drawn from a run's seed."""
    return bool(getattr(config, "drawn", False))


def inputs_of(model: nn.Module) -> nn.Module | None:
    """The input embeddings; None where the class names none."""
    try:
        return cast(Any, model).get_input_embeddings()
    except NotImplementedError:
        return None


def image_shape(config: Any) -> tuple[int, int, int]:
    """Channels, height and width of the images that a model takes."""
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    return int(config.num_channels), int(height), int(width)


@dataclass(frozen=True)
class States:
    """Shapes of one row's hidden state before each block and behind the last one.

    ``in_tuple``: whether a block gives it as the first of several.
    """

    shapes: tuple[Shape, ...]
    in_tuple: bool

    @property
    def features(self) -> int:
        """The numbers of a position behind the last block: its width, or its channels."""
        last = self.shapes[-1]
        return last[1] if len(last) == 2 else last[0]


def states_of(config: Any, task: TaskKind, blocks_at: str | None = None) -> States | None:
    """The states of a model of images, from its config; None where rows differ in length."""
    if task != "images":
        return None
    net = bare(config, task, blocks_at=blocks_at).model.eval()
    _, blocks = block_list(net, blocks_at)
    seen: list[Any] = []

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    hooks = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    hooks.append(blocks[-1].register_forward_hook(lambda _m, _a, out: seen.append(out)))
    with torch.no_grad():
        net(pixel_values=torch.empty(1, *image_shape(config), device="meta"))
    for hook in hooks:
        hook.remove()
    in_tuple = isinstance(seen[-1], tuple)
    seen[-1] = seen[-1][0] if in_tuple else seen[-1]
    return States(tuple(tuple(one.shape[1:]) for one in seen), in_tuple)


def reads_ids(model: nn.Module) -> bool:
    """Whether the model's main input is token ids."""
    return getattr(model, "main_input_name", "") == "input_ids"


def modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by its path, parents first."""
    return dict(cast("Iterable[tuple[str, nn.Module]]", model.named_modules()))
