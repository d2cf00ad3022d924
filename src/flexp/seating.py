"""From a recipe to a seat for every client: sizes from the skeleton, devices, the planner."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from flexp.data.tasks import CausalLM, Classification
from flexp.dice import Dice
from flexp.engine.flow import Pace
from flexp.errors import CutError, ModelError, PlanError
from flexp.link.wire import Wire, packed_bytes
from flexp.model.adapter import Dense, Head, Ia3, Kind, Lora, Prompt, dropout_of, layout
from flexp.model.colora import CoLora
from flexp.model.cut import Cut, Seat
from flexp.model.prompts import longer
from flexp.model.quantize import Quantize
from flexp.model.skeleton import Skeleton, bare, head_leaves, states_of
from flexp.plan import (
    BlockCosts,
    BlockWork,
    Choice,
    Device,
    aims_of,
    default_goal,
    devices_of,
    frame_bytes,
    limits_of,
    measure_costs,
    measure_work,
    near_bytes,
    plan,
    seconds_of,
    server_of,
    step_load,
    step_seconds,
    tried,
)
from flexp.plan.declared import FORMS
from flexp.plan.devices import parse_bytes
from flexp.plan.sizes import adapter_bytes, quantized_costs
from flexp.plan.trial import Shape
from flexp.recipe import AdapterRecipe, PlanRecipe, Recipe
from flexp.recipe_clients import model_of
from flexp.strategies.base import ClientId


@dataclass(frozen=True)
class Placed:
    """Where a client was put: its device, its seat, the bytes it needs there, and why.

    ``seconds`` are of one step and ``pace`` says what they are made of; None where a speed is not
    known.
    """

    device: str
    seat: Seat
    bytes: int
    reason: str
    seconds: float | None = None
    pace: Pace | None = None


def adapter_kind(recipe: AdapterRecipe) -> Kind:
    """The kind of adapter that a recipe describes."""
    if recipe.kind == "lora":
        return Lora(
            recipe.rank, recipe.alpha, recipe.dropout, recipe.targets, recipe.dora, recipe.head
        )
    if recipe.kind == "colora":
        more = recipe.targets, recipe.groups, recipe.head
        return CoLora(recipe.rank, recipe.alpha, recipe.dropout, *more)
    if recipe.kind == "ia3":
        return Ia3(recipe.targets, recipe.feedforward, recipe.head)
    if recipe.kind == "prompt":
        return Prompt(recipe.tokens, recipe.head, recipe.at)
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


def dtype_name(recipe: Recipe) -> str:
    """The dtype's name, as "float32"."""
    return str(dtype_of(recipe)).removeprefix("torch.")


def quantize_of(recipe: Recipe) -> Quantize | None:
    """What becomes of the frozen linear maps; None if they stay as they are."""
    form = recipe.model.quantize
    return None if form == "none" else Quantize(form, adapter_kind(recipe.adapter))


def cache_of(recipe: Recipe) -> int:
    """Bytes of hidden states that a client keeps; PlanError if the recipe names no size."""
    asked = recipe.train.cache
    try:
        return parse_bytes(asked) if asked else 0
    except PlanError as problem:
        raise PlanError(f"train.cache: {problem}") from problem


def costs(recipe: Recipe, bones: Skeleton, kind: Kind) -> BlockCosts:
    """Bytes of the model's parts and of a step on them, from its skeleton alone."""
    sized, shapes = _sizes(recipe, bones, kind)
    shape = Shape(
        recipe.train.batch, recipe.task.max_length, recipe.mode == "fast", dropout_of(kind)
    )
    how: dict[str, Any] = {"dtype": dtype_of(recipe), "quantize": quantize_of(recipe)}
    return tried(sized, bones, recipe.task.kind, shapes, shape, **how)


def frame_limit(recipe: Recipe, bones: Skeleton, slots: int) -> int:
    """The longest message of a run, in bytes, for a method of so many slots."""
    # A skeleton is used up by looking what an adapter would be on it, so this one is fresh.
    fresh = bare(bones.config, recipe.task.kind, blocks_at=recipe.model.blocks_at)
    sized, _ = _sizes(recipe, fresh, adapter_kind(recipe.adapter))
    scored = CausalLM if recipe.task.kind == "causal-lm" else Classification
    return frame_bytes(sized, scored.rows_at_once, slots)


def _sizes(
    recipe: Recipe, bones: Skeleton, kind: Kind
) -> tuple[BlockCosts, Mapping[str, tuple[int, ...]]]:
    head = (
        () if recipe.task.kind == "causal-lm" else head_leaves(bones.model, None, bones.blocks_path)
    )
    dtype, train = dtype_of(recipe), recipe.train
    prompt = kind.tokens if isinstance(kind, Prompt) and kind.at != "added" else 0
    states = states_of(bones.config, recipe.task.kind, bones.blocks_path)
    sized = measure_costs(
        bones.model,
        bones.blocks_path,
        {},
        batch=train.batch,
        length=recipe.task.max_length + prompt,
        itemsize=dtype.itemsize,
        states=() if states is None else tuple(longer(s, prompt) for s in states.shapes),
    )
    stored = getattr(bones.config, "dtype", None) or torch.float32
    quantize = quantize_of(recipe)
    if quantize is not None:
        sized = quantized_costs(sized, bones, quantize)
    shapes = layout(bones.model, kind, bones.blocks_path, head)
    per_block, outside = adapter_bytes(shapes, bones.blocks_path, sized.blocks, 4)
    sized = replace(
        sized,
        adapter_block_bytes=per_block,
        adapter_head_bytes=outside,
        moments=2 if train.optimizer == "adamw" else int(train.momentum > 0),
        file_itemsize=None if stored == dtype else stored.itemsize,
        cache_bytes=cache_of(recipe),
    )
    return packed(sized, recipe, recipe.link.wire), shapes


