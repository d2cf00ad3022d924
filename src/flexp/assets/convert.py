"""Turns a Llama in GGUF into the folder that Hugging Face's loaders read, in bfloat16.

Loading GGUF takes seconds every time and its tensors cannot be trained; converted once, the model
opens like any other. Other architectures than ``llama`` are refused: their layouts differ.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import TYPE_CHECKING, cast

import numpy as np

from flexp.errors import AssetError

if TYPE_CHECKING:
    from pathlib import Path

    from gguf import GGUFReader
    from numpy.typing import NDArray
    from tokenizers import Tokenizer
    from torch import Tensor
    from transformers import LlamaConfig

Facts = dict[str, object]

_WHOLE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.weight")
_WHOLE_TOKENS = {"3": True, "4": False}  # GGUF's kinds of token never split: a control token?
_SPLITS = {"gpt-2": False, "smollm": True}  # GGUF's name of a pre-tokenizer: digits one by one?
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def require_gguf(name: str) -> None:
    """Check for the extra, before anything large is downloaded for ``name``.

    Raises:
        AssetError: it is not installed.
    """
    if find_spec("gguf") is None:
        raise AssetError(
            f"{name} must be converted, which needs the package gguf. "
            'Run: pip install "flexp-sfl[gguf]"'
        )


def convert_gguf(source: Path, folder: Path) -> None:
    """Write config, weights and tokenizer of the GGUF file ``source`` into ``folder``.

    Raises:
        AssetError: the extra is not installed, or the file is not a Llama with a BPE tokenizer.
    """
    require_gguf(source.name)
    from gguf import GGUFReader
    from safetensors.torch import save

    reader = GGUFReader(source)
    facts: Facts = {name: field.contents() for name, field in reader.fields.items()}
    if facts.get("general.architecture") != "llama":
        found = facts.get("general.architecture", "nothing")
        raise AssetError(f"{source.name} holds {found}; only the architecture llama is converted.")
    tensors = _tensors(reader, _whole(facts, "llama.attention.head_count"), _kv_heads(facts))
    config = _config(facts, tied="lm_head.weight" not in tensors)
    (folder / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    config.save_pretrained(folder)  # pyright: ignore[reportUnknownMemberType]
    _save_tokenizer(facts, folder)


def _tensors(reader: GGUFReader, heads: int, kv_heads: int) -> dict[str, Tensor]:
    import torch
    from gguf.quants import dequantize

    tensors: dict[str, Tensor] = {}
    for tensor in reader.tensors:
        name = _hf_name(tensor.name)
        values: NDArray[np.float32] = dequantize(tensor.data, tensor.tensor_type)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            values = _unpermute(values, heads if "q_proj" in name else kv_heads)
        # A copy: the reader maps the file read-only, which torch warns about.
        tensors[name] = torch.tensor(np.array(values)).to(torch.bfloat16)
    return tensors


def _hf_name(name: str) -> str:
    match = _NAME.fullmatch(name)
    if match is not None:
        block, part = match.groups()
        if block is None and part in _WHOLE:
            return f"{_WHOLE[part]}.weight"
        if block is not None and part in _BLOCK:
            return f"model.layers.{block}.{_BLOCK[part]}.weight"
    raise AssetError(f"The GGUF file has a tensor {name} that a plain Llama does not have.")


def _unpermute(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Undo GGUF's interleaving of the two rotary halves, head by head."""
    rows, width = values.shape
    halves = values.reshape(heads, rows // heads // 2, 2, width)
    return halves.swapaxes(1, 2).reshape(rows, width)


def _config(facts: Facts, *, tied: bool) -> LlamaConfig:
    from transformers import LlamaConfig

    heads = _whole(facts, "llama.attention.head_count")
    width = _whole(facts, "llama.embedding_length")
    eos = _whole(facts, "tokenizer.ggml.eos_token_id")
    return LlamaConfig(
        vocab_size=len(_texts(facts, "tokenizer.ggml.tokens")),
        hidden_size=width,
        intermediate_size=_whole(facts, "llama.feed_forward_length"),
        num_hidden_layers=_whole(facts, "llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=_kv_heads(facts),
        head_dim=_whole(facts, "llama.rope.dimension_count", width // heads),
        max_position_embeddings=_whole(facts, "llama.context_length"),
        rms_norm_eps=_real(facts, "llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": _real(facts, "llama.rope.freq_base", 10_000.0),
        },
        bos_token_id=_whole(facts, "tokenizer.ggml.bos_token_id"),
        eos_token_id=eos,
        pad_token_id=_whole(facts, "tokenizer.ggml.padding_token_id", eos),
        tie_word_embeddings=tied,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def _save_tokenizer(facts: Facts, folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokens = _texts(facts, "tokenizer.ggml.tokens")
    special = {
        f"{name}_token": tokens[_whole(facts, key)]
        for name, short in _SPECIAL.items()
        if (key := f"tokenizer.ggml.{short}_token_id") in facts
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_bpe(facts, tokens),
        model_max_length=_whole(facts, "llama.context_length"),
        chat_template=facts.get("tokenizer.chat_template"),
        **special,
    )
    tokenizer.save_pretrained(folder)  # pyright: ignore[reportUnknownMemberType]


def _bpe(facts: Facts, tokens: list[str]) -> Tokenizer:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind, split = facts.get("tokenizer.ggml.model"), str(facts.get("tokenizer.ggml.pre"))
    if kind != "gpt2" or split not in _SPLITS or facts.get("tokenizer.ggml.add_bos_token"):
        raise AssetError(f'The GGUF file\'s tokenizer "{kind}", "{split}" is none that is known.')
    merges: list[tuple[str, str]] = []
    for merge in _texts(facts, "tokenizer.ggml.merges"):
        left, _, right = merge.partition(" ")
        merges.append((left, right))
    bpe = Tokenizer(models.BPE({token: place for place, token in enumerate(tokens)}, merges))
    pieces: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if _SPLITS[split]:
        pieces.insert(0, pre_tokenizers.Digits(individual_digits=True))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(pieces)
    bpe.decoder = decoders.ByteLevel()
    kinds = _texts(facts, "tokenizer.ggml.token_type")
    for token, its in zip(tokens, kinds, strict=True):
        if its in _WHOLE_TOKENS:
            added = AddedToken(token, normalized=False, special=_WHOLE_TOKENS[its])
            bpe.add_tokens([added])  # pyright: ignore[reportUnknownMemberType]
    return bpe


def _kv_heads(facts: Facts) -> int:
    return _whole(
        facts, "llama.attention.head_count_kv", _whole(facts, "llama.attention.head_count")
    )


def _whole(facts: Facts, key: str, default: int | None = None) -> int:
    value = facts.get(key, default)
    if not isinstance(value, int):
        raise AssetError(f"The GGUF file has no number {key}, so it cannot be converted.")
    return value


def _real(facts: Facts, key: str, default: float | None = None) -> float:
    value = facts.get(key, default)
    if not isinstance(value, float):
        raise AssetError(f"The GGUF file has no number {key}, so it cannot be converted.")
    return float(str(np.float32(value)))  # kept in 32 bits: 9.999999747e-06 was 1e-05


def _texts(facts: Facts, key: str) -> list[str]:
    value = facts.get(key)
    if not isinstance(value, list):
        raise AssetError(f"The GGUF file has no list {key}, so it cannot be converted.")
    return [str(item) for item in cast("list[object]", value)]
