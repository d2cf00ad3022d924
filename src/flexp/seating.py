"""From a recipe to a seat for every client: sizes from the skeleton, devices, the planner."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from flexp.dice import Dice
from flexp.errors import ModelError, PlanError
from flexp.model.adapter import Dense, Head, Ia3, Kind, Lora, Prompt, dropout_of, layout
from flexp.model.cut import Cut, Seat
from flexp.model.skeleton import Skeleton, head_leaves
from flexp.plan.costs import BlockCosts
from flexp.plan.devices import Device, parse_bytes
from flexp.plan.planner import Choice, Limits, near_bytes, plan
from flexp.plan.sizes import adapter_bytes, measure_costs, tried
from flexp.plan.trial import Shape
from flexp.recipe import AdapterRecipe, DeviceRecipe, PlanRecipe, Recipe
from flexp.strategies.base import ClientId

HERE = "this machine"


@dataclass(frozen=True)
class Placed:
    """Where a client was put: its device, its seat, the bytes it needs there, and why."""

    device: str
    seat: Seat
    bytes: int
    reason: str


def adapter_kind(recipe: AdapterRecipe) -> Kind:
    """The kind of adapter that a recipe describes."""
    if recipe.kind == "lora":
        return Lora(
            recipe.rank, recipe.alpha, recipe.dropout, recipe.targets, recipe.dora, recipe.head
        )
    if recipe.kind == "ia3":
        return Ia3(recipe.targets, recipe.feedforward, recipe.head)
    if recipe.kind == "prompt":
        return Prompt(recipe.tokens, recipe.head)
    return Dense(recipe.targets, recipe.head) if recipe.kind == "dense" else Head()


def has_bfloat16() -> bool:
    """Whether this processor computes in bfloat16 faster than in fp32."""
    found = cast("dict[str, Any]", torch.cpu.get_capabilities())
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def dtype_of(recipe: Recipe) -> torch.dtype:
    """fp32 in exact mode; else bf16 where the recipe asks for it or the processor has it."""
    wanted = recipe.model.dtype
    if recipe.mode == "exact":
        if wanted == "bfloat16":
            raise ModelError('mode "exact" is fp32. Set model.dtype to auto, or mode to fast.')
        return torch.float32
    if wanted == "auto":
        fast = recipe.model.device != "cpu" or has_bfloat16()
        return torch.bfloat16 if fast else torch.float32
    return getattr(torch, wanted)


def costs(recipe: Recipe, bones: Skeleton, kind: Kind) -> BlockCosts:
    """Bytes of the model's parts, from its skeleton alone."""
    head = (
        () if recipe.task.kind == "causal-lm" else head_leaves(bones.model, None, bones.blocks_path)
    )
    dtype, train = dtype_of(recipe), recipe.train
    prompt = kind.tokens if isinstance(kind, Prompt) else 0
    sized = measure_costs(
        bones.model,
        bones.blocks_path,
        {},
        batch=train.batch,
        length=recipe.task.max_length + prompt,
        itemsize=dtype.itemsize,
    )
    stored = getattr(bones.config, "dtype", None) or torch.float32
    shapes = layout(bones.model, kind, bones.blocks_path, head)
    per_block, outside = adapter_bytes(shapes, bones.blocks_path, sized.blocks, 4)
    sized = replace(
        sized,
        adapter_block_bytes=per_block,
        adapter_head_bytes=outside,
        moments=2 if train.optimizer == "adamw" else int(train.momentum > 0),
        file_itemsize=None if stored == dtype else stored.itemsize,
    )
    shape = Shape(train.batch, recipe.task.max_length, recipe.mode == "fast", dropout_of(kind))
    return tried(sized, bones, recipe.task.kind, shapes, shape, dtype=dtype)


def place(recipe: Recipe, clients: list[ClientId], sized: BlockCosts) -> dict[ClientId, Placed]:
    """A seat for every client: the recipe's cut, or the planner's choice for its device."""
    asked = recipe.plan
    _known(asked, clients)
    limits = Limits(
        min_back=asked.min_back,
        max_depth=asked.max_depth,
        static=(1, 1 if asked.labels == "keep" and sized.blocks > 2 else 0),
        head_near=asked.labels == "keep",
    )
    devices = devices_of(asked, clients)
    fixed = {c: asked.cuts.get(c, asked.cut) for c in clients}
    open_ = {c: d for c, d in devices.items() if fixed[c] is None}
    stream = Dice(recipe.seed)("plan").generator()
    goal = "static" if not asked.devices and asked.goal == "memory_only" else asked.goal
    chosen = plan(sized, open_, limits, goal, stream) if open_ else {}
    out: dict[ClientId, Placed] = {}
    for client in clients:
        cut = fixed[client]
        if cut is None:
            choice = chosen[client]
            if not asked.devices:
                choice = replace(choice, reason="no plan.devices were given to fit it to")
        else:
            head_near = asked.labels == "keep"
            Seat(Cut(*cut), asked.labels).check(
                sized.blocks, open_profile=recipe.privacy.profile != "u-shape", who=client
            )
            size = near_bytes(sized, *cut, head_near=head_near)["total"]
            choice = Choice(cut[0], cut[1], size, "as the recipe says")
        rank = asked.ranks.get(client)
        seat = Seat(Cut(choice.front, choice.back), asked.labels, rank=rank)
        seat.check(sized.blocks, open_profile=recipe.privacy.profile != "u-shape", who=client)
        out[client] = Placed(devices[client].name, seat, choice.bytes, choice.reason)
    return out


def _known(asked: PlanRecipe, clients: list[ClientId]) -> None:
    for field, names in (("cuts", asked.cuts), ("assign", asked.assign), ("ranks", asked.ranks)):
        for client in names:
            if client not in clients:
                known = ", ".join(clients[:8])
                raise PlanError(f'plan.{field}: there is no client "{client}". Clients: {known}.')


def _device(d: DeviceRecipe) -> Device:
    flops, up, down = (
        None if value is None else value * unit
        for value, unit in ((d.gflops, 1e9), (d.up_mbit, 1e6 / 8), (d.down_mbit, 1e6 / 8))
    )
    return Device(d.name, parse_bytes(d.memory), flops, up, down, d.latency_ms / 1000)


def devices_of(asked: PlanRecipe, clients: list[ClientId]) -> dict[ClientId, Device]:
    """What every client runs on; PlanError if a device is named that the recipe does not have."""
    kinds = {d.name: _device(d) for d in asked.devices}
    if not kinds:
        return {c: Device(HERE, 1 << 60) for c in clients}
    names = list(kinds)
    out: dict[ClientId, Device] = {}
    for n, client in enumerate(sorted(clients)):
        name = asked.assign.get(client, names[n % len(names)])
        if name not in kinds:
            raise PlanError(
                f'plan.assign: there is no device "{name}". Devices: {", ".join(names)}.'
            )
        out[client] = kinds[name]
    return out
