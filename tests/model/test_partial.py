"""A side that holds only its own blocks computes what the whole model computes, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from toys import CLASSES, CONVOLUTIONS, FAMILIES, batches_for, kind_for, same, task_of
from toys import _families as families

from flexp.dice import Dice
from flexp.errors import ModelError
from flexp.model.adapter import Dense, Ia3, Kind, Lora
from flexp.model.backbone import Backbone
from flexp.model.cut import Cut
from flexp.model.worn import read
from flexp.tensors import Tensors

DEPTH = 4
CUTS = (Cut(1, 1), Cut(2, 0))


def saved(family: str, folder: Path, *, base: bool = False, shard: str = "5GB") -> Any:
    """A random checkpoint of a family; ``base``: without head, as pretrained encoders come."""
    made, config = families(DEPTH)[family]
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        model = made(config)
        for value in model.parameters():  # fresh biases and gains are all alike, and would hide
            value.data.add_(torch.randn_like(value), alpha=0.02)
    kept = getattr(model, model.base_model_prefix) if base else model
    kept.save_pretrained(folder, max_shard_size=shard)
    return model


def opened(folder: Path, like: Any, **more: Any) -> Backbone:
    return Backbone.open(folder, task=task_of(like), classes=CLASSES, **more)


def sides(cut: Cut) -> tuple[frozenset[int], frozenset[int]]:
    far = frozenset(range(cut.front, DEPTH - cut.back))
    return frozenset(range(DEPTH)) - far, far


def stages(
    near: Backbone, far: Backbone, cut: Cut, adapter: Tensors
) -> tuple[list[Tensor], Tensors]:
    """Hidden states at both cuts, logits, and the adapter's gradients, each side doing its own."""
    leaves = {k: v.clone().requires_grad_() for k, v in adapter.items()}
    worn = read(leaves, 16.0)
    inputs: dict[str, Any] = dict(batches_for(near, 1)[0].inputs)
    blank = far.blanks({k: tuple(v.shape) for k, v in inputs.items()}, inputs.get("attention_mask"))
    last = DEPTH - cut.back
    front = near.run(inputs, worn, last=cut.front)
    middle = far.run(blank, worn, first=cut.front, last=last, feed=front)
    logits = near.run(inputs, worn, first=last, feed=middle)
    logits.square().mean().backward()
    grads = {k: v.grad for k, v in leaves.items() if v.grad is not None}
    return [front.detach(), middle.detach(), logits.detach()], grads


def stirred(body: Backbone) -> Tensors:
    """An adapter of which no gradient vanishes."""
    begun = body.initial(kind_for(body), Dice(1))
    stream = torch.Generator().manual_seed(2)
    return {k: v + 0.05 * torch.randn(v.shape, generator=stream) for k, v in begun.items()}


@pytest.mark.parametrize("family", [*FAMILIES, *CONVOLUTIONS])
@pytest.mark.daily("llama", "gemma3", "gpt2", "bert-cls", "modernbert-cls", "vit", "resnet")
def test_two_halves_are_the_whole(family: str, tmp_path: Path) -> None:
    model = saved(family, tmp_path, base="cls" in family)
    body = opened(tmp_path, model)
    adapter = stirred(body)
    for cut in CUTS:
        near, far = (opened(tmp_path, model, blocks=held) for held in sides(cut))
        trunk = opened(tmp_path, model, blocks=sides(cut)[1], outside=False)
        assert near.head == far.head == trunk.head == body.head
        wanted, grads = stages(body, body, cut, adapter)
        assert grads.keys() == adapter.keys()
        assert torch.equal(wanted[-1], body.run(batches_for(body, 1)[0].inputs, read(adapter, 16)))
        for server in (far, trunk):
            found, found_grads = stages(near, server, cut, adapter)
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
            assert same(found_grads, grads)


def tensors(body: Backbone) -> Iterator[tuple[str, Tensor]]:
    yield from body.model.named_parameters()
    yield from body.model.named_buffers()


