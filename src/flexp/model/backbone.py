"""Opens a frozen model and makes it cuttable; a check compares a cut forward with a whole one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from flexp.dice import Dice
from flexp.errors import ModelError
from flexp.model import prompts
from flexp.model.adapter import Kind, Layout, initial, layout
from flexp.model.cut import AT_CUT, Pass, Seat, Tap, run
from flexp.model.equip import equip
from flexp.model.hollow import Absent, absent, beginnable, lent
from flexp.model.kernels import settle
from flexp.model.quantize import Quantize, value_of
from flexp.model.skeleton import (
    TaskKind,
    bare,
    block_list,
    head_leaves,
    image_shape,
    read_config,
    reads_ids,
    states_of,
)
from flexp.model.weights import Checkpoint
from flexp.model.worn import PREFIX, Worn
from flexp.selection import Place
from flexp.tensors import Tensors


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
        fast: bool = False,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.config: Any = model.config
        self.task: TaskKind = task
        self.name, self.fast = name or type(model).__name__, fast
        if getattr(self.config, "is_encoder_decoder", False):
            raise ModelError(f"{self.name} is an encoder-decoder; these cannot be cut.")
        self.config.use_cache = False
        self.blocks_path, blocks = block_list(model, blocks_at)
        self.depth, self.absent = len(blocks), absent(model)
        settle(model, fast=fast)
        named = {i: f"{self.blocks_path}.{i}" for i in range(self.depth)}
        self.held = frozenset(i for i, path in named.items() if path not in self.absent)
        self.head = () if task == "causal-lm" else head_leaves(model, lacking, self.blocks_path)
        self.dtype = next(model.parameters()).dtype
        self.states = states_of(self.config, task, blocks_at)
        with lent(model, list(blocks), self.held, self.states):
            self.in_tuple, self.width = self._probe(blocks)
        equip(model, self.blocks_path, blocks, self.in_tuple, self.head)
        self._layouts: dict[tuple[Kind, int | None], Layout] = {}
        self.agreed: Tensors = {}  # of an adapter, instead of how it would begin
        self.spoken: set[tuple[int, int | None, bool]] = set()  # blocks proved to run with a cache
        with lent(model, [b.forward for b in blocks], self.held, self.states):
            self.check(self)
            self.output = self._tapped() if fast and task == "causal-lm" else None

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
        fast: bool = False,
        blocks: frozenset[int] | None = None,
        outside: bool = True,
        quantize: Quantize | None = None,
    ) -> Backbone:
        """Loads a folder or hub id (safetensors only), frozen and cuttable.

        Only ``blocks`` come into memory (None: all); a forward may pass the others by, not run
        them. A server's trunk also does without what lies ``outside``: its embeddings are blank,
        its output embedding absent (a classifier's small head stays).

        Parameters that the checkpoint lacks begin the same everywhere, from ``seed``: all of them,
        where the config says that the model is drawn. ``pad`` is the tokenizer's padding id.
        ``fast`` allows what has other last bits: logits of a wide vocabulary a few tokens at a
        time, fused kernels. With ``quantize`` the blocks' linear maps hold codes, made on the
        processor. Raises ModelError.
        """
        config = read_config(source, task, classes, revision)
        if pad is not None and getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = pad
        checkpoint = Checkpoint(source, config, task, dtype, revision, Dice(seed)("head"))
        model, lacking, blocks_at = checkpoint.load(
            blocks, outside=outside, quantize=quantize, blocks_at=blocks_at
        )
        more: dict[str, Any] = {"lacking": lacking, "blocks_at": blocks_at, "fast": fast}
        return cls(model.to(device), task=task, name=name or str(source), **more)

    @property
    def sizes(self) -> tuple[int, int]:
        """The numbers of a position behind the last block, and a classifier's classes (else 0)."""
        last = (0, self.width) if self.states is None else self.states.shapes[-1]
        wide = last[1] if len(last) == 2 else last[0]
        return wide, 0 if self.task == "causal-lm" else int(self.config.num_labels)

    # ---- names

    def block_of(self, name: str) -> int:
        """The block of an adapter tensor: -1 before, ``depth`` after all, or ``AT_CUT``."""
        path = name.removeprefix(PREFIX)
        if path.startswith(f"{self.blocks_path}."):
            return int(path[len(self.blocks_path) + 1 :].split(".", 1)[0])
        before = AT_CUT if path == prompts.AT_CUT else -1
        return before if path in prompts.NAMES else self.depth

    def place(self, name: str, seat: Seat) -> Place:
        """Where an adapter tensor sits for a client."""
        return seat.place(self.block_of(name), self.depth)

    def layout(self, kind: Kind, rank: int | None = None) -> Layout:
        """Names and shapes of an adapter of that kind on this model."""
        if (kind, rank) not in self._layouts:
            net = bare(self.config, self.task).model
            self._layouts[kind, rank] = layout(net, kind, self.blocks_path, self.head, rank)
        return self._layouts[kind, rank]

    def initial(self, kind: Kind, dice: Dice, rank: int | None = None) -> Tensors:
        """The adapter that everybody begins with.

        What begins as a copy of the backbone's own values is there for held modules only.
        """
        shapes = beginnable(self.layout(kind, rank), self.absent)
        given, spread = (
            {k: v for k, v in self.agreed.items() if k in shapes},
            getattr(kind, "spread", 0.0),
        )
        return initial(shapes, dice, partial(value_of, self.model), spread) | given

    # ---- forwards

    def run(
        self,
        inputs: Mapping[str, Tensor],
        worn: Worn | None = None,
        *,
        first: int = 0,
        last: int | None = None,
        feed: Tensor | None = None,
        tap: bool = False,
        again: Collection[int] = (),
        cache: Any = None,
    ) -> Tensor:
        """Blocks ``first`` to ``last`` of one forward, from ``feed`` if given.

        Returns the hidden state at ``last`` ([rows, length, width], or as images have it), or the
        logits if it is None; with ``tap`` what the output embedding would have read. The backward
        runs blocks ``again``, of which nothing inside is kept. A ``cache`` has layers of blocks.
        """
        if feed is not None and first == last:
            return feed
        more = {} if cache is None else {"past_key_values": cache, "use_cache": True}
        now = Pass(first, last, feed, worn or Worn(), tap, again)
        return run(self.model, now, {**inputs, **more})

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
                pad = self.config.pad_token_id or 0
                ids = torch.full(shape[:2], 0 if pad else 1, device=device)
                out["input_ids"] = ids if mask is None else torch.where(mask.bool(), ids, pad)
            else:
                out[key] = torch.zeros(shape, dtype=self.dtype, device=device)
        if mask is not None:
            out["attention_mask"] = mask
        return out

    # ---- checks at open

    def sample(self, rows: int = 2, length: int = 5) -> dict[str, Tensor]:
        """Inputs to try the model with; the first row is padded, if the model knows padding."""
        if reads_ids(self.model):
            ids = torch.arange(rows * length).reshape(rows, length) % 7 + 1
            mask = torch.ones_like(ids)
            if self.config.pad_token_id is not None:
                mask[0, -2:] = 0
                ids = torch.where(mask.bool(), ids, self.config.pad_token_id)
            return {"input_ids": ids, "attention_mask": mask}
        shape = rows, *image_shape(self.config)
        return {"pixel_values": torch.linspace(-1, 1, prod(shape)).reshape(shape).to(self.dtype)}

    def _tapped(self) -> nn.Linear | None:
        """The output embedding, if logits are just its product; families may scale them after."""
        output: Any = cast(Any, self.model).get_output_embeddings()
        if not isinstance(output, nn.Linear) or isinstance(output.forward, Absent):
            return None
        module: Any = output
        plain, module.forward = output.forward, Tap(output)
        inputs = self._on_device(self.sample())
        with torch.no_grad():
            try:
                same = torch.equal(plain(self.run(inputs, tap=True)), self.run(inputs))
            except AttributeError:  # the model never calls it, and gives logits at the tap
                same = False
        if same:
            return output
        module.forward = plain
        return None

    def _probe(self, blocks: nn.ModuleList) -> tuple[list[bool], int]:
        seen: list[Any] = []
        hooks = [b.register_forward_hook(lambda _m, _a, out: seen.append(out)) for b in blocks]
        with torch.no_grad():
            self.model(**self._on_device(self.sample()))
        for hook in hooks:
            hook.remove()
        if len(seen) != len(blocks):
            raise ModelError(
                f"{self.name} ran {len(seen)} blocks of {len(blocks)} in one forward: a forward "
                "that skips or repeats blocks cannot be cut between them."
            )
        in_tuple = [isinstance(out, tuple) for out in seen]
        first = seen[0][0] if in_tuple[0] else seen[0]
        if not isinstance(first, Tensor) or (self.states is None and first.dim() != 3):
            raise ModelError(f"The blocks of {self.name} do not pass on one hidden state.")
        return in_tuple, int(first.shape[-1])

    def check(self, trunk: Backbone) -> None:
        """Raises ModelError unless a cut forward, its trunk run by ``trunk``, is the whole one."""
        inputs = self._on_device(self.sample())
        cut, last = max(1, self.depth // 3), self.depth - 1
        blank = trunk.blanks(
            {k: tuple(v.shape) for k, v in inputs.items()}, inputs.get("attention_mask")
        )
        with torch.no_grad():
            whole = self.run(inputs)
            try:
                front = self.run(inputs, last=cut)
                middle = trunk.run(blank, first=cut, last=last, feed=front)
                cut_up = self.run(inputs, first=last, feed=middle)
            except (KeyError, TypeError, RuntimeError, IndexError, AttributeError) as problem:
                raise ModelError(f"{self.name} cannot be cut: {problem}") from problem
        if not torch.equal(whole, cut_up):
            raise ModelError(
                f"{self.name} cannot be cut: its blocks exchange more than one hidden state (a cut "
                f"forward differs from the whole one by {float((whole - cut_up).abs().max()):.1e})."
            )

    def _on_device(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {k: v.to(next(self.model.parameters()).device) for k, v in inputs.items()}
