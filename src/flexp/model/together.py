"""One forward for the rows of several members, on a backbone that has proved to take it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from flexp.model.backbone import Backbone
from flexp.model.cut import Pass, run
from flexp.model.joint import Joint, Member, Path, Rowwise, following, tensors_in
from flexp.model.worn import Worn

CLOSE = {torch.float32: 1e-4}  # of the largest number; other types round more
ROUGH = 5e-2
Shapes = Mapping[str, tuple[int, ...]]


class Together:
    """Joint forwards over one backbone."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone

    def run(
        self,
        members: Sequence[Member],
        shapes: Sequence[Shapes],
        masks: Sequence[Tensor | None],
    ) -> list[Tensor]:
        """The hidden state of each member at its last block.

        ``shapes`` and ``masks`` are those of each one's inputs; sequences of different length are
        filled up at their end. Only if ``possible``.
        """
        return self._run(members, shapes, masks, self._rowwise or {})

    @property
    def possible(self) -> bool:
        """Whether this backbone's blocks can run rows of several members in one forward."""
        return self._rowwise is not None

    @cached_property
    def _rowwise(self) -> Rowwise | None:
        """What a row of the batch has one of; None if a joint forward is not those alone."""
        held = self.backbone.held
        blocks = range(min(held), max(held) + 1)
        if held != frozenset(blocks):
            return None
        with torch.no_grad():
            try:
                found = following(self._seen)
                return found if self._agrees(found) else None
            except (KeyError, TypeError, RuntimeError, IndexError, AttributeError, ValueError):
                return None  # a family whose own code does not take it

    def _run(
        self,
        members: Sequence[Member],
        shapes: Sequence[Shapes],
        masks: Sequence[Tensor | None],
        rowwise: Rowwise,
    ) -> list[Tensor]:
        joint = Joint(members, rowwise)
        rows = sum(len(m.feed) for m in members)
        whole = {
            k: (rows, joint.length) if len(s) == 2 else (rows, *s[1:]) for k, s in shapes[0].items()
        }
        blanks = self.backbone.blanks(whole, _joined(members, masks, joint.length))
        run(self.backbone.model, Pass(joint=joint), blanks)
        return [cast(Tensor, out) for out in joint.out]

    # ---- the proof

    def _inputs(self, rows: int, *, padded: bool) -> tuple[Shapes, Tensor | None]:
        inputs = self.backbone.sample(rows)
        mask = inputs.get("attention_mask")
        if mask is not None:
            mask = mask.clone()
            mask[0, -2:] = 0 if padded else 1
        return {k: tuple(v.shape) for k, v in inputs.items()}, mask

    def _feed(self, shapes: Shapes, mask: Tensor | None) -> Tensor:
        """A hidden state for such inputs, different from place to place."""
        body = self.backbone
        entering = body.run(body.blanks(shapes, mask), last=0)
        numbers = torch.arange(entering.numel(), dtype=torch.float32)
        return torch.sin(numbers).reshape(entering.shape).to(entering)

    def _seen(self, rows: int, padded: bool) -> Mapping[int, Mapping[Path, int]]:
        """The first dimension of every tensor that a block is called with."""
        body, held = self.backbone, sorted(self.backbone.held)
        shapes, mask = self._inputs(rows, padded=padded)
        blocks = cast(nn.ModuleList, body.model.get_submodule(body.blocks_path))
        seen: dict[int, dict[Path, int]] = {}
        hooks: list[Any] = []
        for n in held:

            def note(_: Any, args: Any, kwargs: Any, n: int = n) -> None:
                found = tensors_in(args, kwargs)
                seen[n] = {path: value.shape[0] for path, value in found if value.dim()}

            hooks.append(blocks[n].register_forward_pre_hook(note, with_kwargs=True))
        try:
            feed = self._feed(shapes, mask)
            body.run(body.blanks(shapes, mask), first=held[0], last=held[-1] + 1, feed=feed)
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    def _agrees(self, rowwise: Rowwise) -> bool:
        """Whether two members in one forward get what each gets alone."""
        body, low, high = self.backbone, min(self.backbone.held), max(self.backbone.held) + 1
        inputs = [self._inputs(1, padded=True), self._inputs(2, padded=False)]
        text = inputs[1][1] is not None
        if text:  # one shorter than the other
            inputs[1] = ({k: (s[0], 4) for k, s in inputs[1][0].items()}, torch.ones(2, 4).long())
        later, sooner = min(low + 1, high - 1), max(high - 1, low + 1)
        ways = [((low, high), (later, high)), ((later, high), (low, sooner))]
        for way in ways:
            members = [
                Member(*blocks, self._feed(*each), Worn())
                for blocks, each in zip(way, inputs, strict=True)
            ]
            shapes, masks = [each[0] for each in inputs], [each[1] for each in inputs]
            outs = self._run(members, shapes, masks, rowwise)
            for member, out, each in zip(members, outs, inputs, strict=True):
                alone = body.run(
                    body.blanks(*each), first=member.first, last=member.last, feed=member.feed
                )
                close = CLOSE.get(body.dtype, ROUGH) * float(alone.abs().max())
                if out.shape != alone.shape or float((out - alone).abs().max()) > close:
                    return False
        return True


def _joined(
    members: Sequence[Member], masks: Sequence[Tensor | None], length: int
) -> Tensor | None:
    """One mask for all; None if nobody has one and nobody is filled up."""
    even = all(m.feed.shape[1] == length for m in members)
    if even and all(mask is None for mask in masks):
        return None
    parts: list[Tensor] = []
    for member, mask in zip(members, masks, strict=True):
        whole = member.feed.new_ones(member.feed.shape[:2], dtype=torch.long)
        mine = whole if mask is None else mask
        parts.append(functional.pad(mine, (0, length - mine.shape[1])))
    return torch.cat(parts)
