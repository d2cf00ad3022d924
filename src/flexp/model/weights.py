"""The backbone's weights: read from safetensors only, filled in where a checkpoint lacks them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from flexp.dice import Dice
from flexp.errors import ModelError
from flexp.model.files import tables
from flexp.model.hollow import Part
from flexp.model.skeleton import TaskKind, auto
from flexp.precision import widen


def load(
    source: str | Path,
    config: Any,
    task: TaskKind,
    *,
    dtype: torch.dtype,
    revision: str | None,
    part: Part | None = None,
) -> tuple[nn.Module, set[str]]:
    """The model of a folder or hub id, and the names of the parameters that it lacks.

    Only the tensors of a ``part`` are read. Raises ModelError; no parser sees a file of a folder
    whose header is odd.
    """
    if Path(source).is_dir():
        tables(Path(source))
    loader = auto(task) if part is None else part.loader()
    try:
        model, info = loader.from_pretrained(
            source,
            config=config if part is None else part.config,
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
    model = model if part is None else part.restore(model)
    widen(model)
    return model, set(info["missing_keys"]) | mismatched


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