def packed(sized: BlockCosts, recipe: Recipe, wire: Wire) -> BlockCosts:
    """The same costs with messages that travel under a wire."""
    batch, dtype = sized.batch, dtype_of(recipe)
    size = packed_bytes((batch, sized.length, sized.width), dtype, wire)
    each = tuple(packed_bytes((batch, *shape), dtype, wire) for shape in sized.states)
    sized = replace(sized, packed_bytes=size, packed_states=each)
    return replace(sized, window=recipe.link.window, ahead=recipe.link.ahead)


def work(recipe: Recipe, bones: Skeleton, kind: Kind) -> BlockWork:
    """Operations of the model's parts in one step, from its skeleton alone."""
    return measure_work(
        bones, kind, recipe.task.kind, batch=recipe.train.batch, length=recipe.task.max_length
    )


def place(
    recipe: Recipe,
    clients: list[ClientId],
    sized: BlockCosts,
    working: Callable[[], BlockWork] | None = None,
) -> dict[ClientId, Placed]:
    """A seat for every client: the recipe's cut, or the planner's choice for its device.

    ``working`` gives the work of blocks; it is asked only where a device's speed is known.
    """
    asked = recipe.plan
    _known(asked, clients)
    dtype = dtype_name(recipe)
    limits, server = limits_of(asked, sized.blocks), server_of(asked, dtype)
    devices = devices_of(asked, clients, dtype)
    timed = any(d.flops is not None for d in devices.values())
    found = working() if working is not None and timed else None
    fixed = {c: asked.cuts.get(c, asked.cut) for c in clients}
    open_ = {c: d for c, d in devices.items() if fixed[c] is None}
    goal = asked.goal or default_goal(open_, server)
    if not asked.devices and goal == "memory_only":
        goal = "static"
    stream = Dice(recipe.seed)("plan").generator()
    more: dict[str, Any] = {"work": found, "server": server, "aims": aims_of(asked)}
    chosen = plan(sized, open_, limits, goal, stream, **more) if open_ else {}
    out: dict[ClientId, Placed] = {}
    for client in clients:
        cut = fixed[client]
        if cut is not None:
            choice = _as_asked(recipe, client, cut, sized)
            if found is not None:
                seconds = step_seconds(
                    sized, found, cut, devices[client], server.flops, form=limits.form
                )
                choice = replace(choice, seconds=seconds)
        elif asked.devices:
            choice = chosen[client]
        else:
            choice = replace(chosen[client], reason="no plan.devices were given to fit it to")
        seat = Seat(
            Cut(choice.front, choice.back),
            asked.labels,
            model_of(recipe.clients, client, recipe.model.source),
            rank=asked.ranks.get(client),
            recompute=choice.recompute,
            accumulate=max(choice.accumulate, recipe.link.window),
        )
        if seat.near_only(sized.blocks):  # nothing crosses
            seat = replace(seat, accumulate=choice.accumulate)
        seat.check(sized.blocks, open_profile=recipe.privacy.profile != "u-shape", who=client)
        pace = found and _pace(seat, sized, found, devices[client], server.flops)
        out[client] = Placed(
            devices[client].name,
            seat,
            choice.bytes,
            choice.reason,
            choice.seconds,
            pace and replace(pace, wire=recipe.link.of(client)),
        )
    return out


def _pace(
    seat: Seat, sized: BlockCosts, work: BlockWork, device: Device, server: float | None
) -> Pace | None:
    """How fast a client is at its seat; None if a speed that it needs is not known."""
    cut, form = (seat.cut.front, seat.cut.back), FORMS[seat.labels]
    recompute, parts = seat.recompute, seat.accumulate
    load = step_load(sized, work, cut, form, recompute=recompute, accumulate=parts)
    if seconds_of(load, device, server) is None:
        return None
    return Pace(
        near=load.near_flops / (device.flops or 1.0),
        far=load.far_flops / server if server else 0.0,
        up=1 / device.uplink if device.uplink else 0.0,
        down=1 / device.downlink if device.downlink else 0.0,
        latency=device.latency,
    )


def _as_asked(recipe: Recipe, client: ClientId, cut: tuple[int, int], sized: BlockCosts) -> Choice:
    """The recipe's own cut for a client; CutError unless it is legal."""
    asked = recipe.plan
    Seat(Cut(*cut), asked.labels).check(
        sized.blocks, open_profile=recipe.privacy.profile != "u-shape", who=client
    )
    if asked.min_front > 1 and cut[0] < asked.min_front:
        raise CutError(
            f'client "{client}" asked for {cut[0]} front blocks, but plan.min_front is '
            f"{asked.min_front}. Give it as many, or lower the floor."
        )
    size = near_bytes(sized, *cut, head_near=asked.labels == "keep")["total"]
    return Choice(*cut, size, "as the recipe says")


def _known(asked: PlanRecipe, clients: list[ClientId]) -> None:
    for field, names in (
        ("cuts", asked.cuts),
        ("assign", asked.assign),
        ("slow", asked.slow),
        ("ranks", asked.ranks),
    ):
        for client in names:
            if client not in clients:
                known = ", ".join(clients[:8])
                raise PlanError(f'plan.{field}: there is no client "{client}". Clients: {known}.')
