"""Checkpoints of random weights, for what needs a shape and not a trained model."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from flexp.model.skeleton import TaskKind, head_leaves, skeleton

CLASSES = 4

LLAMA_1B: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128_256,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "dtype": "bfloat16",
}


def shapes(stream: random.Random) -> list[tuple[str, TaskKind, Any]]:
    """Four families with sizes drawn at random."""

    def sizes(**more: Any) -> dict[str, Any]:
        heads = stream.choice([8, 10, 12, 16])
        size = 64 * heads
        return {
            "hidden_size": size,
            "vocab_size": 1000 * stream.randint(8, 40),
            "num_hidden_layers": stream.randint(4, 8),
            "num_attention_heads": heads,
            "intermediate_size": 128 * stream.randint(size // 64, size // 32),
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **more,
        }

    gpt2 = sizes()
    return [
        ("random bert", "classification", made(hf.BertConfig, sizes())),
        (
            "random gpt2",
            "causal-lm",
            hf.GPT2Config(
                n_embd=gpt2["hidden_size"],
                n_layer=gpt2["num_hidden_layers"],
                n_head=gpt2["num_attention_heads"],
                vocab_size=gpt2["vocab_size"],
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            ),
        ),
        (
            "random qwen3",
            "causal-lm",
            made(hf.Qwen3Config, sizes(num_key_value_heads=2, head_dim=64)),
        ),
        (
            "random modernbert",
            "classification",
            made(hf.ModernBertConfig, sizes(cls_token_id=1, sep_token_id=2)),
        ),
    ]


def made(config: Any, sizes: Mapping[str, Any]) -> Any:
    return config(**sizes)


def write_model(folder: Path, config: Any, task: TaskKind) -> Path:
    """A checkpoint of random weights in the config's dtype, written a few megabytes at a time."""
    config.save_pretrained(folder)
    bones = skeleton(folder, task, classes=CLASSES)
    head = () if task == "causal-lm" else head_leaves(bones.model, None, bones.blocks_path)
    dtype: torch.dtype = getattr(bones.config, "dtype", None) or torch.float32
    held = {
        name: value
        for name, value in bones.model.named_parameters()
        if name.rpartition(".")[0] not in head
    }
    stream = torch.Generator().manual_seed(0)
    noise = raw((0.02 * torch.randn(1 << 20, generator=stream)).to(dtype))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header(held, dtype))
        for name, value in held.items():
            size = value.numel() * dtype.itemsize
            if value.dim() < 2:
                start = 1.0 if name.endswith("weight") else 0.0
                file.write(raw(torch.full((value.numel(),), start, dtype=dtype)))
                continue
            for at in range(0, size, len(noise)):
                file.write(noise[: size - at])
    return folder


def header(held: Mapping[str, torch.Tensor], dtype: torch.dtype) -> bytes:
    """The head of a safetensors file."""
    names = {torch.float32: "F32", torch.bfloat16: "BF16"}
    at, rows = 0, dict[str, Any]()
    for name, value in held.items():
        size = value.numel() * dtype.itemsize
        shape = list(value.shape)
        rows[name] = {"dtype": names[dtype], "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **rows}).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.view(torch.uint8).numpy().tobytes()
