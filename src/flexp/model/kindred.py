"""Two models over one stack of blocks: a client's own head or task beside the server's class."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from flexp.errors import ModelError
from flexp.model.adapter import Kind
from flexp.model.backbone import Backbone


def join(mine: Backbone, server: Backbone, kind: Kind, who: str) -> None:
    """Lets ``mine`` use the server's tensors wherever both have the same; its own stay its own.

    ModelError, which names the client, unless blocks, adapters of blocks and a cut forward agree:
    a client's front and tail around the server's trunk must be the client's whole model.
    """
    if (mine.depth, mine.width) != (server.depth, server.width):
        raise _unlike(who, "depth or width differ")
    _share(mine, server)
    for index in range(server.depth):
        pairs = zip(_block(mine, index), _block(server, index), strict=False)
        alike = all(a is b for (_, a), (_, b) in pairs)
        if not alike or len(_block(mine, index)) != len(_block(server, index)):
            raise _unlike(who, f"block {index} has other weights")
    if _far(mine, kind) != _far(server, kind):
        raise _unlike(who, "adapters of the blocks have other names or shapes")
    try:
        mine.check(server)
    except ModelError as problem:
        raise _unlike(who, str(problem)) from problem


def _unlike(who: str, what: str) -> ModelError:
    return ModelError(
        f'Client "{who}" cannot have a task of its own on this model: {what}.'
        " Leave it out of clients."
    )


def _far(body: Backbone, kind: Kind) -> dict[str, tuple[int, ...]]:
    return {k: s for k, s in body.layout(kind).items() if 0 <= body.block_of(k) < body.depth}


def _named(body: Backbone) -> dict[str, Tensor]:
    model = body.model
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),  # codes of quantized weights are among them
    ]
    stem = f"{body.blocks_path}."
    return {f"blocks.{k.removeprefix(stem)}" if k.startswith(stem) else k: v for k, v in named}


def _block(body: Backbone, index: int) -> list[tuple[str, Tensor]]:
    stem = f"blocks.{index}."
    return sorted((k, v) for k, v in _named(body).items() if k.startswith(stem))


def _share(mine: Backbone, server: Backbone) -> None:
    theirs = _named(server)
    twins = {
        id(v): theirs[k]
        for k, v in _named(mine).items()
        if k in theirs and theirs[k].dtype == v.dtype and torch.equal(theirs[k], v)
    }
    for module in mine.model.modules():
        for kind in ("_parameters", "_buffers"):
            held = cast("dict[str, Any]", module.__dict__[kind])
            for leaf, value in held.items():
                if id(value) in twins:
                    held[leaf] = twins[id(value)]
