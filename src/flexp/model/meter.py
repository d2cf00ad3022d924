"""Counts what a thread computes: floating point operations, and the most bytes that it held."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward  # noqa: SLF001


class Meter(TorchDispatchMode):
    """Within it, every operation of this thread is counted, its backward too.

    ``flops``: products of matrices, convolutions and attention, a multiplication and an addition
    as two. ``peak``: the most bytes of tensors that were made here and alive at one time; weights
    and what was there before do not count.
    """

    def __init__(self) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.flops = self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        for one in _tensors((*args, *kwargs.values())):
            self._hold(one, new=False)
        out: Any = func(*args, **kwargs)
        self.flops += operations(func.overloadpacket, args, kwargs, out)
        for one in _tensors((out,)):
            self._hold(one, new=True)
        self.peak = max(self.peak, self.live)
        return out

    def _hold(self, tensor: Tensor, *, new: bool) -> None:
        """Counts a storage once; what comes in unknown was there before, and so are its views."""
        storage: Any = tensor.untyped_storage()
        key = id(storage)  # the same object while the storage lives, with or without an address
        if key in self._known:
            return
        size: int = storage.nbytes() if new else 0
        self._known.add(key)
        self.live += size
        weakref.finalize(storage, self._drop, key, size).atexit = False

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(cast("Sequence[Any]", value))


def operations(packet: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    """Floating point operations of one call; what is not in torch's table counts as none."""
    if packet is _ATTENTION or packet is _BACKWARD:
        # [B, H, T, D]: two products of T x T x D per head; five in the backward pass.
        query, key = (args[0], args[1]) if packet is _ATTENTION else (args[1], args[2])
        rows, heads, length, width = query.shape
        products = 2 if packet is _ATTENTION else 5
        return 2 * products * rows * heads * length * key.shape[2] * width
    count = cast("Mapping[Any, Callable[..., int]]", flop_registry).get(packet)
    return 0 if count is None else int(count(*args, **kwargs, out_val=out))
