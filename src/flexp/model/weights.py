"""The backbone's weights: read from safetensors only, filled in where a checkpoint lacks them."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from flexp import libraries
from flexp.dice import Dice
from flexp.errors import ModelError
from flexp.model.files import tables
from flexp.model.hollow import Part, hollow, part, without
from flexp.model.quantize import Quantize, quantizable, quantize_maps, together
from flexp.model.skeleton import Skeleton, TaskKind, auto, bare, drawn
from flexp.precision import widen


@dataclass(frozen=True)
class Checkpoint:
    """Where a model's weights are, a folder or hub id, and how they are read.

    ``dice`` draws the parameters that the checkpoint lacks.
    """

    source: str | Path
    config: Any
    task: TaskKind
    dtype: torch.dtype
    revision: str | None
    dice: Dice

    def load(
        self,
        blocks: Iterable[int] | None = None,
        *,
        outside: bool = True,
        quantize: Quantize | None = None,
        blocks_at: str | None = None,
    ) -> tuple[nn.Module, set[str] | None, str | None]:
        """The model, the names of what the checkpoint lacks, and the path of the list of blocks.

        Of a model that is drawn there is no checkpoint to lack anything (None).

        Only the tensors of these blocks are read (None: all), and what lies ``outside``. The path
        stays as it is given where nothing is left out. Raises ModelError; no parser sees a file of
        a folder whose header is odd.
        """
        if Path(self.source).is_dir():
            tables(Path(self.source))
        if drawn(self.config):
            return self._drawn(blocks, blocks_at, quantize)
        if blocks is None and outside and quantize is None:
            return *self._read(), blocks_at
        bones = bare(self.config, self.task, blocks_at=blocks_at)
        wanted = part(bones, blocks, outside)
        if quantize is None:
            return *self._read(wanted), bones.blocks_path
        held = range(bones.depth) if blocks is None else sorted(blocks)
        return *self._quantized(bones, held, outside, quantize), bones.blocks_path

    def _drawn(
        self, blocks: Iterable[int] | None, blocks_at: str | None, quantize: Quantize | None
    ) -> tuple[nn.Module, None, str]:
        """The model that a config describes, without a checkpoint."""
        if quantize is not None:
            raise ModelError(
                f'"{self.source}" is drawn, not pretrained: its weights are what is trained, so '
                "they cannot be codes. Set model.quantize to none."
            )
        bones = bare(self.config, self.task, blocks_at=blocks_at)
        model = cast(nn.Module, auto(self.task).from_config(self.config))
        hollow(model, part(bones, blocks, outside=True).absent)
        fill(model, {name for name, _ in model.named_parameters()}, self.dice, drawn=True)
        return model.to(self.dtype), None, bones.blocks_path

    def _read(self, wanted: Part | None = None) -> tuple[nn.Module, set[str]]:
        loader = auto(self.task) if wanted is None else wanted.loader()
        try:
            model, info = loader.from_pretrained(
                self.source,
                config=self.config if wanted is None else wanted.config,
                revision=self.revision,
                dtype=self.dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=self.task != "causal-lm",
            )
        except (OSError, ValueError, RuntimeError) as problem:
            first = str(problem).strip().splitlines()[0]
            raise ModelError(
                f'The weights of "{self.source}" cannot be loaded: {first}'
            ) from problem
        mismatched = {row[0] for row in info.get("mismatched_keys", ())}
        model = model if wanted is None else wanted.restore(model)
        lacking = set(info["missing_keys"]) | mismatched
        fill(model, lacking, self.dice)
        widen(model)
        return model, lacking

    def _quantized(
        self, bones: Skeleton, held: Iterable[int], outside: bool, how: Quantize
    ) -> tuple[nn.Module, set[str]]:
        """Codes in the blocks that are held, of which few at a time are there wide."""
        every = range(bones.depth)
        paths = quantizable(bones.model, bones.blocks_path, how.kind)
        model, lacking = self._read(without(bones, every, outside=outside))
        home = cast(nn.ModuleList, model.get_submodule(bones.blocks_path))
        wide = cast(nn.ModuleList, bones.model.get_submodule(bones.blocks_path))
        sizes = {i: sum(p.numel() for p in wide[i].parameters()) for i in held}
        for some in together({i: n * self.dtype.itemsize for i, n in sizes.items()}):
            with _silent():
                one, lacks = self._read(
                    without(bones, [i for i in every if i not in some], outside=False)
                )
            for index in some:
                stem = f"{bones.blocks_path}.{index}"
                quantize_maps(one, [p for p in paths if p.startswith(f"{stem}.")], how.form)
                home[index] = _freed(one.get_submodule(stem), model)
            lacking |= lacks
        return model, lacking


@contextmanager
def _silent() -> Generator[None]:
    """Within this the library neither draws bars nor tells again what a checkpoint lacks."""
    told = libraries.transformers().logging
    before, bars = told.get_verbosity(), told.is_progress_bar_enabled()
    told.set_verbosity_error()
    told.disable_progress_bar()
    try:
        yield
    finally:
        told.set_verbosity(before)
        if bars:
            told.enable_progress_bar()


def _freed(block: nn.Module, model: nn.Module) -> nn.Module:
    """A block that holds neither its file nor the model that it was read with."""
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.data = parameter.data.clone()
    config: Any = cast(Any, model).config
    for module in block.modules():
        if type(getattr(module, "config", None)) is type(config):
            cast(Any, module).config = config
    return block


def fill(model: nn.Module, lacking: set[str], dice: Dice, *, drawn: bool = False) -> None:
    """Gives parameters that the checkpoint lacks the same values in every process.

    Matrices are normal with the config's own width, gains one, biases zero. Where all is ``drawn``
    the variance of a matrix is one over the numbers that each output reads (LeCun et al. 1998).
    """
    std = float(getattr(cast(Any, model).config, "initializer_range", 0.02) or 0.02)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name not in lacking:
                continue
            if value.dim() > 1:
                fresh = torch.empty(value.shape)
                width = value[0].numel() ** -0.5 if drawn else std
                value.copy_(
                    fresh.normal_(0.0, width, generator=dice("fill", name=name).generator())
                )
            else:
                value.fill_(1.0 if name.endswith("weight") else 0.0)
