"""The demo's attacker finds what is there to be found, and no more."""

from __future__ import annotations

import pytest
import torch
from toys import backbone

from flexp.errors import ModelError
from flexp.model.backbone import Backbone
from flexp.privacy.attack import nearest, rate, recover


def said(body: Backbone, front: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    stream = torch.Generator().manual_seed(7)
    public = torch.randint(1, 40, (48, 12), generator=stream)
    ids = torch.randint(1, 40, (1, 10), generator=stream)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        hidden = body.run(inputs, last=front)[0]
    return hidden, ids[0], public


@pytest.mark.parametrize("front", [1, 3])
def test_a_causal_front_without_adapters_hides_nothing(front: int) -> None:
    body = backbone("llama")
    hidden, ids, public = said(body, front)
    assert rate(recover(body, hidden, front=front, public=public), ids) == 1.0


def test_embeddings_are_read_off() -> None:
    body = backbone("llama")
    hidden, ids, public = said(body, 0)
    assert rate(recover(body, hidden, front=0, public=public), ids) == 1.0


def test_an_encoder_leaks_far_more_than_chance() -> None:
    body = backbone("bert-cls")
    hidden, ids, public = said(body, 1)
    assert rate(recover(body, hidden, front=1, public=public), ids) >= 0.5


def test_noise_is_not_read() -> None:
    body = backbone("llama")
    hidden, ids, public = said(body, 1)
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    assert rate(recover(body, noise, front=1, public=public), ids) <= 0.3


def test_the_nearest_row_comes_first() -> None:
    table = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    assert nearest(torch.tensor([[2.0, 0.1]]), table, 2).tolist() == [[0, 2]]


def test_pictures_have_no_tokens() -> None:
    body = backbone("vit")
    with pytest.raises(ModelError, match="token ids"):
        recover(body, torch.zeros(2, 4), front=1, public=torch.zeros(1, 2, dtype=torch.int64))
