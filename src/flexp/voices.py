"""Continues a text with the pretrained model and with clients' adapters, by PEFT alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from flexp import assets, export
from flexp.client.speech import VARIED
from flexp.data.tokens import open_tokenizer
from flexp.errors import ExportError
from flexp.model.skeleton import auto

BASE = "base"


@dataclass(frozen=True)
class Voices:
    """One pretrained model and the adapters that it can wear, by name of their folder."""

    model: Any
    tokenizer: Any
    names: tuple[str, ...]

    def speak(
        self, text: str, *, tokens: int = 40, only: Sequence[str] | None = None
    ) -> dict[str, str]:
        """What the base model and every adapter say after a text, up to so many tokens.

        Always the likeliest token that repeats no three tokens, so the answer is always the same.
        ``only`` leaves the others out.
        """
        out: dict[str, str] = {}
        for name in (BASE, *self.names):
            if only is not None and name not in only:
                continue
            with self.model.disable_adapter() if name == BASE else nullcontext():
                if name != BASE:
                    self.model.set_adapter(name)
                out[name] = self._continue(text, tokens)
        return out

    def _continue(self, text: str, tokens: int) -> str:
        given = self.tokenizer(text, return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            ids = self.model.generate(
                **given,
                max_new_tokens=tokens,
                use_cache=True,
                do_sample=False,
                repetition_penalty=VARIED.repetition_penalty,
                no_repeat_ngram_size=VARIED.no_repeat_ngram_size,
                pad_token_id=self.tokenizer.eos_token_id,
            )
        fresh = ids[0, given["input_ids"].shape[1] :]
        return str(self.tokenizer.decode(fresh, skip_special_tokens=True)).strip()


def open_voices(folders: Sequence[Path], cache: assets.Cache) -> Voices:
    """Opens adapters of one pretrained model; ExportError if they are not of one, or no LM's."""
    cards = {folder: export.card_of(folder) for folder in folders}
    first = cards[folders[0]]
    names = tuple(folder.resolve().name for folder in folders)
    for folder, card in cards.items():
        if card.task != "causal-lm":
            raise ExportError(f'{folder} is a "{card.task}" adapter: it labels texts, see predict.')
        if (card.base, card.revision) != (first.base, first.revision):
            raise ExportError(
                f"{folder} is of {card.base}, {folders[0]} of {first.base}. Open them apart."
            )
    if len(set(names)) < len(names):
        raise ExportError("Two of these folders have the same name. Open them apart.")
    source = assets.resolve(first.base, cache, revision=first.revision)
    plain = auto("causal-lm").from_pretrained(source, use_safetensors=True, dtype=torch.float32)
    plain.generation_config.max_length = None  # what is asked for counts, not the model's default
    worn = cast("Any", export.open_with_peft(plain, folders[0], name=names[0]))
    for folder, name in zip(folders[1:], names[1:], strict=True):
        export.open_with_peft(worn, folder, name=name)
    return Voices(worn, open_tokenizer(source), names)
