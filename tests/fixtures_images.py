"""Images of three kinds of stripes, as files in a folder per client and class, and a recipe."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

KINDS = ("across", "down", "plain")
CNN: dict[str, Any] = {
    "model_type": "flexp-blocks",
    "architectures": ["Blocks"],
    "channels": [6],
    "kernel": 3,
    "hidden_size": 16,
    "image_size": 8,
    "num_channels": 1,
}
RESNET: dict[str, Any] = {**CNN, "residual": True, "channels": [8, 16]}
VIT: dict[str, Any] = {
    "model_type": "vit",
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}


def drawing(kind: str, stream: random.Random, *, size: int = 8) -> bytes:
    """A grey image of that kind, as a PGM file."""
    numbers = bytearray()
    for y in range(size):
        for x in range(size):
            lit = {"across": y % 2, "down": x % 2, "plain": 0.5}[kind]
            numbers.append(int(40 + 160 * lit + stream.randrange(50)))
    return f"P5 {size} {size} 255\n".encode() + bytes(numbers)


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Three clients, each with a folder per class."""
    folder = tmp_path / "album"
    for n, client in enumerate(("anna", "ben", "carl dee")):
        stream = random.Random(n)
        for at in range(24):
            kind = KINDS[at % 3]
            path = folder / client / kind / f"{at}.pgm"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(drawing(kind, stream))
    return folder


@pytest.fixture
def images_of(tmp_path: Path, album: Path) -> Callable[..., Path]:
    """Writes a small recipe of images; ``model`` is the config of a model that is drawn."""

    def write(model: dict[str, Any], **changes: Any) -> Path:
        source = tmp_path / "drawn"
        source.mkdir(exist_ok=True)
        (source / "config.json").write_text(json.dumps({"drawn": True, **model}))
        plain: dict[str, Any] = {
            "name": "album",
            "rounds": 2,
            "data": {"path": str(album), "split": [0.5, 0.2, 0.3]},
            "task": {"kind": "images"},
            "model": {"source": str(source)},
            "adapter": {"kind": "dense", "targets": ["*"]},
            "train": {"steps": 4, "batch": 6, "lr": 0.01},
            "plan": {"cut": [1, 1]},
            "strategy": {"name": "fedavg"},
            "out": str(tmp_path / "runs"),
        }
        for name, value in changes.items():
            part, _, key = name.partition("__")
            if key:
                plain[part] = {**plain[part], key: value}
            else:
                plain[part] = value
        file = tmp_path / "images.yaml"
        file.write_text(yaml.safe_dump(plain), encoding="utf-8")
        return file

    return write
