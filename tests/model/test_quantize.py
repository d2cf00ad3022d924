"""Backbones whose linear maps hold codes: split = monolith, and what is in memory where."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from agreement import Known, agree, trained
from model.test_partial import opened, saved
from torch import Tensor, nn
from toys import FAMILIES, backbone, batches_for, cuts, same, task_of, whole

from flexp.dice import Dice
from flexp.errors import ModelError
from flexp.model.adapter import Dense, Kind, Lora
from flexp.model.backbone import Backbone
from flexp.model.cut import Cut, Seat
from flexp.model.kindred import join
from flexp.model.quantize import (
    TOGETHER,
    Quantize,
    QuantizedLinear,
    quantizable,
    quantize_maps,
    together,
)
from flexp.model.skeleton import bare
from flexp.model.worn import read
from flexp.plan import measure_costs, near_bytes
from flexp.plan.sizes import quantized_costs
from flexp.quantized import Form, quantize

FORMS: tuple[Form, ...] = ("int8", "nf4")


def quantized(body: Backbone, form: Form, kind: Kind | None = None) -> Backbone:
    """A backbone of the same weights whose frozen linear maps hold codes."""
    fresh = backbone_like(body)
    quantize_maps(fresh, quantizable(fresh, body.blocks_path, kind or Lora()), form)
    return Backbone(fresh, task=body.task)


def backbone_like(body: Backbone) -> nn.Module:
    """A plain model with a backbone's weights."""
    fresh = type(body.model)(body.config)  # pyright: ignore[reportCallIssue]
    fresh.load_state_dict(body.model.state_dict())
    return fresh.eval()


def maps(body: Backbone) -> dict[str, QuantizedLinear]:
    return {p: m for p, m in body.model.named_modules() if isinstance(m, QuantizedLinear)}


@pytest.mark.parametrize(
    ("family", "form", "seat"),
    [
        ("llama", "int8", Seat(Cut(2, 1))),
        ("gpt2", "nf4", Seat(Cut(1, 1), recompute=2)),
        ("bert-cls", "nf4", Seat(Cut(1), "logits")),
        ("modernbert-cls", "int8", Seat(Cut(1, 2))),
    ],
)
def test_a_cut_model_of_codes_trains_like_the_whole_one(
    family: str, form: Form, seat: Seat
) -> None:
    body = quantized(backbone(family), form)
    assert maps(body)
    agree(body, seat)


@pytest.mark.families
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_codes_at_every_cut(family: str, form: Form) -> None:
    body, known = quantized(backbone(family), form), Known()
    for seat in cuts(body.depth):
        agree(body, seat, known=known)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_it_trains_like_the_dense_model_of_what_the_codes_stand_for(family: str) -> None:
    """Within rounding: GPT-2's own maps multiply in another order."""
    body = backbone(family)
    narrow = quantized(body, "nf4")
    plain: Any = backbone_like(body)
    for path, module in maps(narrow).items():
        there = plain.get_submodule(path)
        wide = module.weight if isinstance(there, nn.Linear) else module.weight.T
        there.weight.data.copy_(wide)
    wanted = trained(Backbone(plain, task=body.task), whole(body.depth))
    found = trained(narrow, whole(body.depth))
    assert torch.allclose(found[0], wanted[0], atol=1e-5)
    assert all(torch.allclose(found[1][k], v, atol=1e-5) for k, v in wanted[1].items())
    assert not torch.allclose(found[0], trained(body, whole(body.depth))[0], atol=1e-3)


@pytest.mark.parametrize(
    ("family", "form"), [("llama-tied", "nf4"), ("bert-cls", "int8"), ("gpt2-cls", "int8")]
)
def test_both_sides_make_the_same_codes_of_a_checkpoint(
    family: str, form: Form, tmp_path: Path
) -> None:
    """Each from its own blocks alone, and as from the whole model."""
    model = saved(family, tmp_path, base="cls" in family, shard="20KB")
    how = Quantize(form, Lora())
    body = opened(tmp_path, model, quantize=how)
    near = opened(tmp_path, model, blocks=frozenset({0, 3}), quantize=how)
    far = opened(tmp_path, model, blocks=frozenset({1, 2}), outside=False, quantize=how)
    tensors = dict(tensors_of(body))
    plain: Any = opened(tmp_path, model).model
    for path, module in maps(body).items():
        there = plain.get_submodule(path)
        made = quantize(there.weight if isinstance(there, nn.Linear) else there.weight.T, form)
        assert torch.equal(module.codes, made.codes)
        assert torch.equal(module.scales, made.scales)
    assert len(maps(body)) == len(maps(near)) + len(maps(far))
    for half in (near, far):
        assert same(dict(tensors_of(half)), {k: tensors[k] for k, _ in tensors_of(half)})
        assert half.head == body.head
    inputs: dict[str, Any] = dict(batches_for(body, 1)[0].inputs)
    blank = far.blanks({k: tuple(v.shape) for k, v in inputs.items()}, inputs["attention_mask"])
    front = near.run(inputs, last=1)
    middle = far.run(blank, first=1, last=3, feed=front)
    assert torch.equal(near.run(inputs, first=3, feed=middle), body.run(inputs))