@pytest.mark.parametrize("family", ["llama-tied", "gpt2-cls", "modernbert-cls", "vit"])
def test_what_is_held_is_the_whole_loads_and_the_rest_is_nowhere(
    family: str, tmp_path: Path
) -> None:
    model = saved(family, tmp_path, base="cls" in family, shard="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    whole = dict(tensors(opened(tmp_path, model)))
    half = opened(tmp_path, model, blocks=frozenset({0, 3}))
    held = dict(tensors(half))
    gone = (f"{half.blocks_path}.1.", f"{half.blocks_path}.2.")
    assert same(held, {k: v for k, v in whole.items() if not k.startswith(gone)})
    assert half.held == {0, 3}
    assert half.depth == DEPTH
    assert half.block_of(f"base_model.model.{gone[1]}x") == 2
    blocks = half.model.get_submodule(half.blocks_path)
    assert not list(blocks[1].parameters())  # pyright: ignore[reportIndexIssue]
    assert type(half.model) is type(model)


def test_weights_are_converted_and_attributes_kept(tmp_path: Path) -> None:
    model = saved("gemma3", tmp_path)
    part = opened(tmp_path, model, blocks=frozenset({3}), dtype=torch.bfloat16)
    assert {v.dtype for _, v in part.model.named_parameters()} == {torch.bfloat16}
    assert "bfloat16" in str(part.dtype)
    blocks: Any = part.model.get_submodule(part.blocks_path)
    kinds = [block.self_attn for block in blocks]
    own = [b.self_attn for b in model.get_submodule(part.blocks_path)]
    assert [k.is_sliding for k in kinds] == [k.is_sliding for k in own]


def test_an_absent_block_cannot_be_run(tmp_path: Path) -> None:
    model = saved("llama", tmp_path)
    near = opened(tmp_path, model, blocks=frozenset({0, 3}))
    inputs = batches_for(near, 1)[0].inputs
    with pytest.raises(ModelError, match=r"layers\.1"):
        near.run(inputs)
    with pytest.raises(ModelError, match=r"layers\.1"):
        near.run(inputs, last=2)
    trunk = opened(tmp_path, model, blocks=frozenset({1, 2, 3}), outside=False)
    hidden = near.run(inputs, last=1)
    with pytest.raises(ModelError, match="lm_head"):
        trunk.run(inputs, first=1, feed=hidden)


@pytest.mark.parametrize("blocks", [frozenset[int](), frozenset({4}), frozenset({-1, 0})])
def test_blocks_outside_the_model_are_refused(blocks: frozenset[int], tmp_path: Path) -> None:
    model = saved("gpt2", tmp_path)
    with pytest.raises(ModelError, match="0 to 3"):
        opened(tmp_path, model, blocks=blocks)


@pytest.mark.parametrize("fast", [False, True])
def test_tied_heads_stay_tied(fast: bool, tmp_path: Path) -> None:
    model = saved("llama-tied", tmp_path)
    near = opened(tmp_path, model, blocks=frozenset({0, 3}), fast=fast)
    net: Any = near.model
    assert net.lm_head.weight is net.model.embed_tokens.weight
    assert near.output is (net.lm_head if fast else None)
    trunk = opened(tmp_path, model, blocks=frozenset({1, 2}), fast=fast, outside=False)
    assert trunk.output is None
    names = [k for k, _ in trunk.model.named_parameters()]
    assert not any("embed_tokens" in k or "lm_head" in k for k in names)


@pytest.mark.parametrize("family", ["llama", "gpt2-cls"])
@pytest.mark.parametrize("kind", [Lora(rank=2, dora=True), Lora(rank=2), Ia3()], ids=str)
def test_adapters_begin_alike(family: str, kind: Kind, tmp_path: Path) -> None:
    model = saved(family, tmp_path, base="cls" in family)
    body = opened(tmp_path, model)
    part = opened(tmp_path, model, blocks=frozenset({1, 3}))
    whole, found = body.initial(kind, Dice(4)), part.initial(kind, Dice(4))
    copied = {k for k in whole if "magnitude" in k and body.block_of(k) in (0, 2)}
    assert bool(copied) == getattr(kind, "dora", False)
    assert same(found, {k: v for k, v in whole.items() if k not in copied})
    assert part.layout(kind) == body.layout(kind)


@pytest.mark.parametrize(
    "targets", [("model.layers.0.mlp.up_proj", "model.layers.2.mlp.up_proj"), ("up_proj",), ()]
)
def test_trained_modules_begin_as_the_held_ones(targets: tuple[str, ...], tmp_path: Path) -> None:
    model = saved("llama", tmp_path)
    kind = Dense(targets)
    part = opened(tmp_path, model, blocks=frozenset({2}))
    body = opened(tmp_path, model)
    whole, found = body.initial(kind, Dice(4)), part.initial(kind, Dice(4))
    assert same(found, {k: v for k, v in whole.items() if ".2." in k})
    assert len(found) == (1 if targets else 7)
    assert part.layout(kind) == body.layout(kind)


def test_an_absent_block_is_not_even_looked_at(tmp_path: Path) -> None:
    """What a file says of an absent block can be of any shape: it is never read."""
    from safetensors.torch import load_file, save_file

    model = saved("bert-cls", tmp_path, base=True)
    file = tmp_path / "model.safetensors"
    damaged = {
        k: torch.zeros(1) if ".layer.1." in k or k.startswith("layer.1.") else v
        for k, v in load_file(file).items()
    }
    assert sum(v.shape == (1,) for v in damaged.values()) > 10
    whole = opened(tmp_path, model)
    save_file(damaged, file, {"format": "pt"})
    part = opened(tmp_path, model, blocks=frozenset({0, 2, 3}))
    held = dict(part.model.named_parameters())
    assert same(held, {k: v for k, v in whole.model.named_parameters() if k in held})


def test_the_library_still_calls_the_model_its_own(tmp_path: Path) -> None:
    """A hollow model remains an instance of the library's class, loaded by its own rules."""
    model = saved("roberta-cls", tmp_path, base=True)
    part = opened(tmp_path, model, blocks=frozenset({0}))
    assert type(part.model) is hf.RobertaForSequenceClassification
    assert not any(v.is_meta for _, v in tensors(part))
