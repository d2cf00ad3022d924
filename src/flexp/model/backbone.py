"""Opens a frozen Hugging Face model, finds its blocks, and makes its forward cuttable.

Nothing here knows a family: the block list is the largest list of equal modules, the head is what
the checkpoint lacks behind the blocks, and a check at open compares a cut forward with a whole one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import transformers
from torch import Tensor, nn

from flexp.dice import Dice
from flexp.errors import ModelError
from flexp.model.adapter import Kind, Layout, initial, layout
from flexp.model.cut import PASS, Pass, Seat, Station, run
from flexp.model.worn import PREFIX, Wearing, Worn
from flexp.tensors import Place, Tensors

TaskKind = Literal["classification", "causal-lm", "images"]

AUTO: Mapping[TaskKind, Any] = {
    "classification": transformers.AutoModelForSequenceClassification,
    "causal-lm": transformers.AutoModelForCausalLM,
    "images": transformers.AutoModelForImageClassification,
}
PEFT_TASK: Mapping[TaskKind, str] = {
    "classification": "SEQ_CLS",
    "causal-lm": "CAUSAL_LM",
    "images": "FEATURE_EXTRACTION",
}


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
        for path, m in model.named_modules()
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
    width: int
    config: Any


def skeleton(source: str | Path, task: TaskKind, *, classes: int = 2, **options: Any) -> Skeleton:
    """The model of a folder's or hub id's config on the meta device; no weights are read.

    ``options``: ``revision`` and ``blocks_at``. Raises ModelError.
    """
    config = read_config(source, task, classes, options.get("revision"))
    return bare(config, task, blocks_at=options.get("blocks_at"))


def bare(config: Any, task: TaskKind, *, blocks_at: str | None = None) -> Skeleton:
    """The skeleton of a config."""
    with torch.device("meta"):
        model = AUTO[task].from_config(config)
    path, blocks = block_list(model, blocks_at)
    width = int(model.get_input_embeddings().weight.shape[1]) if _has_ids(model) else 0
    return Skeleton(model, path, len(blocks), width or int(config.hidden_size), config)


def read_config(source: str | Path, task: TaskKind, classes: int, revision: str | None) -> Any:
    """The config of a model folder or hub id; encoder-decoders are refused."""
    more = {"num_labels": classes} if task != "causal-lm" else {}
    try:
        config = transformers.AutoConfig.from_pretrained(source, revision=revision, **more)
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


def _has_ids(model: nn.Module) -> bool:
    return getattr(model, "main_input_name", "") == "input_ids"


class Backbone:
    """The frozen model of one process, worn differently by every client and forward.

    Do not copy it: instance-level forwards belong to this object.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        task: TaskKind,
        name: str = "",
        lacking: set[str] | None = None,
        blocks_at: str | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.config: Any = model.config
        self.task: TaskKind = task
        self.name = name or type(model).__name__
        if getattr(self.config, "is_encoder_decoder", False):
            raise ModelError(f"{self.name} is an encoder-decoder; these cannot be cut.")
        self.config.use_cache = False
        self.blocks_path, blocks = block_list(model, blocks_at)
        self.depth = len(blocks)
        self.head = () if task == "causal-lm" else head_leaves(model, lacking, self.blocks_path)
        self.dtype = next(model.parameters()).dtype
        self.in_tuple, self.width = self._probe(blocks)
        for index, block in enumerate(blocks):
            block.forward = Station(block, index, self.depth, self.in_tuple[index])
        for path, module in model.named_modules():
            inside = path.startswith(f"{self.blocks_path}.")
            leaf = not list(module.children()) and list(module.parameters(recurse=False))
            if path in self.head or (inside and leaf):
                module.forward = Wearing(module, path, _worn_now)
        self._check()

    @classmethod
    def open(
        cls,
        source: str | Path,
        *,
        task: TaskKind,
        classes: int = 2,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        revision: str | None = None,
        blocks_at: str | None = None,
        name: str = "",
        pad: int | None = None,
    ) -> Backbone:
        """Loads a folder or hub id (safetensors only), frozen and cuttable.

        Parameters that the checkpoint lacks begin the same everywhere, from ``seed``. ``pad`` is
        the tokenizer's padding id. Raises ModelError.
        """
        config = read_config(source, task, classes, revision)
        if config.pad_token_id is None and pad is not None:
            config.pad_token_id = pad
        try:
            model, info = AUTO[task].from_pretrained(
                source,
                config=config,
                revision=revision,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=task != "causal-lm",
            )
        except (OSError, ValueError, RuntimeError) as problem:
            first = str(problem).strip().splitlines()[0]
            raise ModelError(f'The weights of "{source}" cannot be loaded: {first}') from problem
        mismatched = {row[0] for row in info.get("mismatched_keys", ())}
        lacking = set(info["missing_keys"]) | mismatched
        fill(model, lacking, Dice(seed)("head"))
        model = model.to(device)
        shown = name or str(source)
        return cls(model, task=task, name=shown, lacking=lacking, blocks_at=blocks_at)

    # ---- names

    def block_of(self, name: str) -> int:
        """The block of an adapter tensor: -1 before the blocks, ``depth`` after them."""
        path = name.removeprefix(PREFIX)
        if path.startswith(f"{self.blocks_path}."):
            return int(path[len(self.blocks_path) + 1 :].split(".", 1)[0])
        return -1 if path == "prompt_embeddings" else self.depth

    def place(self, name: str, seat: Seat) -> Place:
        """Where an adapter tensor sits for a client."""
        return seat.place(self.block_of(name), self.depth)

    def layout(self, kind: Kind, rank: int | None = None) -> Layout:
        """Names and shapes of an adapter of that kind on this model."""
        return layout(bare(self.config, self.task).model, kind, self.blocks_path, self.head, rank)

    def initial(self, kind: Kind, dice: Dice, rank: int | None = None) -> Tensors:
        """The adapter that everybody begins with."""
        return initial(
            self.layout(kind, rank), kind, dice, dict(self.model.named_parameters())
        )

    # ---- forwards

    def run(
        self,
        inputs: Mapping[str, Tensor],
        worn: Worn | None = None,
        *,
        first: int = 0,
        last: int | None = None,
        feed: Tensor | None = None,
    ) -> Tensor:
        """Blocks ``first`` to ``last`` of one forward, from ``feed`` if given.

        Returns the hidden state [rows, length, width] at ``last``, or the logits if it is None.
        """
        if feed is not None and first == last:
            return feed
        return run(self.model, Pass(first, last, feed, worn or Worn()), inputs)

    def blanks(self, shapes: Mapping[str, tuple[int, ...]], mask: Tensor | None) -> dict[str, Any]:
        """Inputs that say nothing but shape and padding, for the side that has no real ones.

        Blank ids must still mark padding: decoder classifiers pool at the last id that is not the
        padding, and with blanks everywhere they train silently wrong.
        """
        out: dict[str, Any] = {}
        device = next(self.model.parameters()).device
        for key, shape in shapes.items():
            if key == "attention_mask":
                continue
            if key in ("input_ids", "inputs_embeds"):
                pad = self.config.pad_token_id
                pad = 0 if pad is None else pad
                ids = torch.full(shape[:2], 0 if pad else 1, device=device)
                out["input_ids"] = ids if mask is None else torch.where(mask.bool(), ids, pad)
            else:
                out[key] = torch.zeros(shape, dtype=self.dtype, device=device)
        if mask is not None:
            out["attention_mask"] = mask
        return out

    # ---- checks at open

    def _sample(self, rows: int = 2, length: int = 5) -> dict[str, Tensor]:
        if _has_ids(self.model):
            ids = torch.arange(rows * length).reshape(rows, length) % 7 + 1
            mask = torch.ones_like(ids)
            if self.config.pad_token_id is not None:
                mask[0, -2:] = 0
                ids = torch.where(mask.bool(), ids, self.config.pad_token_id)
            return {"input_ids": ids, "attention_mask": mask}
        size = self.config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        shape = (rows, self.config.num_channels, height, width)
        image = torch.linspace(-1, 1, rows * shape[1] * height * width).reshape(shape)
        return {"pixel_values": image.to(self.dtype)}

    def _probe(self, blocks: nn.ModuleList) -> tuple[list[bool], int]:
        seen: list[Any] = []
        hooks = [b.register_forward_hook(lambda _m, _a, out: seen.append(out)) for b in blocks]
        with torch.no_grad():
            self.model(**self._on_device(self._sample()))
        for hook in hooks:
            hook.remove()
        if len(seen) != len(blocks):
            raise ModelError(
                f"{self.name} ran {len(seen)} blocks of {len(blocks)} in one forward: a forward "
                "that skips or repeats blocks cannot be cut between them."
            )
        first = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
        if not isinstance(first, Tensor) or first.dim() != 3:
            raise ModelError(f"The blocks of {self.name} do not pass on one hidden state.")
        return [isinstance(out, tuple) for out in seen], int(first.shape[-1])

    def _check(self) -> None:
        inputs = self._on_device(self._sample())
        cut, last = max(1, self.depth // 3), self.depth - 1
        blank = self.blanks({k: tuple(v.shape) for k, v in inputs.items()}, inputs.get("attention_mask"))
        with torch.no_grad():
            whole = self.run(inputs)
            try:
                front = self.run(inputs, last=cut)
                middle = self.run(blank, first=cut, last=last, feed=front)
                cut_up = self.run(inputs, first=last, feed=middle)
            except (KeyError, TypeError, RuntimeError, IndexError, AttributeError) as problem:
                raise ModelError(f"{self.name} cannot be cut: {problem}") from problem
        if not torch.equal(whole, cut_up):
            worst = float((whole - cut_up).abs().max())
            raise ModelError(
                f"{self.name} cannot be cut: its blocks exchange more than one hidden state "
                f"(a cut forward differs from the whole one by {worst:.1e})."
            )

    def _on_device(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        device = next(self.model.parameters()).device
        return {k: v.to(device) for k, v in inputs.items()}


def _worn_now() -> Worn | None:
    now = PASS.get()
    return None if now is None else now.worn


def fill(model: nn.Module, lacking: set[str], dice: Dice) -> None:
    """Gives parameters that the checkpoint lacks the same values in every process.

    Matrices are normal with the config's own width, gains one, biases zero.
    """
    std = float(getattr(cast(Any, model).config, "initializer_range", 0.02) or 0.02)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name not in lacking:
                continue
            if value.dim() > 1:
                fresh = torch.empty(value.shape)
                value.copy_(fresh.normal_(0.0, std, generator=dice("fill", name=name).generator()))
            else:
                value.fill_(1.0 if name.endswith("weight") else 0.0)


