"""A backbone of which only some blocks are in memory; the others stay as hollow stand-ins.

A stand-in is the block itself without its tensors: the model's own loop finds every attribute that
it looks for, and the checkpoint's tensors for it are never read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn

from flexp.errors import ModelError
from flexp.model.adapter import Layout
from flexp.model.colora import EVERY
from flexp.model.skeleton import Shape, Skeleton, States, inputs_of, modules, reads_ids
from flexp.model.worn import PREFIX

_IGNORED = "_keys_to_ignore_on_load_unexpected"  # transformers' own patterns


class Absent:
    """Replaces the forward of a module that is not in memory: running it is an error."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.forward: Callable[..., Any] = self._refuse

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        del args, kwargs
        raise ModelError(
            f'"{self.path}" is not in memory here: the backbone was opened without it. '
            "Open it with that part, or let the other side run it."
        )


class Blank(Absent):
    """Replaces input embeddings where a hidden state is fed: shape and type are all that counts.

    It differs from token to token, so that the check at open compares something.
    """

    def __init__(self, path: str, weight: Tensor) -> None:
        super().__init__(path)
        self.width, self.dtype = int(weight.shape[1]), weight.dtype
        self.forward = self._blank

    def _blank(self, ids: Tensor) -> Tensor:
        columns = torch.arange(self.width, device=ids.device)
        return torch.sin(ids[..., None] + columns).to(self.dtype)


class StandIn:
    """Runs in place of an absent block that no other can stand for, as it gives another shape."""

    def __init__(self, shape: Shape, in_tuple: bool) -> None:
        self.shape, self.in_tuple = shape, in_tuple

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Numbers that differ from place to place, whatever comes in."""
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        numbers = torch.arange(len(hidden) * prod(self.shape), device=hidden.device)
        out = torch.sin(numbers).reshape(len(hidden), *self.shape).to(hidden.dtype)
        return (out,) if self.in_tuple else out


@dataclass(frozen=True)
class Part:
    """What of a model is left out: module paths, and the class that the config asks for."""

    model: type[nn.Module]
    config: Any
    absent: tuple[str, ...]

    def loader(self) -> Any:
        """A class that loads like the model's own, without ever making the absent tensors.

        It hollows a model between its construction on the meta device and the reading of weights,
        so names, conversions, ties and buffers remain the library's business.
        """
        original, absent = self.model, self.absent

        def construct(net: nn.Module, *args: Any, **kwargs: Any) -> None:
            original.__init__(net, *args, **kwargs)
            hollow(net, absent)

        # The library looks tables up by a class's name and module.
        names = {k: getattr(original, k) for k in ("__module__", "__qualname__", "__doc__")}
        return type(original.__name__, (original,), {**names, "__init__": construct})

    def restore(self, model: nn.Module) -> nn.Module:
        """The loaded model as an instance of its own class."""
        model.__class__ = self.model
        return model


def part(bones: Skeleton, blocks: Iterable[int] | None, outside: bool) -> Part:
    """The part of a model with these blocks (None: all), and with its embeddings if ``outside``.

    Raises ModelError unless there is at least one block, all of them in the model.
    """
    every = range(bones.depth)
    held = set(every if blocks is None else blocks)
    if not held or not held <= set(every):
        shown = ", ".join(map(str, sorted(held))) or "no blocks"
        raise ModelError(f"Blocks 0 to {bones.depth - 1} can be held, not {shown}. Name some.")
    return without(bones, [i for i in every if i not in held], outside=outside)


def without(bones: Skeleton, blocks: Iterable[int], *, outside: bool) -> Part:
    """The part of a model without these blocks, and without its embeddings unless ``outside``."""
    absent = [f"{bones.blocks_path}.{i}" for i in blocks]
    if not outside and reads_ids(bones.model):
        net = cast(Any, bones.model)
        ends = [net.get_input_embeddings(), net.get_output_embeddings()]
        absent += [path for path, m in modules(bones.model).items() if any(m is e for e in ends)]
    return Part(type(bones.model), bones.config, tuple(absent))


def hollow(net: nn.Module, paths: Sequence[str]) -> None:
    """Takes the tensors out of the modules at these paths, and what they did."""
    model: Any = net
    inputs = inputs_of(net)
    for path in paths:
        module: Any = net.get_submodule(path)
        module.forward = Blank(path, module.weight) if module is inputs else Absent(path)
        for inner in modules(module).values():
            tensors = [*inner.named_parameters(recurse=False), *inner.named_buffers(recurse=False)]
            for name, tensor in tensors:
                delattr(inner, name)
                setattr(inner, name, _shape_only(tensor))
    tied = {k: v for k, v in model.all_tied_weights_keys.items() if not inside((k, v), paths)}
    model.all_tied_weights_keys = tied
    # A checkpoint of the bare base model names its tensors without the prefix.
    bare = [path.removeprefix(f"{model.base_model_prefix}.") for path in paths]
    patterns = {rf"(^|\.){re.escape(path)}\." for path in bare}
    setattr(net, _IGNORED, set(getattr(net, _IGNORED) or ()) | patterns)


def _shape_only(tensor: Tensor) -> Tensor:
    """A plain attribute with shape and type for code that asks for these; it holds no memory."""
    shape = tensor.detach().to("meta")
    vars(shape)["_is_hf_initialized"] = True  # the library's initialisation passes it by
    return shape


def inside(names: Iterable[str], paths: Iterable[str]) -> bool:
    """Whether any of the names lies in any of the modules."""
    stems = tuple(f"{path}." for path in paths)
    return any(name.startswith(stems) for name in names)


def absent(model: nn.Module) -> tuple[str, ...]:
    """Paths of the modules whose tensors were left out."""
    found = modules(model).items()
    return tuple(path for path, m in found if isinstance(vars(m).get("forward"), Absent))


def beginnable(shapes: Layout, paths: Sequence[str]) -> Layout:
    """The tensors of an adapter that can begin without the modules at these paths.

    Those that begin as a copy of the backbone's own values need them.
    """
    drawn = (".lora_A.", ".lora_B.", ".ia3_l", *EVERY)
    return {
        name: shape
        for name, shape in shapes.items()
        if any(mark in name for mark in drawn) or not inside([name.removeprefix(PREFIX)], paths)
    }


@contextmanager
def lent(
    model: nn.Module, blocks: Sequence[Any], held: frozenset[int], states: States | None = None
) -> Generator[None]:
    """Within this, absent blocks run with a held one's weights, so that all calls can be checked.

    ``blocks`` are the owners of their forwards. An absent output embedding gives back what it
    reads. With ``states``, where blocks may be unlike, an absent one gives numbers of that shape.
    """
    lender = blocks[min(held)]
    pairs = [
        (block, StandIn(states.shapes[i + 1], states.in_tuple) if states else lender)
        for i, block in enumerate(blocks)
        if i not in held
    ]
    output = cast(Any, model).get_output_embeddings()
    if output is not None and isinstance(output.forward, Absent):
        pairs.append((output.forward, nn.Identity()))
    before = [borrower.forward for borrower, _ in pairs]
    for borrower, owner in pairs:
        borrower.forward = owner.forward
    try:
        yield
    finally:
        for (borrower, _), forward in zip(pairs, before, strict=True):
            borrower.forward = forward
