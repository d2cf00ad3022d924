"""The demos' own attacker: token ids from hidden states that crossed the link.

A server that is curious knows the public backbone, embeddings and first blocks included, but not
the client's adapters. It fits a linear map from hidden states at the cut back to embeddings, on
text of its own, and reads off the nearest tokens; in a causal model it then tries these and the
commonest tokens at each place through the public front and keeps the one whose hidden state is
nearest. Stronger attacks exist: a low rate here proves nothing, a high one does.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from flexp.errors import ModelError
from flexp.model.backbone import Backbone

RIDGE = 1e-2  # of the mean variance of a hidden state
CANDIDATES = 24
COMMON = 40  # of the commonest public tokens
ROWS = 16  # of public text through the front at a time


def recover(
    backbone: Backbone,
    hidden: Tensor,
    *,
    front: int,
    public: Tensor,
    candidates: int = CANDIDATES,
) -> Tensor:
    """Token ids [T] of one text, from its hidden states [T, width] at a cut after ``front`` blocks.

    ``public`` [N, length] are ids of text that the attacker has. Raises ModelError for models that
    read no token ids.
    """
    embeddings = cast(Any, backbone.model).get_input_embeddings()
    if not isinstance(embeddings, torch.nn.Embedding):
        raise ModelError("This attacker recovers token ids; the model reads none.")
    table = embeddings.weight.detach().float()
    with torch.no_grad():
        if front == 0:
            return nearest(hidden.float(), table, 1)[:, 0]
        guessed = _inverse(backbone, table, front, public)(hidden.float())
        best = nearest(guessed, table, candidates)
        if backbone.task != "causal-lm":
            return best[:, 0]
        counts = torch.bincount(public.flatten(), minlength=len(table))
        common = counts.topk(min(COMMON, len(table))).indices
        best = torch.cat([best, common.expand(len(best), -1)], dim=1)
        return _tried(backbone, hidden.float(), front, best)


def rate(found: Tensor, true: Tensor) -> float:
    """The share of ids that are right."""
    return float((found == true).float().mean())


def nearest(vectors: Tensor, table: Tensor, count: int) -> Tensor:
    """Rows of a table [V, d] that point where each vector [T, d] does, best first: [T, count]."""
    near = functional.normalize(vectors, dim=-1) @ functional.normalize(table, dim=-1).T
    return near.topk(min(count, len(table)), dim=-1).indices


class _Map:
    """A ridge regression from centred hidden states to centred embeddings."""

    def __init__(self, hidden: Tensor, wanted: Tensor) -> None:
        self.from_mean, self.to_mean = hidden.mean(0), wanted.mean(0)
        x, y = hidden - self.from_mean, wanted - self.to_mean
        gram = x.T @ x
        gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
        self.weight: Tensor = cast(Any, torch.linalg).solve(gram, x.T @ y)

    def __call__(self, hidden: Tensor) -> Tensor:
        return (hidden - self.from_mean) @ self.weight + self.to_mean


def _inverse(backbone: Backbone, table: Tensor, front: int, public: Tensor) -> _Map:
    held = [_front(backbone, public[n : n + ROWS], front) for n in range(0, len(public), ROWS)]
    # The first place is apart in many models: every later one looks at it.
    hidden = torch.cat([h[:, 1:].flatten(0, 1) for h in held])
    return _Map(hidden, table[public[:, 1:].flatten()])


def _tried(backbone: Backbone, hidden: Tensor, front: int, best: Tensor) -> Tensor:
    """One place after another: every candidate after what was found so far, the nearest wins."""
    found = best.new_zeros(0)
    for place, ids in enumerate(best):
        rows = torch.cat([found.expand(len(ids), -1), ids[:, None]], dim=1)
        got = _front(backbone, rows, front)[:, -1]
        near = (got - hidden[place]).square().sum(-1)
        found = torch.cat([found, ids[near.argmin()][None]])
    return found


def _front(backbone: Backbone, ids: Tensor, front: int) -> Tensor:
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return backbone.run(inputs, last=front).float()
