"""Tokenizers: opened, told apart, and asked for the ids of texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from flexp import libraries
from flexp.data.examples import Example
from flexp.data.images import Pixels
from flexp.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def open_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder; DataError if it has none."""
    try:
        return libraries.transformers().AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as problem:
        first = str(problem).strip().splitlines()[0].strip()
        why = "" if first.endswith(":") else f" ({first.rstrip('.')})"  # a list follows
        raise DataError(
            f'"{source}" has no tokenizer that can be opened{why}. '
            "Give a folder with its files, or set task.kind to images for a model of images."
        ) from problem


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase | Pixels) -> str:
    """SHA-256 of all that decides which ids a text, or numbers an image, becomes."""
    if isinstance(tokenizer, Pixels):
        return tokenizer.digest
    held = cast("Any", tokenizer)
    inner = getattr(held, "backend_tokenizer", None)
    whole = inner.to_str() if inner is not None else json.dumps(held.get_vocab(), sort_keys=True)
    special = json.dumps([held.all_special_tokens, held.all_special_ids, held.padding_side])
    return hashlib.sha256(f"{whole}\n{special}".encode()).hexdigest()


def padding_of(tokenizer: PreTrainedTokenizerBase | Pixels) -> int | None:
    """The id that batches are padded with; None of images."""
    if isinstance(tokenizer, Pixels):
        return None
    held = cast("Any", tokenizer)
    return held.pad_token_id if held.pad_token_id is not None else held.eos_token_id


def ids_of(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    whole: bool = False,
    max_length: int | None = None,
) -> tuple[Example, ...]:
    """Token ids; a special token spelled out in a text is text and commands nothing."""
    if not texts:
        return ()
    encoded = tokenizer(
        list(texts),
        add_special_tokens=whole,
        truncation=max_length is not None,
        max_length=max_length,
        return_attention_mask=False,
        return_token_type_ids=False,
        split_special_tokens=True,
        verbose=False,
    )
    return tuple(tuple(ids) for ids in cast("list[list[int]]", encoded["input_ids"]))


def begin_of(tokenizer: PreTrainedTokenizerBase) -> Example:
    """The token that this tokenizer puts before every text, when it does."""
    (plain,), (full,) = ids_of(tokenizer, ["a"]), ids_of(tokenizer, ["a"], whole=True)
    begin = only(tokenizer.bos_token_id)
    return begin if begin and full[: 1 + len(plain)] == (*begin, *plain) else ()


def only(token: Any) -> Example:
    return (token,) if isinstance(token, int) else ()


def filler_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id at padding, which the attention mask hides."""
    return (*only(tokenizer.pad_token_id), *only(tokenizer.eos_token_id), 0)[0]