def tensors_of(body: Backbone) -> list[tuple[str, Tensor]]:
    return [*body.model.named_parameters(), *body.model.named_buffers()]


def test_what_a_checkpoint_lacks_is_drawn_before_it_becomes_codes(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = saved("llama", tmp_path)
    file, name = tmp_path / "model.safetensors", "model.layers.1.mlp.up_proj"
    held = load_file(file)
    del held[f"{name}.weight"]
    save_file(held, file, {"format": "pt"})
    plain = opened(tmp_path, model)
    body = opened(tmp_path, model, quantize=Quantize("int8", Lora()))
    weight = plain.model.get_parameter(f"{name}.weight")
    assert torch.equal(maps(body)[name].codes, quantize(weight, "int8").codes)


def test_magnitudes_begin_at_and_divide_by_what_the_codes_stand_for() -> None:
    body = quantized(backbone("gpt2"), "nf4")
    kind = Lora(rank=2, dora=True)
    begun = body.initial(kind, Dice(1))
    path, module = next(iter(maps(body).items()))
    found = begun[f"base_model.model.{path}.lora_magnitude_vector"]
    assert torch.equal(found, torch.linalg.vector_norm(module.weight, dim=1))
    inputs = batches_for(body, 1)[0].inputs
    assert torch.allclose(body.run(inputs, read(begun, 4.0)), body.run(inputs), atol=1e-5)


def test_what_is_trained_itself_stays_as_it_is() -> None:
    body = backbone("bert-cls")
    path = f"{body.blocks_path}.1.intermediate.dense"
    for targets in ((path,), ("intermediate.dense",), (f"{body.blocks_path}.1.intermediate",)):
        kind = Dense(targets)
        narrow = quantized(body, "int8", kind)
        assert path not in maps(narrow)
        assert f"{body.blocks_path}.1.output.dense" in maps(narrow)
        assert same(narrow.initial(kind, Dice(1)), body.initial(kind, Dice(1)))
    with pytest.raises(ModelError, match=r"model\.quantize.*none"):
        quantized(body, "int8", Dense())


def test_another_head_uses_the_servers_codes(tmp_path: Path) -> None:
    model = saved("bert-cls", tmp_path, base=True)
    how = Quantize("nf4", Lora())
    body, other = (
        Backbone.open(tmp_path, task=task_of(model), classes=n, quantize=how) for n in (3, 5)
    )
    join(other, body, Lora(), "ben")
    theirs = maps(body)
    for path, module in maps(other).items():
        assert module.codes is theirs[path].codes
        assert module.scales is theirs[path].scales


def test_large_blocks_are_read_one_at_a_time() -> None:
    third = TOGETHER // 3
    assert together({0: third, 1: third, 3: third, 4: third}) == [[0, 1, 3], [4]]
    assert together({0: TOGETHER + 1, 1: TOGETHER, 2: 1}) == [[0], [1], [2]]
    assert together({}) == []


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_plan_counts_the_bytes_of_codes(family: str, form: Form) -> None:
    body = quantized(backbone(family), form)
    bones = bare(body.config, body.task)
    sized = measure_costs(bones.model, bones.blocks_path, {}, batch=1, length=8, itemsize=4)
    costs = replace(quantized_costs(sized, bones, Quantize(form, Lora())), file_itemsize=2)
    blocks = body.model.get_submodule(body.blocks_path)
    held = sum(
        tensor.nbytes
        for module in blocks.modules()
        for tensor in (
            *module.parameters(recurse=False),
            *((module.codes, module.scales) if isinstance(module, QuantizedLinear) else ()),
        )
    )
    assert sum(costs.block_bytes) == held
    assert costs.block_bytes < sized.block_bytes
    wide = sized.block_bytes[0]
    # While small blocks are read they are there wide, and as in a file of half the size.
    assert near_bytes(costs, 2, 1)["activations"] == sum(sized.block_bytes[:3]) * 3 // 2
    assert near_bytes(costs, 1, 0)["weights"] == (
        near_bytes(sized, 1, 0)["weights"] - wide + costs.block_bytes[0]
    )
