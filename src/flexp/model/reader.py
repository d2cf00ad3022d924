"""What makes a model's inputs of rows: its tokenizer, or the pixels that it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flexp.data.images import open_pixels
from flexp.data.tokens import open_tokenizer
from flexp.errors import ModelError
from flexp.model.skeleton import TaskKind, image_shape, read_config


def open_reader(folder: Path, kind: TaskKind) -> Any:
    """The tokenizer or ``Pixels`` of a model's folder; DataError or ModelError if it has none."""
    if kind != "images":
        return open_tokenizer(folder)
    config = read_config(folder, kind, 2, None)
    if not hasattr(config, "num_channels"):
        raise ModelError(
            f'"{folder}" is no model of images: its config has no num_channels. '
            "Set model.source to one that takes images, or task.kind to what this one is for."
        )
    return open_pixels(folder, image_shape(config))
