"""Toy models that do not repeat one token, and what the library itself says after a text."""

from __future__ import annotations

import functools
import re
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from toys import COMMON, FAMILIES, H, V, drawn_once, model_of, task_of

from flexp.dice import Dice
from flexp.model.adapter import Kind, Lora
from flexp.model.backbone import Backbone
from flexp.tensors import Tensors

SPEAKING = tuple(f for f in FAMILIES if task_of(model_of(f, 2)) == "causal-lm")
DEPTH = 3
KIND = Lora(rank=3, alpha=6.0)
PROMPT = (5, 9, 3, 11, 7, 13, 2)


def plain(family: str, depth: int = DEPTH) -> Any:
    """The library's own model, its blocks loud enough that context decides the next token."""
    return louder(drawn_once(*OTHERS[family]) if family in OTHERS else model_of(family, depth))


def louder(model: Any) -> Any:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and re.search(r"\.\d+\.", name):
                weight.mul_(20.0)
    return model.eval().requires_grad_(False)


@functools.cache
def talker(family: str, depth: int = DEPTH) -> Backbone:
    return Backbone(plain(family, depth), task="causal-lm")


def drawn(body: Backbone, seed: int = 7, kind: Kind = KIND) -> Tensors:
    """An adapter that is random everywhere."""
    stream = Dice(seed)("drawn")
    return {
        k: v + 0.2 * torch.randn(v.shape, generator=stream("tensor", name=k).generator())
        for k, v in body.initial(kind, Dice(0)).items()
    }


def library_says(model: Any, ids: Any, tokens: int) -> tuple[list[int], list[Tensor]]:
    """Greedy tokens and logits of the model's own cached decoding."""
    past = hf.DynamicCache(config=model.config)
    said, found, given = list[int](), list[Tensor](), torch.tensor([ids])
    with torch.no_grad():
        for _ in range(tokens):
            out = model(input_ids=given, past_key_values=past, use_cache=True, logits_to_keep=1)
            found.append(out.logits[0, -1])
            said.append(int(found[-1].argmax()))
            given = torch.tensor([said[-1:]])
    return said, found


N: dict[str, Any] = {**COMMON, "num_hidden_layers": DEPTH}
OTHERS: dict[str, tuple[Any, Any]] = {
    "mistral": (
        hf.MistralForCausalLM,
        hf.MistralConfig(**N, num_key_value_heads=1, sliding_window=4),
    ),
    "phi": (hf.PhiForCausalLM, hf.PhiConfig(**N)),
    "bloom": (
        hf.BloomForCausalLM,
        hf.BloomConfig(
            vocab_size=V, hidden_size=H, n_head=2, n_layer=DEPTH, tie_word_embeddings=False
        ),
    ),
    "cohere2": (hf.Cohere2ForCausalLM, hf.Cohere2Config(**N, sliding_window=4)),
}
RECURRENT = (
    hf.MambaForCausalLM,
    hf.MambaConfig(
        vocab_size=V, hidden_size=H, num_hidden_layers=DEPTH, state_size=4, pad_token_id=0
    ),
)
