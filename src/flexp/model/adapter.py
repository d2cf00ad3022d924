"""Kinds of adapters: which tensors each adds, under PEFT's names, and how they begin.

PEFT resolves targets and names on a skeleton without weights, so the layout of an adapter is known
before anything is downloaded. The forward is ours (``worn.py``); PEFT's is the test oracle.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from flexp import libraries
from flexp.dice import Dice
from flexp.errors import AdapterError
from flexp.model import colora
from flexp.model.colora import CoLora
from flexp.model.prompts import NAMES, Frame, Prompt, input_layout
from flexp.model.skeleton import modules
from flexp.model.surgery import EVERY, Surgery, begun
from flexp.model.targets import (
    dense_paths,
    ending,
    inside_of,
    linear_maps,
    outermost,
    unknown,
    wholes,
)
from flexp.model.wearing import lengths
from flexp.model.worn import PREFIX
from flexp.tensors import Tensors

Layout = Mapping[str, tuple[int, ...]]
_Table = Mapping[str, list[str] | str]  # by type of model; a string is a pattern, which we leave


@dataclass(frozen=True)
class Lora:
    """Low-rank pairs on linear maps (Hu et al. 2021), with DoRA's magnitudes if ``dora``.

    ``targets`` are module names as PEFT takes them; empty leaves the choice to PEFT's table, and
    to all linear maps of the blocks where the table does not know the model. The leaves of the
    head that the checkpoint lacks are trained with it, as in PEFT's ``modules_to_save``.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    dora: bool = False
    head: bool = True


@dataclass(frozen=True)
class Ia3:
    """Learned scales of activations (Liu et al. 2022); targets and feed-forward ones as in PEFT."""

    targets: tuple[str, ...] = ()
    feedforward: tuple[str, ...] = ()
    head: bool = True


@dataclass(frozen=True)
class Dense:
    """Modules themselves, trained in full.

    ``targets`` are paths of modules, or names of linear maps and normalisations of the blocks, as
    LoRA takes names; ``*`` is every block in full, and empty are all linear maps of the blocks.
    """

    targets: tuple[str, ...] = ()
    head: bool = True


@dataclass(frozen=True)
class Head:
    """Only the head's leaves that the checkpoint lacks."""


Kind = Lora | CoLora | Ia3 | Prompt | Frame | Surgery | Dense | Head


def alpha_of(kind: Kind) -> float:
    """LoRA's alpha; 1 for kinds without."""
    return kind.alpha if isinstance(kind, Lora | CoLora) else 1.0


def dropout_of(kind: Kind) -> float:
    """LoRA's dropout; 0 for kinds without."""
    return kind.dropout if isinstance(kind, Lora | CoLora) else 0.0


def peft_config(
    kind: Kind,
    task: str,
    net: nn.Module,
    blocks: str,
    head: tuple[str, ...],
    *,
    rank: int | None = None,
) -> Any:
    """The PEFT configuration of a kind on a model (a skeleton will do).

    ``task`` is PEFT's task type, ``blocks`` the path of the block list, ``head`` module paths.
    Raises AdapterError if a target is not in the blocks.
    """
    peft = libraries.peft()
    if isinstance(kind, Frame | Surgery | CoLora):
        raise AdapterError("PEFT has no frames around pictures, surgery on states or Co-LoRA.")
    saved = wholes(net, head) if getattr(kind, "head", True) and head else None
    if isinstance(kind, Prompt):
        return peft.PromptTuningConfig(task_type=task, num_virtual_tokens=kind.tokens)
    if isinstance(kind, Dense | Head):
        paths = dense_paths(net, kind.targets, blocks, head) if isinstance(kind, Dense) else []
        # PEFT has no method for modules alone: this is a LoRA that by its own word targets nothing.
        return peft.LoraConfig(
            task_type=task,
            target_modules=peft.utils.constants.DUMMY_TARGET_MODULES,
            modules_to_save=outermost([*paths, *(saved or ())]),
        )
    table = _table("LORA_TARGET" if isinstance(kind, Lora) else "IA3_TARGET")
    targets, transposed = _targets(net, blocks, kind.targets, table)
    config = peft.LoraConfig if isinstance(kind, Lora) else peft.IA3Config
    return config(
        task_type=task,
        target_modules=targets,
        modules_to_save=saved,
        fan_in_fan_out=transposed,
        **_options(kind, _type_of(net), rank),
    )


def _table(what: str) -> _Table:
    name = f"TRANSFORMERS_MODELS_TO_{what}_MODULES_MAPPING"
    return getattr(libraries.peft().utils.constants, name)


