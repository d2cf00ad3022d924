"""Runs a model without weights on the meta device: its blocks' calls, and what is counted."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from flexp.errors import ModelError
from flexp.model.meter import operations
from flexp.model.skeleton import Skeleton, TaskKind, bare, image_shape, reads_ids

_ITEM = torch.ops.aten._local_scalar_dense  # noqa: SLF001
_BMM = torch.ops.aten.bmm


class Count(TorchDispatchMode):
    """Counts operations on the meta device, where a question about values is answered with yes.

    Such questions are whether a mask is full and rows are not packed, and they are.
    """

    def __init__(self) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.flops = self.scores = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func.overloadpacket is _ITEM and args[0].device.type == "meta":
            return args[0].dtype == torch.bool or 1
        out = func(*args, **(kwargs or {}))
        found = operations(func.overloadpacket, args, kwargs or {}, out)
        self.flops += found
        self.scores += found if func.overloadpacket is _BMM else 0
        return out


@dataclass
class Call:
    """How the model calls one of its blocks."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def on(self, hidden: Tensor) -> Call:
        """The same call on another hidden state."""
        if self.args:
            return Call((hidden, *self.args[1:]), self.kwargs)
        return Call((), {**self.kwargs, "hidden_states": hidden})

    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of all tensors of the call."""
        held: list[Any] = pytree.tree_leaves((self.args, dict(self.kwargs)))
        return [tuple(one.shape) for one in held if isinstance(one, Tensor)]

    @property
    def hidden(self) -> Tensor:
        """The hidden state that is handed on."""
        return self.args[0] if self.args else self.kwargs["hidden_states"]


def sample(net: nn.Module, length: int) -> dict[str, Tensor]:
    """One row of a model's inputs without numbers; ModelError if it is too long for the model."""
    if reads_ids(net):
        most = getattr(cast(Any, net).config.get_text_config(), "max_position_embeddings", length)
        if length > most:
            raise ModelError(
                f"A row of {length} tokens is too long: {type(net).__name__} has {most} positions. "
                "Set task.max_length (with --model: --length) lower."
            )
        ids = torch.zeros(1, length, dtype=torch.long, device="meta")
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    shape = image_shape(cast(Any, net).config)
    return {"pixel_values": torch.empty(1, *shape, device="meta")}


@contextmanager
def calls_of(blocks: Iterable[nn.Module]) -> Generator[list[Call]]:
    """Within it, notes how each block is called."""
    seen: list[Call] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        seen.append(Call(args, kwargs))

    hooks = [b.register_forward_pre_hook(note, with_kwargs=True) for b in blocks]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def calls(bones: Skeleton, task: TaskKind, length: int) -> list[Call]:
    """How each block of a skeleton is called for one row, on the meta device."""
    net: Any = bare(bones.config, task, blocks_at=bones.blocks_path).model.eval()
    net.config.use_cache = False
    with Count(), torch.no_grad(), calls_of(net.get_submodule(bones.blocks_path)) as seen:
        net(**sample(net, length))
    return seen


def state_of(out: Any) -> Tensor:
    """The hidden state of what a block returns."""
    return cast("tuple[Tensor, ...]", out)[0] if isinstance(out, tuple) else out
