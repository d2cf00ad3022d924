"""Modules of blocks trained in full: which ones, how they begin, and what torch makes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from agreement import trained
from torch import nn
from toys import FAMILIES, H, at_desk, backbone, batches_for, cuts, same, toy_task, whole
from transformers.pytorch_utils import Conv1D

from flexp.dice import Dice
from flexp.errors import AdapterError
from flexp.model.adapter import Dense, layout
from flexp.model.backbone import Backbone
from flexp.model.skeleton import bare
from flexp.model.targets import dense_paths
from flexp.model.worn import PREFIX
from flexp.tensors import Tensors

HEAD = {"classifier.weight": (3, H), "classifier.bias": (3,)}
LAYER = "bert.encoder.layer"


def named(body: Backbone, kind: Dense) -> dict[str, tuple[int, ...]]:
    return {k.removeprefix(PREFIX): s for k, s in body.layout(kind).items()}


def test_a_name_is_every_linear_map_of_that_name_in_the_blocks() -> None:
    body = backbone("bert-cls", 2)
    found = named(body, Dense(("query", "output.dense")))
    expected: dict[str, tuple[int, ...]] = dict(HEAD)
    for n in range(2):
        for path, ins in (
            ("attention.self.query", H),
            ("attention.output.dense", H),
            ("output.dense", 48),
        ):
            expected[f"{LAYER}.{n}.{path}.weight"] = (H, ins)
            expected[f"{LAYER}.{n}.{path}.bias"] = (H,)
    assert found == expected  # not bert.pooler.dense: it lies behind the blocks


def test_a_path_is_that_module_alone_and_nothing_is_there_twice() -> None:
    body = backbone("bert-cls", 2)
    norm, block = f"{LAYER}.0.output.LayerNorm", f"{LAYER}.1"
    net = bare(body.config, body.task).model
    kind = Dense((norm, block, "query", norm), head=False)
    paths = dense_paths(net, kind.targets, body.blocks_path)
    assert paths == [norm, block, f"{LAYER}.0.attention.self.query"]
    of_block = {k for k, _ in body.model.named_parameters() if k.startswith(f"{block}.")}
    leaves = {f"{path}.{leaf}" for path in paths[::2] for leaf in ("weight", "bias")}
    assert named(body, kind).keys() == leaves | of_block


@pytest.mark.parametrize("family", ["bert-cls", "gpt2", "modernbert-cls", "gemma3", "vit"])
def test_without_targets_all_linear_maps_of_the_blocks_are_trained(family: str) -> None:
    body = backbone(family)
    blocks = body.model.get_submodule(body.blocks_path)
    expected = {
        f"{body.blocks_path}.{path}.{leaf}"
        for path, module in blocks.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        for leaf, _ in module.named_parameters()
    }
    assert len(expected) >= 4 * body.depth
    assert named(body, Dense(head=False)).keys() == expected


@pytest.mark.parametrize("family", ["bert-cls", "gpt2"])
def test_it_begins_as_the_pretrained_model(family: str) -> None:
    body = backbone(family)
    begun = body.initial(Dense(), Dice(1))
    held = {f"{PREFIX}{k}": v for k, v in body.model.named_parameters()}
    assert begun.keys() == body.layout(Dense()).keys()
    assert same(begun, {k: held[k] for k in begun})
    assert not {v.data_ptr() for v in begun.values()} & {v.data_ptr() for v in held.values()}


@pytest.mark.parametrize(
    ("target", "hint"),
    [
        ("quer", 'Did you mean "query"?'),
        ("pooler", "Known: dense, key, query, value."),
        ("bert.pooler.dense", "Known: dense, key, query, value."),
        ("bert.embeddings.word_embeddings", "Known: dense, key, query, value."),
        (f"{LAYER}.9.output.dense", "Known: dense, key, query, value."),
        (f"{LAYER}.1.output.dropout", "Known: dense, key, query, value."),
        ("LayerNorm", "Known: dense, key, query, value."),
    ],
)
def test_what_is_no_linear_map_of_the_blocks_is_refused(target: str, hint: str) -> None:
    with pytest.raises(AdapterError) as found:
        backbone("bert-cls").layout(Dense(("key", target)))
    assert str(found.value) == f'adapter.targets: no linear map "{target}" in the blocks. {hint}'


def test_blocks_without_a_linear_map_are_refused() -> None:
    net = nn.Module()
    net.blocks = nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(4)])
    with pytest.raises(AdapterError, match="the blocks have no linear map"):
        layout(net, Dense(), "blocks", ())
    assert layout(net, Dense(("blocks.1",)), "blocks", ()).keys() == {
        f"{PREFIX}blocks.1.weight",
        f"{PREFIX}blocks.1.bias",
    }


def by_torch(family: str, names: list[str], steps: int) -> Tensors:
    """The same parameters of the whole model after steps of torch's own AdamW."""
    body = backbone(family)
    task, model = toy_task(body), body.model
    for module in model.modules():
        module.__dict__.pop("forward", None)  # the class as it came
    moved = {k: model.get_parameter(k.removeprefix(PREFIX)).requires_grad_() for k in names}
    optimizer = torch.optim.AdamW(moved.values(), lr=1e-2, weight_decay=0.0, foreach=False)
    for batch in batches_for(body, steps):
        optimizer.zero_grad()
        out: Any = model(**batch.inputs)
        task.loss(out.logits, batch.labels).backward()
        optimizer.step()
    return {k: v.detach() for k, v in moved.items()}


@pytest.mark.parametrize("family", ["bert-cls", "gpt2-cls", "llama", "vit"])
@pytest.mark.parametrize("form", ["keep", "logits"])
def test_split_fine_tuning_is_that_of_torch_bit_for_bit(family: str, form: Any) -> None:
    body = backbone(family)
    with at_desk(body, cuts(4, form)[1], kind=Dense(), task=toy_task(body)) as (desk, _):
        begun = desk.whole("personal")
        desk.fit(batches=iter(batches_for(body, 5)))
        mine = desk.whole("personal")
    assert same(mine, by_torch(family, sorted(mine), 5))
    assert [k for k in mine if torch.equal(mine[k], begun[k])] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_blocks_are_trained_alike_at_a_cut(family: str) -> None:
    body = backbone(family)
    batches = batches_for(body, 2)
    logits, first, after = trained(body, cuts(body.depth)[1], kind=Dense(), batches=batches)
    logits_w, first_w, after_w = trained(body, whole(body.depth), kind=Dense(), batches=batches)
    assert torch.equal(logits, logits_w)
    assert same(first, first_w)
    assert same(after, after_w)
    assert [k for k, g in first.items() if not bool(g.any())] == []
