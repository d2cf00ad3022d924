"""What commands do with what a run leaves: adapters that predict, talk and are taken along."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from flexp import assets, export, voices
from flexp.data.tasks import Classification
from flexp.data.tokens import padding_of
from flexp.dice import Dice
from flexp.errors import ExportError
from flexp.model.reader import open_reader
from flexp.model.skeleton import read_config
from flexp.model.weights import Checkpoint

Chat = Callable[[str], dict[str, str]]


def predict(folder: Path, texts: Sequence[str], cache: assets.Cache) -> dict[str, Any]:
    """What an exported adapter says to texts, beside the pretrained model; by PEFT alone.

    Of images, which are told by their paths, and of texts with labels it gives these.

    A classifier's head is not pretrained, so there the adapter answers alone.
    """
    card = export.card_of(folder)
    if card.task != "causal-lm":
        return {"adapter": str(folder), "predictions": _labelled(folder, card, texts, cache)}
    spoken = voices.open_voices([folder], cache)
    said = [spoken.speak(text) for text in texts]
    return {
        "adapter": str(folder),
        "predictions": [
            {"text": text, "base": each[voices.BASE], "adapter": each[spoken.names[0]]}
            for text, each in zip(texts, said, strict=True)
        ],
    }


def _labelled(
    folder: Path, card: export.Card, texts: Sequence[str], cache: assets.Cache
) -> list[dict[str, Any]]:
    kind: Any = card.task
    source = assets.resolve(card.base, cache, revision=card.revision)
    config = read_config(source, kind, len(card.labels), card.revision)
    reader, dice = open_reader(source, kind), Dice(card.seed)("head")
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = padding_of(reader)
    model = Checkpoint(source, config, kind, torch.float32, card.revision, dice).load()[0]
    worn: Any = export.open_with_peft(model.eval(), folder)
    task = Classification(card.labels, reader, max_length=card.max_length)
    with torch.no_grad():
        logits: torch.Tensor = worn.get_base_model()(**task.asked(texts).inputs).logits
        if card.prior is not None:
            logits = logits + torch.tensor(card.prior)
        chances = torch.softmax(logits.float(), dim=-1)
    return [
        {
            "text": text,
            "label": card.labels[int(row.argmax())],
            "probabilities": dict(zip(card.labels, map(float, row), strict=True)),
        }
        for text, row in zip(texts, chances, strict=True)
    ]


def chat(folders: Sequence[Path], cache: assets.Cache, *, frame: str, tokens: int) -> Chat:
    """Opens adapters for a conversation; ``frame`` is what is put around every text."""
    if not folders:
        raise ExportError("Name adapter folders, or a server that stays with --via HOST:PORT.")
    framed(frame, "")
    spoken = voices.open_voices(folders, cache)
    return lambda text: spoken.speak(framed(frame, text), tokens=tokens)


def framed(frame: str, text: str) -> str:
    """A text in its frame; ExportError if the frame has no place for it."""
    if "{text}" not in frame:
        raise ExportError('The frame has no "{text}". Give one like "Friend: {text}\\nMe:".')
    return frame.replace("{text}", text)


def export_adapter(
    adapter: Path, out: Path, cache: assets.Cache, *, merged: bool = False
) -> dict[str, Any]:
    """Copies a client's adapter as a PEFT folder, or writes the model with the adapter merged."""
    card = export.card_of(adapter)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out} is there already. Choose another folder.")
    if merged:
        source = assets.resolve(card.base, cache, revision=card.revision)
        export.merge(adapter, source, out, labels=len(card.labels) or None)
    else:
        shutil.copytree(adapter, out, dirs_exist_ok=True)
    files = sorted(path for path in out.iterdir() if path.is_file())
    return {
        "adapter": str(adapter),
        "base": card.base,
        "merged": merged,
        "out": str(out),
        "files": {path.name: path.stat().st_size for path in files},
    }
