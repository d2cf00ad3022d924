"""What makes a model's inputs of rows: its tokenizer, or the pixels that it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flexp.data.images import open_pixels
from flexp.data.tokens import open_tokenizer
from flexp.model.skeleton import TaskKind, image_shape, read_config


def open_reader(folder: Path, kind: TaskKind) -> Any:
    """The tokenizer or ``Pixels`` of a model's folder; DataError or ModelError if it has none."""
    if kind != "images":
        return open_tokenizer(folder)
    return open_pixels(folder, image_shape(read_config(folder, kind, 2, None)))
