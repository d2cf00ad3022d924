"""Writes a personal adapter as a PEFT folder that any PEFT tool opens, and reads one back."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save as to_bytes
from torch import nn

from flexp import headers, libraries
from flexp.client.desk import Desk
from flexp.data.tokens import open_tokenizer
from flexp.dice import Dice
from flexp.errors import ExportError, ParcelError
from flexp.model.adapter import Kind, Prompt, peft_config
from flexp.model.backbone import Backbone
from flexp.model.skeleton import PEFT_TASK, bare, drawn, read_config
from flexp.model.weights import Checkpoint
from flexp.model.worn import PREFIX
from flexp.parcel import write_atomic
from flexp.products import lora_pairs
from flexp.tensors import Tensors


@dataclass(frozen=True)
class Card:
    """What an adapter needs beside its tensors to be used: its backbone and its labels.

    ``base`` is an asset's name, a hub id or a path; ``folder`` is where it lies on this machine,
    for PEFT.
    ``prior`` holds the client's log label frequencies if it was trained relative to them: add them
    to the logits for the client's own texts, not for others. ``seed`` is the run's: what no
    checkpoint has was drawn from it.
    """

    base: str
    task: str
    labels: tuple[str, ...] = ()
    max_length: int = 128
    revision: str | None = None
    prior: tuple[float, ...] | None = None
    folder: str | None = None
    seed: int = 0


def write(folder: Path, adapter: Tensors, backbone: Backbone, kind: Kind, card: Card) -> None:
    """A PEFT folder: adapter_model.safetensors, adapter_config.json, and flexp.json.

    LoRA's rank is what the tensors have; PEFT takes one for all, and those that are others.
    Raises ExportError if the kind is not one PEFT adapter on this model.
    """
    if isinstance(kind, Prompt) and (backbone.head or kind.at != "front"):
        what = "with a trained head" if backbone.head else f'"{kind.at}" its input'
        raise ExportError(f"PEFT has no prompt adapter {what}. Use a LoRA adapter.")
    pairs = lora_pairs(adapter).items()
    ranks = {path.removeprefix(PREFIX): len(adapter[a]) for path, (a, _) in pairs}
    rank = max(ranks.values(), default=None)
    config = peft_config(
        kind,
        PEFT_TASK[backbone.task],
        bare(backbone.config, backbone.task).model,
        backbone.blocks_path,
        backbone.head,
        rank=rank,
    )
    if others := {path: r for path, r in ranks.items() if r != rank}:
        config.rank_pattern = others
    config.base_model_name_or_path = card.folder or card.base
    config.revision = card.revision
    config.inference_mode = True
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    flat = {k: v.detach().cpu().contiguous().clone() for k, v in adapter.items()}
    write_atomic(folder / "adapter_model.safetensors", to_bytes(flat, {"format": "pt"}))
    note: Mapping[str, Any] = {
        "base": card.base,
        "revision": card.revision,
        "task": card.task,
        "labels": list(card.labels),
        "max_length": card.max_length,
        "prior": list(card.prior) if card.prior is not None else None,
        "seed": card.seed,
    }
    write_atomic(folder / "flexp.json", json.dumps(note, indent=1).encode())


def card_at(
    desk: Desk, base: str, revision: str | None, folder: Path | None, *, seed: int = 0
) -> Card:
    """The card of what a client has at its desk; ``base`` is the model as its recipe names it."""
    task: Any = desk.task
    local = Path(base).expanduser()
    return Card(
        base=str(local.resolve()) if local.exists() else base,
        task=task.name,
        labels=tuple(getattr(task, "labels", ())),
        max_length=task.max_length,
        revision=revision,
        prior=None if desk.prior is None else tuple(map(float, desk.prior)),
        folder=None if folder is None else str(folder.resolve()),
        seed=seed,
    )


def card_of(folder: Path) -> Card:
    """The card of an exported adapter; ExportError if the folder has none."""
    try:
        note = json.loads((folder / "flexp.json").read_text(encoding="utf-8"))
        prior = note["prior"]
        return Card(
            base=note["base"],
            task=note["task"],
            labels=tuple(note["labels"]),
            max_length=note["max_length"],
            revision=note["revision"],
            prior=tuple(prior) if prior is not None else None,
            seed=int(note.get("seed", 0)),
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as problem:
        raise ExportError(
            f"{folder} is not an adapter that flexp wrote: {problem}. "
            "Give the folder of one client, as runs/NAME/adapters/CLIENT."
        ) from problem


def open_with_peft(model: nn.Module, folder: Path, *, name: str = "default") -> nn.Module:
    """The model wearing an exported adapter under a name, by PEFT alone; safetensors only.

    A model that wears adapters already gets one more. ExportError if the file is missing or odd.
    """
    if not (folder / "adapter_model.safetensors").is_file():
        # PEFT would fall back to a pickle here.
        raise ExportError(f"{folder} has no adapter_model.safetensors.")
    try:
        headers.of_file(folder / "adapter_model.safetensors")
    except ParcelError as problem:
        raise ExportError(str(problem)) from problem
    with torch.no_grad(), warnings.catch_warnings():
        # PEFT asks for a property that transformers renamed; both versions are what we pin.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        worn = libraries.peft().PeftModel
        if isinstance(model, worn):
            cast("Any", model).load_adapter(str(folder), name)
            return model.eval()
        return worn.from_pretrained(model, str(folder), name).eval()


def merge(adapter: Path, source: Path, out: Path, *, labels: int | None = None) -> None:
    """The pretrained model with the adapter worked into its weights, as a plain model folder.

    ``labels`` is the number of classes of a classifier. fp32, safetensors; raises ExportError if
    the folder is in use.
    """
    if out.exists() and any(out.iterdir()):
        raise ExportError(f"{out} is not empty. Choose another folder.")
    card = card_of(adapter)
    kind: Any = card.task
    config = read_config(source, kind, labels or 2, card.revision)
    if drawn(config):
        raise ExportError(
            f"{card.base} has no weights of its own to merge into. Use the adapter as it is."
        )
    dice = Dice(card.seed)("head")
    plain = Checkpoint(source, config, kind, torch.float32, card.revision, dice).load()[0]
    worn: Any = open_with_peft(plain, adapter)
    merged = worn.merge_and_unload()
    if card.labels:
        merged.config.id2label = dict(enumerate(card.labels))
        merged.config.label2id = {label: n for n, label in enumerate(card.labels)}
    merged.save_pretrained(str(out))
    if kind != "images":
        tokenizer: Any = open_tokenizer(source)
        tokenizer.save_pretrained(str(out))
    elif (settings := source / "preprocessor_config.json").is_file():
        write_atomic(out / settings.name, settings.read_bytes())
