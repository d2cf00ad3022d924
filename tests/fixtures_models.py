"""A tiny classifier in a folder, with a tokenizer, and a folder of clients' jsonl files."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers

POSITIVE = ("lovely", "great", "happy", "superb")
NEGATIVE = ("awful", "bad", "sad", "poor")
FILLER = ("day", "film", "meal", "phone", "song", "trip")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of four blocks without a classification head, as a checkpoint would be."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    words = ["[PAD]", "[UNK]", *POSITIVE, *NEGATIVE, *FILLER]
    inner = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]"
    )
    config = hf.BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        hf.BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random decoder of four blocks whose output is tied to its embeddings."""
    folder = tmp_path_factory.mktemp("model") / "tiny-lm"
    words = ["[PAD]", "[END]", "[UNK]", *POSITIVE, *NEGATIVE, *FILLER]
    inner = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", eos_token="[END]", unk_token="[UNK]"
    )
    config = hf.LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        hf.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """Three clients, one jsonl file each."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for n, client in enumerate(("anna", "ben", "carl dee")):
        stream = random.Random(n)
        lines: list[str] = []
        for _ in range(20):
            label = stream.choice(("negative", "positive"))
            word = stream.choice(POSITIVE if label == "positive" else NEGATIVE)
            text = " ".join([stream.choice(FILLER), word, stream.choice(FILLER)])
            lines.append(json.dumps({"text": text, "label": label}))
        (folder / f"{client}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def recipe_of(tmp_path: Path, tiny_model: Path, mine: Path) -> Callable[..., Path]:
    """Writes a small recipe; keyword arguments are merged into it, dotted by double underscores."""

    def write(**changes: Any) -> Path:
        plain: dict[str, Any] = {
            "name": "mine",
            "rounds": 3,
            "data": {"path": str(mine), "split": [0.6, 0.2, 0.2]},
            "task": {"max_length": 16},
            "model": {"source": str(tiny_model)},
            "adapter": {"rank": 2, "alpha": 4.0},
            "train": {"steps": 2, "batch": 4, "lr": 0.01},
            "plan": {"cut": [1, 1]},
            "out": str(tmp_path / "runs"),
        }
        for name, value in changes.items():
            here, path = plain, name.split("__")
            for step in path[:-1]:
                here = here.setdefault(step, {})
            if value is None:
                here.pop(path[-1], None)
            else:
                here[path[-1]] = value
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(plain), encoding="utf-8")
        return file

    return write
