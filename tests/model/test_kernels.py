"""Faster ways to compute what a model's code computes: what they change, and what they do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers as hf
from torch import nn
from toys import model_of
from transformers import activations

from flexp.model.backbone import Backbone
from flexp.model.kernels import AGREES, WIDE, attend_wide, fuse
from flexp.model.ops import Grad, Optim, Step
from flexp.model.slots import Slots
from flexp.selection import Place

IDS = torch.arange(18).reshape(2, 9) % 11 + 1
MASK = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])


def through(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the gradient of what is fed in."""
    x = cast(Any, model).get_input_embeddings()(IDS).detach().requires_grad_()
    out = model(inputs_embeds=x, attention_mask=MASK).logits
    (grad,) = torch.autograd.grad(out.float().square().sum(), x)
    return out.detach(), grad


def way(model: nn.Module) -> str:
    return cast(Any, model).config._attn_implementation


def decoder(dtype: torch.dtype) -> nn.Module:
    return model_of("llama").eval().requires_grad_(requires_grad=False).to(dtype)


def test_bfloat16_attends_in_float32_on_a_processor() -> None:
    """Types stay bfloat16's; numbers are as near to float32's as before or nearer."""
    true = through(decoder(torch.bfloat16).float())
    plain = through(decoder(torch.bfloat16))
    model = decoder(torch.bfloat16)
    attend_wide(model)
    wide = through(model)
    assert way(model) == WIDE
    for mine, before, exact in zip(wide, plain, true, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine - exact).norm() < 1.05 * (before - exact).norm()
    assert not torch.equal(wide[1], plain[1])


def test_float32_attends_as_ever() -> None:
    model = decoder(torch.float32)
    before = through(model)
    attend_wide(model)
    assert all(torch.equal(a, b) for a, b in zip(before, through(model), strict=True))


def test_what_attends_in_its_own_way_keeps_it() -> None:
    model = decoder(torch.bfloat16)
    cast(Any, model).set_attn_implementation("eager")
    attend_wide(model)
    assert way(model) == "eager"


@pytest.mark.parametrize(
    ("written", "fused"),
    [
        (activations.NewGELUActivation(), True),
        (activations.FastGELUActivation(), True),
        (activations.GELUActivation(use_gelu_python=True), True),
        (activations.QuickGELUActivation(), False),
        (activations.MishActivation(), False),
        (nn.GELU(), False),
        (nn.Dropout().eval(), False),
    ],
)
def test_a_gelu_that_is_written_out_becomes_one_operation(written: nn.Module, fused: bool) -> None:
    x = torch.randn(50, 7)
    plain, own = written(x), written.forward
    model = nn.Sequential(nn.Linear(2, 2), written)
    fuse(model)
    assert (written.forward != own) == fused
    torch.testing.assert_close(written(x), plain, rtol=0.0, atol=AGREES)


def test_what_is_no_function_of_one_tensor_stays() -> None:
    class Two(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a + b

    class Gain(nn.Module):
        """A gelu, but with a number of its own."""

        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.gain * nn.functional.gelu(x)

    model = nn.Sequential(Two(), Gain())
    fuse(model)
    assert all("forward" not in vars(m) for m in model)


def test_only_mode_fast_has_other_last_bits(tmp_path: Path) -> None:
    """In mode exact a model's own code runs, to the bit."""
    model_of("gpt2").save_pretrained(tmp_path)
    own = hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    batch = {"input_ids": IDS, "attention_mask": MASK}
    plain = own(**batch).logits
    exact, fast = (Backbone.open(tmp_path, task="causal-lm", fast=fast) for fast in (False, True))
    with torch.no_grad():
        assert torch.equal(exact.run(batch), plain)
        found = fast.run(batch)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
    assert not torch.equal(found, plain)


def test_a_fused_step_is_the_step() -> None:
    """AdamW with decay over five steps, as slots and gradients may lie: but for the last bits."""
    ends: list[torch.Tensor] = []
    for fused in (False, True):
        slots = Slots(lambda name: Place("far", "trunk", 0, 1), 1, fused=fused)
        slots.optims["s"] = Optim(lr=1e-2, weight_decay=0.1)
        slots.put("s", {"w": torch.linspace(-1, 1, 5000).cos().view(100, 50).T})
        for n in range(5):
            slope = torch.linspace(1, 200, 5000).sin().view(50, 100)
            slots.gather("s", {"w": (n - 1.5) * (slope if n % 2 else slope.view(100, 50).T)})
            slots.do((Grad(("s",), ("s@g",)), Step("s", "s@g")))
        ends.append(slots["s"]["w"])
    torch.testing.assert_close(*ends, rtol=0.0, atol=1e-6)
    assert not torch.equal(*ends)
