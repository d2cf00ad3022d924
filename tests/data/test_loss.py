"""The chunked loss is the plain one: value and gradient, at every length and dtype."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from flexp.data import loss


@pytest.mark.parametrize("tokens", [1, loss.CHUNK - 1, loss.CHUNK, 3 * loss.CHUNK + 5])
@pytest.mark.parametrize("bias", [True, False])
def test_chunked_is_plain(tokens: int, bias: bool) -> None:
    stream = torch.Generator().manual_seed(tokens)
    output = nn.Linear(8, 50, bias=bias).requires_grad_(False)
    hidden = torch.randn(tokens, 8, generator=stream).requires_grad_()
    targets = torch.randint(50, (tokens,), generator=stream)
    chunked = loss.chunked_loss(hidden, output, targets)
    (mine,) = torch.autograd.grad(3 * chunked, hidden)
    plain = functional.cross_entropy(output(hidden), targets)
    (theirs,) = torch.autograd.grad(3 * plain, hidden)
    torch.testing.assert_close(chunked, plain)
    torch.testing.assert_close(mine, theirs)


def test_nothing_to_predict_is_no_loss() -> None:
    hidden = torch.zeros(0, 8, requires_grad=True)
    output = nn.Linear(8, 5).requires_grad_(False)
    value = loss.chunked_loss(hidden, output, torch.zeros(0, dtype=torch.int64))
    assert value.item() == 0


def test_bfloat16_logits_are_summed_in_single() -> None:
    output = nn.Linear(8, 50, bias=False).requires_grad_(False).bfloat16()
    hidden = torch.ones(2, 8, dtype=torch.bfloat16, requires_grad=True)
    value = loss.chunked_loss(hidden, output, torch.tensor([1, 2]))
    (grad,) = torch.autograd.grad(value, hidden)
    assert value.dtype == torch.float32
    assert grad.dtype == torch.bfloat16


def test_images_are_compared_place_by_place() -> None:
    """A direction is that of all channels at a place, whichever way the state is laid out."""
    stream = torch.Generator().manual_seed(7)
    mine, theirs = (torch.randn(2, 6, 5, generator=stream) for _ in range(2))
    wanted = loss.apart(mine, theirs, None)
    maps = [of.transpose(1, 2).reshape(2, 5, 3, 2) for of in (mine, theirs)]
    assert torch.allclose(loss.apart(maps[0], maps[1], None), wanted)
    assert not torch.allclose(
        loss.apart(mine.transpose(1, 2), theirs.transpose(1, 2), None), wanted
    )
    assert torch.equal(loss.places(mine[:, 0]), mine[:, :1])
