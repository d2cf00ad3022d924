"""Some blocks over one growing text: keys and values of what came before are kept.

They lie in the library's own cache, one layer per block of the whole model. Layers of blocks that
run elsewhere are given a mark per position instead, so that the cache knows on both sides of a cut
how long the text is: positions, masks and windows come out of the model's own code, of any family.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flexp import libraries
from flexp.errors import ModelError
from flexp.model.backbone import Backbone
from flexp.model.worn import Worn

PIECES = (4, 1, 2, 1)  # positions at a time in the check


class Cached:
    """Blocks ``first`` to ``last`` of one text of one row, from ids or ``fed`` with hidden states.

    With ``last`` None also the head: then what comes out are the logits of the last position.
    """

    def __init__(
        self,
        backbone: Backbone,
        first: int,
        last: int | None,
        worn: Worn | None = None,
        *,
        fed: bool = False,
    ) -> None:
        self.backbone, self.worn = backbone, worn or Worn()
        self.first, self.last, self.fed = first, last, fed
        self.stop = backbone.depth if last is None else last
        self.length = 0  # positions so far
        self.past: Any = libraries.transformers().DynamicCache(config=backbone.config)

    @classmethod
    def open(
        cls,
        backbone: Backbone,
        first: int = 0,
        last: int | None = None,
        worn: Worn | None = None,
        *,
        fed: bool = False,
    ) -> Cached:
        """The same, for blocks that are proved to say with a cache what they say without.

        They are the first time that a backbone runs them so. Raises ModelError.
        """
        if (first, last, fed) not in backbone.spoken:
            _check(backbone, first, last, fed)
            backbone.spoken.add((first, last, fed))
        return cls(backbone, first, last, worn, fed=fed)

    def run(self, given: Tensor | Mapping[str, Tensor]) -> Tensor:
        """The next positions: a hidden state [1, length, width], or named inputs if not fed.

        Returns their hidden state at ``last``, or logits [1, 1, vocabulary]. If it fails, nothing
        has happened.
        """
        out, self.past, self.length = self.after(given)
        return out

    @torch.no_grad()
    def after(self, given: Tensor | Mapping[str, Tensor]) -> tuple[Tensor, Any, int]:
        """What ``run`` returns, and the cache and the length that it would leave."""
        feed = given if isinstance(given, Tensor) else None
        inputs = given if not isinstance(given, Tensor) else self._blank(given.shape[1])
        length = self.length + next(iter(inputs.values())).shape[1]
        past: Any = copy.copy(self.past)
        past.layers = [copy.copy(layer) for layer in past.layers]  # updates make new tensors
        way: dict[str, Any] = {"first": self.first, "last": self.stop, "feed": feed}
        out = self.backbone.run(inputs, self.worn, cache=past, **way)
        _level(past, length)
        if self.last is None:
            end, depth = out[:, -1:], self.backbone.depth
            out = self.backbone.run(self._blank(1), self.worn, first=depth, feed=end)
        return out, past, length

    def _blank(self, length: int) -> dict[str, Any]:
        return self.backbone.blanks({"input_ids": (1, length)}, None)


def _level(past: Any, length: int) -> None:
    """Lets layers whose blocks did not run here count the positions all the same."""
    for index, layer in enumerate(past.layers):
        behind = length - layer.get_seq_length() if hasattr(layer, "get_seq_length") else 0
        if behind > 0:
            marks = torch.zeros(1, 1, behind, 1, dtype=torch.bool)
            past.update(marks, marks, index)


def _check(backbone: Backbone, first: int, last: int | None, fed: bool) -> None:
    """Raises ModelError unless blocks say piece by piece with a cache what they say without.

    Each piece runs twice on the same past, as a repeated message would. Absent blocks take no part.
    """
    refusal = (
        f"{backbone.name} cannot continue a text token by token on a cut. A model can whose blocks "
        "keep keys and values of earlier tokens, and nothing else. "
    )
    try:
        apart, noise = _differences(backbone, Cached(backbone, first, last, fed=fed))
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        raise ModelError(f"{refusal}({type(e).__name__}: {e})") from e
    if not apart <= min(16 * noise, 0.25):
        raise ModelError(
            f"{refusal}(With what its blocks keep they say something else, by {apart:.1e}, of "
            f"which rounding explains {noise:.1e}.)"
        )


@torch.no_grad()
def _differences(backbone: Backbone, blocks: Cached) -> tuple[float, float]:
    """How far the blocks are from themselves without cache, and how far rounding takes them.

    Both at the worst position, relative to the mean there. Rounding is seen by moving what goes in
    by its last bit.
    """
    length, eps = sum(PIECES), torch.finfo(backbone.dtype).eps
    places = torch.arange(length, device=next(backbone.model.parameters()).device)[None]
    columns = torch.arange(backbone.width, device=places.device)
    start = torch.sin(7.0 * places[..., None] + columns).to(backbone.dtype)
    inputs = backbone.blanks({"input_ids": (1, length)}, None)
    if not blocks.fed:
        vocabulary = int(backbone.config.get_text_config().vocab_size)
        inputs = {"input_ids": places % (vocabulary - 1) + 1}
        start = backbone.run(inputs, last=0)
    way: dict[str, Any] = {"first": blocks.first, "last": blocks.last}
    whole = backbone.run(inputs, feed=start if blocks.fed else None, **way)
    moved = start * (1 + 2 * eps * columns.cos()).to(start.dtype)
    noise = eps + _relative(backbone.run(inputs, feed=moved, **way), whole)
    apart, done = 0.0, 0
    for piece in PIECES:
        here = slice(done, done + piece)
        given = start[:, here] if blocks.fed else {"input_ids": inputs["input_ids"][:, here]}
        done += piece
        blocks.after(given)
        right = whole[:, done - 1 : done] if blocks.last is None else whole[:, here]
        apart = max(apart, _relative(blocks.run(given), right))
    return apart, noise


def _relative(found: Tensor, right: Tensor) -> float:
    share = (found - right).float().abs().mean(-1) / right.float().abs().mean(-1)
    return float(share.nan_to_num(torch.inf).max())
