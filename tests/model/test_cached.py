"""Blocks that keep keys and values say what the whole model says, wherever it is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from talkers import (
    DEPTH,
    OTHERS,
    PROMPT,
    RECURRENT,
    SPEAKING,
    drawn,
    library_says,
    plain,
    talker,
)
from torch import Tensor
from toys import backbone, wrap
from transformers import AutoModelForCausalLM

from flexp.errors import ModelError
from flexp.model import cached
from flexp.model.backbone import Backbone
from flexp.model.cached import Cached
from flexp.model.worn import Worn, read

TOKENS = 14
CUTS = [(a, b) for a in range(DEPTH + 1) for b in range(DEPTH - a + 1)]


def says(*sides: Cached) -> tuple[list[int], list[Tensor]]:
    """Greedy tokens and logits of sides one behind the other."""
    said, found, given = list[int](), list[Tensor](), torch.tensor([PROMPT])
    for _ in range(TOKENS):
        out: Any = {"input_ids": given}
        for side in sides:
            out = side.run(out)
        found.append(out[0, -1])
        said.append(int(found[-1].argmax()))
        given = torch.tensor([said[-1:]])
    return said, found


def cut(bodies: tuple[Backbone, Backbone], a: int, b: int, worn: Worn | None = None) -> Any:
    near, far = bodies
    last = near.depth - b
    return (
        Cached.open(near, 0, a, worn),
        Cached.open(far, a, last, worn, fed=True),
        Cached.open(near, last, None, worn, fed=True),
    )


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


FEW = ("llama-tied", "gemma3", "gpt2")  # in `make test`; the others in `make test-slow`


@pytest.mark.parametrize(
    "family",
    [f if f in FEW else pytest.param(f, marks=pytest.mark.slow) for f in (*SPEAKING, *OTHERS)],
)
def test_every_cut_says_bit_for_bit_what_the_library_says(family: str) -> None:
    body = talker(family)
    tokens, logits = library_says(plain(family), PROMPT, TOKENS)
    assert len(set(tokens)) > 2, "a toy that repeats itself shows nothing"
    whole = says(Cached.open(body))
    assert whole[0] == tokens
    assert equal(whole[1], logits)
    for a, b in CUTS:
        found = says(*cut((body, body), a, b))
        assert found[0] == tokens, (a, b)
        assert equal(found[1], logits), (a, b)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_an_adapter_is_worn_on_both_sides(family: str) -> None:
    body = talker(family)
    worn = read(drawn(body), 6.0)
    whole = says(Cached.open(body, worn=worn))
    assert whole[0] != says(Cached.open(body))[0]
    for a, b in CUTS:
        found = says(*cut((body, body), a, b, worn))
        assert found[0] == whole[0]
        assert equal(found[1], whole[1])


def test_a_cached_text_is_the_uncached_one_up_to_rounding() -> None:
    body = talker("qwen3")
    tokens, logits = says(*cut((body, body), 1, 1))
    ids = torch.tensor([[*PROMPT, *tokens[:-1]]])
    with torch.no_grad():
        right = body.run({"input_ids": ids})[0, len(PROMPT) - 1 :]
    assert float((torch.stack(logits) - right).abs().max()) < 1e-5 * float(right.abs().max())


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_sides_that_hold_only_their_own_blocks(family: str, tmp_path: Path) -> None:
    plain(family).save_pretrained(tmp_path)
    # From the same file: on some processors last bits depend on where in memory a weight lies.
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens, logits = library_says(model, PROMPT, TOKENS)
    near = Backbone.open(tmp_path, task="causal-lm", blocks=frozenset({0, 2}))
    far = Backbone.open(tmp_path, task="causal-lm", blocks=frozenset({1}), outside=False)
    found = says(*cut((near, far), 1, 1))
    assert found[0] == tokens
    assert equal(found[1], logits)


def test_layers_of_blocks_that_run_elsewhere_hold_only_marks() -> None:
    body = talker("llama")
    side = Cached.open(body, 1, 2, fed=True)
    side.run(torch.ones(1, 9, body.width))
    held = [layer.keys.numel() * layer.keys.element_size() for layer in side.past.layers]
    assert held[0] == held[2] == 9
    assert held[1] > 9 * 32


def test_a_run_that_fails_leaves_nothing_behind() -> None:
    body = talker("llama")
    side, other = (Cached.open(body, 1, 3, fed=True) for _ in range(2))
    hidden = torch.sin(torch.arange(6.0 * body.width)).reshape(1, 6, body.width)
    for one in (side, other):
        one.run(hidden[:, :4])
    with pytest.raises(RuntimeError):
        side.run(torch.ones(1, 2, body.width + 1))
    assert side.length == 4
    side.after(hidden[:, 4:])  # nor does what is only tried
    assert torch.equal(side.run(hidden[:, 4:]), other.run(hidden[:, 4:]))


def test_blocks_with_another_state_are_refused() -> None:
    model = wrap(*RECURRENT)
    for first, last, fed in ((0, 1, False), (1, 3, True), (0, None, False)):
        with pytest.raises(ModelError, match="cannot continue a text"):
            Cached.open(model, first, last, fed=fed)
    assert not model.spoken


def test_blocks_that_look_ahead_are_refused() -> None:
    with pytest.raises(ModelError, match="cannot continue a text"):
        Cached.open(backbone("bert-cls"), 1, 3, fed=True)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "opt"])
def test_the_check_sees_a_cache_that_miscounts(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cached, "_level", lambda past, length: None)
    body = Backbone(plain(family), task="causal-lm")
    with pytest.raises(ModelError, match="cannot continue a text"):
        Cached.open(body, 1, 2, fed=True)


def test_a_model_is_checked_once_for_each_way() -> None:
    body = Backbone(plain("llama"), task="causal-lm")
    Cached.open(body, 0, 1)
    assert body.spoken == {(0, 1, False)}
    body.run = None  # pyright: ignore[reportAttributeAccessIssue]
    Cached.open(body, 0, 1)
