"""Which modules of a model an adapter is for: linear maps by name, modules by path, the head."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from flexp import libraries
from flexp.errors import AdapterError, nearest
from flexp.model.skeleton import modules

EVERY = "*"  # as a target of a dense adapter


def dense_paths(
    net: nn.Module, targets: tuple[str, ...], blocks: str, head: tuple[str, ...] = ()
) -> list[str]:
    """Paths of the modules that a dense adapter trains, without any inside another of them.

    A target that is the path of a module with parameters in the blocks, or of a leaf of the head,
    is that module; any other is a name. Raises AdapterError for a name that no linear map of the
    blocks has, and for a module with parameters that are not in a leaf: nothing can be worn there.
    """
    inside = [] if targets == (EVERY,) else inside_of(linear_maps(net), blocks, targets)
    every = [f"{blocks}.{name}" for name, _ in net.get_submodule(blocks).named_children()]
    holding = (p for p, m in modules(net).items() if any(True for _ in m.parameters()))
    whole = {p for p in holding if p.startswith(f"{blocks}.")} | set(head)
    paths = [] if targets else inside
    for target in targets:
        found = [target] if target in whole else ending(inside, target)
        found = every if target == EVERY else found
        if not found:
            raise unknown(target, inside)
        paths += found
    for path in paths:
        for name, module in modules(net.get_submodule(path)).items():
            if list(module.children()) and list(module.parameters(recurse=False)):
                raise AdapterError(
                    f'adapter.targets: "{path}" has parameters in "{name or path}", beside modules '
                    "of its own, so it cannot be trained in full. Name linear maps."
                )
    return outermost(paths)


def outermost(paths: list[str]) -> list[str]:
    """The paths without any inside another of them."""
    stems = tuple(f"{p}." for p in paths)
    return [p for p in dict.fromkeys(paths) if not p.startswith(stems)]


def linear_maps(net: nn.Module) -> dict[str, nn.Module]:
    """The linear maps of a model, by path; the weight of GPT-2's own class is transposed."""
    linear = nn.Linear, libraries.transformers().Conv1D
    return {p: m for p, m in modules(net).items() if isinstance(m, linear)}


def inside_of(maps: Iterable[str], blocks: str, named: tuple[str, ...] = ()) -> list[str]:
    """Linear maps of the blocks; AdapterError if there are none, and none is named."""
    inside = [p for p in maps if p.startswith(f"{blocks}.")]
    if not (inside or named):
        raise AdapterError(
            "adapter.targets: the blocks have no linear map. Train them in full, with "
            f'adapter.kind dense and targets ["{EVERY}"].'
        )
    return inside


def ending(paths: Iterable[str], name: str) -> list[str]:
    """Those that end in a name."""
    return [p for p in paths if p == name or p.endswith(f".{name}")]


def unknown(name: str, inside: list[str]) -> AdapterError:
    """The error for a name that none of these paths ends in."""
    known = sorted({p.rpartition(".")[2] for p in inside})
    return AdapterError(
        f'adapter.targets: no linear map "{name}" in the blocks. {nearest(name, known)}'
    )


def wholes(net: nn.Module, head: tuple[str, ...]) -> list[str]:
    """The head's leaves, or the module that holds nothing but them: PEFT saves modules whole."""
    out: dict[str, None] = {}
    for leaf in head:
        path = leaf
        while "." in path:
            parent = path.rpartition(".")[0]
            held = {
                f"{parent}.{name}".rpartition(".")[0]
                for name, _ in net.get_submodule(parent).named_parameters()
            }
            if not held <= set(head):
                break
            path = parent
        out[path] = None
    return list(out)