def _options(kind: Lora | Ia3, type_of: str, rank: int | None) -> dict[str, Any]:
    if isinstance(kind, Lora):
        return {
            "r": rank or kind.rank,
            "lora_alpha": kind.alpha,
            "lora_dropout": kind.dropout,
            "use_dora": kind.dora,
        }
    table = [] if kind.targets else _table("IA3_FEEDFORWARD").get(type_of, [])
    return {"feedforward_modules": sorted(kind.feedforward or table)}


def _type_of(net: nn.Module) -> str:
    return str(getattr(cast(Any, net).config, "model_type", ""))


def _targets(
    net: nn.Module, blocks: str, wanted: tuple[str, ...], table: _Table
) -> tuple[list[str] | str, bool]:
    """Target modules for PEFT, all of them inside blocks, and whether they are transposed.

    Names come from the recipe, else from PEFT's table, else all linear maps of the blocks. They
    stay a list unless a name also occurs outside the blocks; then a pattern confines it.
    """
    maps = linear_maps(net)
    inside = inside_of(maps, blocks)
    listed = table.get(_type_of(net))
    names = list(wanted) or (listed if isinstance(listed, list) else [])
    names = names or sorted({p.rpartition(".")[2] for p in inside})
    hits = {n: ending(maps, n) for n in names}
    for name, paths in hits.items():
        if wanted and not set(paths) & set(inside):
            raise unknown(name, inside)
    used = [p for paths in hits.values() for p in paths]
    transposed = any(not isinstance(maps[p], nn.Linear) for p in used)
    if set(used) <= set(inside):
        return sorted(names), transposed
    choice = "|".join(re.escape(n) for n in sorted(names))
    return rf"{re.escape(blocks)}\.\d+\.(?:.*\.)?(?:{choice})", transposed


def layout(
    net: nn.Module, kind: Kind, blocks: str, head: tuple[str, ...], rank: int | None = None
) -> Layout:
    """Names and shapes of a kind's tensors on a skeleton, which is used up by this.

    Raises AdapterError if there is nothing to train, or a target is unknown.
    """
    if isinstance(kind, CoLora):
        pairs = Lora(rank or kind.rank, kind.alpha, targets=kind.targets, head=kind.head)
        return colora.refined(layout(net, pairs, blocks, head), kind, blocks, PREFIX)
    out: dict[str, tuple[int, ...]] = {}
    paths = dense_paths(net, kind.targets, blocks, head) if isinstance(kind, Dense) else []
    paths += head if getattr(kind, "head", True) else ()
    known = modules(net)
    for path in paths:
        for leaf, value in known[path].named_parameters():
            out[f"{PREFIX}{path}.{leaf}"] = tuple(value.shape)
    if isinstance(kind, Prompt | Frame | Surgery):
        out |= input_layout(net, kind)
    elif isinstance(kind, Lora | Ia3):
        config = peft_config(kind, "FEATURE_EXTRACTION", net, blocks, (), rank=rank)
        libraries.peft().inject_adapter_in_model(config, net)
        for name, value in net.named_parameters():
            if ".lora_" in name or ".ia3_" in name:
                plain = name.replace(".default", "").replace("_vector.weight", "_vector")
                out[PREFIX + plain] = tuple(value.shape)
    if not out:
        raise AdapterError("This adapter has nothing to train on this model. Use a LoRA adapter.")
    return dict(sorted(out.items()))


def initial(
    shapes: Layout, dice: Dice, base: Callable[[str], Tensor], spread: float = 0.02
) -> Tensors:
    """The tensors that every client and the server begin with: the pretrained model, unchanged.

    LoRA's A is Kaiming-uniform from a stream per name (so it does not depend on which blocks are
    loaded), B zero; scales are one; prompts and frames are normal numbers of that ``spread``;
    direct parameters copy the backbone's, which ``base`` gives.
    """
    out: Tensors = {}
    for name, shape in shapes.items():
        path = name.removeprefix(PREFIX)
        if ".lora_A." in name:
            value = torch.empty(shape)
            nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=_stream(dice, name))
        elif ".lora_B." in name:
            value = torch.zeros(shape)
        elif name.endswith(".ia3_l"):
            value = torch.ones(shape)
        elif name.endswith(colora.EVERY):
            value = colora.begun(name, shape, _stream(dice, name))
        elif name.endswith(".lora_magnitude_vector"):
            value = base(path.replace(".lora_magnitude_vector", ".weight"))
            value = value if value.shape[0] == shape[0] else value.T
            value = lengths(value.float())
        elif name in EVERY:
            value = begun(shape, _stream(dice, name.replace("_anchor_", "_encoder_")))
        elif name in NAMES:
            value = torch.empty(shape).normal_(generator=_stream(dice, name)) * spread
        else:
            value = base(path).detach().float().clone()
        out[name] = value
    return out


def _stream(dice: Dice, name: str) -> torch.Generator:
    return dice("adapter", name=name).generator()
