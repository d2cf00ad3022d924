"""The probe's gradient, against autograd of the whole model and against the closed form."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional
from toys import COMMON, at_desk, backbone, batches_for, toy_task, wrap

from flexp.client.signature import last_map, signature
from flexp.data.examples import Batch
from flexp.errors import AdapterError
from flexp.model.backbone import Backbone
from flexp.model.cut import Cut, Seat
from flexp.model.quantize import QuantizedLinear
from flexp.quantized import quantize

FAMILIES = {
    "llama": "layers.3.mlp.down_proj",
    "gpt2": "h.3.mlp.c_proj",
    "bert-cls": "layer.3.output.dense",
    "vit": "layers.3.mlp.fc2",
}


def by_autograd(body: Backbone, batch: Batch) -> Tensor:
    """The gradient of that weight with a graph through the whole model."""
    weight: Any = body.model.get_submodule(last_map(body)).weight
    weight.requires_grad_()
    try:
        loss = toy_task(body).loss(body.model(**batch.inputs).logits, batch.labels)
        (found,) = torch.autograd.grad(loss, [weight])
    finally:
        weight.requires_grad_(False)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_signature_is_the_gradient_of_the_last_map(family: str) -> None:
    body = backbone(family)
    (batch,) = batches_for(body, 1)
    assert last_map(body).endswith(FAMILIES[family])
    found, expected = signature(body, toy_task(body), batch), by_autograd(body, batch)
    expected = expected.T if family == "gpt2" else expected
    assert found.shape == expected.shape
    assert found.abs().max() > 1e-4
    assert torch.allclose(found, expected, atol=1e-6, rtol=1e-5)


def test_it_is_the_closed_form_of_a_layer_norm_and_the_output_embedding() -> None:
    body = backbone("gpt2")
    (batch,) = batches_for(body, 1)
    found = signature(body, toy_task(body), batch)
    assert torch.allclose(found, closed(body, batch, exact=True), atol=1e-6, rtol=1e-5)


def test_the_diagonal_of_a_wide_root_mean_square_norm_is_close_to_it() -> None:
    wide: Any = {**COMMON, "hidden_size": 256, "num_hidden_layers": 2}
    body = wrap(hf.LlamaForCausalLM, hf.LlamaConfig(**wide))
    (batch,) = batches_for(body, 1)
    found = signature(body, toy_task(body), batch)
    exact, diagonal = (closed(body, batch, exact=exact) for exact in (True, False))
    assert torch.allclose(found, exact, atol=1e-6, rtol=1e-5)
    assert float(functional.cosine_similarity(found.flatten(), diagonal.flatten(), dim=0)) > 0.99
    assert not torch.allclose(found, diagonal, atol=1e-6, rtol=1e-5)


def closed(body: Backbone, batch: Batch, *, exact: bool) -> Tensor:
    """v' x by hand: v = J' (softmax z - onehot y) W / n, J the norm's Jacobian, or its diagonal."""
    model: Any = body.model
    inside = model.get_decoder() if hasattr(model, "get_decoder") else model.transformer
    norm = inside.norm if hasattr(inside, "norm") else inside.ln_f
    seen: dict[str, Tensor] = {}
    module = model.get_submodule(last_map(body))
    hooks = [
        module.register_forward_pre_hook(lambda _m, args: seen.update(x=args[0])),
        norm.register_forward_pre_hook(lambda _m, args: seen.update(h=args[0])),
    ]
    with torch.no_grad():
        logits = model(**batch.inputs).logits[:, :-1]
    for hook in hooks:
        hook.remove()
    labels = batch.labels[:, 1:]
    there = labels != -100
    delta = logits.softmax(-1) - functional.one_hot(labels.clamp_min(0), logits.shape[-1])
    delta = delta * there[..., None] / there.sum()
    h, x = seen["h"][:, :-1], seen["x"][:, :-1]
    v = delta @ model.get_output_embeddings().weight * norm.weight
    if hasattr(norm, "variance_epsilon"):  # RMSNorm
        spread = h.square().mean(-1, keepdim=True) + norm.variance_epsilon
        unit, middle = h * spread.rsqrt(), 0.0
    else:
        h = h - h.mean(-1, keepdim=True)
        spread = h.square().mean(-1, keepdim=True) + norm.eps
        unit, middle = h * spread.rsqrt(), v.mean(-1, keepdim=True)
    if exact:
        v = v - middle - unit * (v * unit).mean(-1, keepdim=True)
    else:
        v = v * (1 - unit.square() / h.shape[-1])
    v = v * spread.rsqrt()
    return v.flatten(0, 1).T @ x.flatten(0, 1)


def test_it_does_not_see_what_a_client_wears() -> None:
    body = backbone()
    (batch,) = batches_for(body, 1)
    before = signature(body, toy_task(body), batch)
    with at_desk(body, Seat(Cut(1, 1))) as (desk, _):
        desk.fit(steps=2)
        assert torch.equal(signature(body, toy_task(body), batch), before)


def test_a_block_without_such_a_map_is_refused() -> None:
    body: Any = SimpleNamespace(blocks_path="blocks", depth=1, sizes=(3, 0), name="Odd")
    body.model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(3, 2)])})
    with pytest.raises(AdapterError, match="The last block of Odd has no linear map"):
        last_map(body)


def test_codes_have_no_gradient() -> None:
    body = backbone()
    path = last_map(body)
    parent, _, leaf = path.rpartition(".")
    plain: Any = body.model.get_submodule(path)
    made = quantize(plain.weight.detach(), "int8")
    setattr(
        body.model.get_submodule(parent), leaf, QuantizedLinear(made, plain.bias, torch.float32)
    )
    with pytest.raises(AdapterError, match="weights are codes"):
        signature(body, toy_task(body), batches_for(body, 1)[0])
