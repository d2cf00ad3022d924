"""What a cut computes: floating point operations of a training step, near and far.

Nothing here knows a family. The model's own blocks run once on the meta device, where tensors have
shapes and no numbers, with the adapter that PEFT puts into them, forward and backward; what they
would have multiplied is counted. So no weight is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from flexp.errors import CutError
from flexp.model.adapter import Kind, Prompt, layout
from flexp.model.skeleton import Skeleton, TaskKind, bare, head_leaves
from flexp.model.worn import PREFIX
from flexp.plan.calls import Call, Count, calls_of, sample, state_of


@dataclass(frozen=True)
class BlockWork:
    """Floating point operations of one training step of one batch, by part.

    ``forward`` and ``backward`` have one entry per block. The backbone is frozen, so backward is
    the gradients of inputs, and of the adapter's own tensors; before ``first``, the first block
    behind anything that is trained (-1: something before all blocks is), it is nothing.
    """

    embed: int
    forward: tuple[int, ...]
    backward: tuple[int, ...]
    head_forward: int
    head_backward: int
    first: int

    @property
    def blocks(self) -> int:
        """How many blocks the model has."""
        return len(self.forward)

    @property
    def total(self) -> int:
        """Of the whole model in one place."""
        parts = self.embed + self.head_forward + self.head_backward
        return parts + sum(self.forward) + sum(self.backward)


def near_flops(
    work: BlockWork, front: int, back: int, *, head_near: bool = True, recompute: int = 0
) -> int:
    """Operations at the client in one step; its first ``recompute`` blocks run forward twice."""
    near = _near(work, front, back)
    out = sum(work.forward[i] + work.backward[i] for i in near)
    out += sum(work.forward[i] for i in near[:recompute] if i >= work.first)
    # Every pass begins in the model's own embedding, on blanks where the rows are elsewhere.
    passes = 2 if head_near and len(near) < work.blocks else 1
    return out + passes * work.embed + (_head(work) if head_near else 0)


def far_flops(work: BlockWork, front: int, back: int, *, head_near: bool = True) -> int:
    """Operations at the server in one step of one client."""
    near = _near(work, front, back)
    if head_near and len(near) == work.blocks:
        return 0
    far = [i for i in range(work.blocks) if i not in near]
    out = work.embed + sum(work.forward[i] + work.backward[i] for i in far)
    return out + (0 if head_near else _head(work))


def _head(work: BlockWork) -> int:
    return work.head_forward + work.head_backward


def _near(work: BlockWork, front: int, back: int) -> list[int]:
    if min(front, back) < 0 or front + back > work.blocks:
        raise CutError(
            f"Cut ({front}, {back}) does not fit: the model has {work.blocks} blocks. "
            "Choose a front and a back that together have no more."
        )
    return [*range(front), *range(work.blocks - back, work.blocks)]


def measure_work(
    bones: Skeleton, kind: Kind, task: TaskKind, *, batch: int, length: int
) -> BlockWork:
    """The operations of a skeleton's model with an adapter of that kind.

    ``length`` is in tokens; images have their config's size. Raises ModelError or AdapterError.
    """
    net = bare(bones.config, task, blocks_at=bones.blocks_path).model
    head = () if task == "causal-lm" else head_leaves(net, None, bones.blocks_path)
    trained = {name.removeprefix(PREFIX) for name in layout(net, kind, bones.blocks_path, head)}
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(_plain(name) in trained)
    length += kind.tokens if isinstance(kind, Prompt) else 0
    blocks = list(cast(nn.ModuleList, net.get_submodule(bones.blocks_path)))
    owned = [[p for p in block.parameters() if p.requires_grad] for block in blocks]
    first = next((i for i, own in enumerate(owned) if own), len(blocks))
    first = -1 if isinstance(kind, Prompt) else first
    ends = _Ends(first < len(blocks))
    with Count() as count:
        seen = _whole(net, bones.blocks_path, length, count, ends)
        parts: list[tuple[int, int]] = []
        known: dict[Any, tuple[int, int]] = {}  # most blocks are alike
        for i, (block, call, own) in enumerate(zip(blocks, seen, owned, strict=True)):
            alike = (i > first, type(block), *_shapes(block), *call.shapes())
            if alike not in known:
                known[alike] = _block(block, call, own, i > first, count)
            parts.append(known[alike])
    return BlockWork(
        batch * ends.embed,
        tuple(batch * forward for forward, _ in parts),
        tuple(batch * backward for _, backward in parts),
        batch * ends.head_forward,
        batch * ends.head_backward,
        first,
    )


def _plain(name: str) -> str:
    """A parameter's name in a model with PEFT's layers, as an adapter has it."""
    return name.replace(".default", "").replace("_vector.weight", "_vector")


@dataclass
class _Ends:
    """What lies before and behind the blocks; ``below``: whether anything there is trained."""

    below: bool
    embed: int = 0
    head_forward: int = 0
    head_backward: int = 0


def _whole(net: nn.Module, path: str, length: int, count: Count, ends: _Ends) -> list[Call]:
    """One forward of the whole model, and one backward of its head."""
    model: Any = net.eval()
    model.config.use_cache = False
    blocks = list(cast(nn.ModuleList, net.get_submodule(path)))
    inside = {id(p) for block in blocks for p in block.parameters()}
    fed: list[Tensor] = []

    def begins(module: nn.Module, args: Any) -> None:
        del module, args
        ends.embed = count.flops

    def left(module: nn.Module, args: Any, out: Any) -> Any:
        del module, args
        fed.append(state_of(out).detach().requires_grad_(ends.below))
        ends.head_forward = -count.flops
        return (fed[0], *out[1:]) if isinstance(out, tuple) else fed[0]

    hooks = [blocks[0].register_forward_pre_hook(begins), blocks[-1].register_forward_hook(left)]
    with calls_of(blocks) as seen:
        logits: Tensor = model(**sample(net, length)).logits
    for hook in hooks:
        hook.remove()
    ends.head_forward += count.flops
    own = [p for p in net.parameters() if p.requires_grad and id(p) not in inside]
    of = [*(fed if ends.below else []), *own]
    ends.head_backward = _spent(count, lambda: _backward(logits, of))
    return seen


def _shapes(block: nn.Module) -> list[tuple[Any, ...]]:
    return [(name, *p.shape, p.requires_grad) for name, p in block.named_parameters()]


def _block(
    block: nn.Module, call: Call, own: list[nn.Parameter], wants: bool, count: Count
) -> tuple[int, int]:
    """Operations of one block, forward and backward; ``wants``: also for the block before it."""
    call = call.on(call.hidden.detach().requires_grad_(wants))
    out: list[Any] = []
    before = count.scores
    forward = _spent(count, lambda: out.append(block(*call.args, **call.kwargs)))
    hidden = state_of(out[0])
    of = [*([call.hidden] if wants else []), *own]
    there = count.scores
    backward = _spent(count, lambda: _backward(hidden, of))
    if count.scores > there:
        # On the meta device attention falls apart into products. The fused one of a real device
        # always makes five on the way back for two there: its scores again, and all gradients.
        backward += (there - before) * 5 // 2 - (count.scores - there)
    return forward, backward


def _backward(out: Tensor, of: Sequence[Tensor]) -> None:
    if of and out.requires_grad:
        torch.autograd.grad(out, list(of), torch.empty_like(out), allow_unused=True)


def _spent(count: Count, work: Callable[[], object]) -> int:
    before = count.flops
    work()
    return count.flops - before
