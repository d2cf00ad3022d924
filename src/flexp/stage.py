"""Sets a run up from its recipe: model, data, plan and strategy, all checked before it starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from flexp import assets
from flexp.client.desk import Training
from flexp.data import sources
from flexp.data.federation import Federation, federate, labels_of
from flexp.data.sources import Row
from flexp.data.tasks import open_tokenizer, padding_of
from flexp.dice import Dice
from flexp.engine.local import LocalEngine
from flexp.errors import DataError, ModelError, PlanError, RecipeError, StrategyError
from flexp.model.adapter import Dense, Head, Ia3, Kind, Lora, Prompt, layout
from flexp.model.backbone import Backbone
from flexp.model.cut import Cut, Seat
from flexp.model.ops import Optim, SlotSpec
from flexp.model.skeleton import Skeleton, head_leaves, skeleton
from flexp.plan.costs import BlockCosts, measure_costs
from flexp.plan.devices import Device, parse_bytes
from flexp.plan.planner import Choice, Limits, near_bytes, plan
from flexp.privacy.egress import check_labels
from flexp.recipe import AdapterRecipe, PlanRecipe, Recipe
from flexp.strategies import build
from flexp.strategies.base import ClientId, Strategy

Say = Callable[[str], None]
HERE = "this machine"


@dataclass(frozen=True)
class Placed:
    """Where a client was put: its device, its seat, the bytes it needs there, and why."""

    device: str
    seat: Seat
    bytes: int
    reason: str


@dataclass(frozen=True)
class Stage:
    """Everything that a run needs."""

    recipe: Recipe
    strategy: Strategy[Any]
    federation: Federation
    backbone: Backbone
    placed: Mapping[ClientId, Placed]
    engine: LocalEngine
    dice: Dice
    source: Path

    @property
    def seats(self) -> dict[ClientId, Seat]:
        """The seats by client."""
        return {c: p.seat for c, p in self.placed.items()}


def prepare(recipe: Recipe, cache: assets.Cache, *, say: Say = lambda text: None) -> Stage:
    """Opens everything that a recipe names; raises a FlexpError before anything is trained."""
    strategy = build(recipe.strategy.name, recipe.strategy.options)
    task = recipe.task.kind
    if recipe.train.label_prior and (task != "classification" or recipe.plan.labels == "loss"):
        raise RecipeError(
            "train.label_prior needs a classification whose loss is at the client. Switch it off, "
            'or set task.kind to "classification" and plan.labels to "keep" or "logits".'
        )
    check_labels(recipe.plan.labels, recipe.privacy.profile, text=task == "causal-lm")
    rows = read_rows(recipe, cache, say)
    source = assets.resolve(recipe.model.source, cache, revision=recipe.model.revision, say=say)
    tokenizer = open_tokenizer(source)
    dice = Dice(recipe.seed)
    federation = federate(rows, recipe.data, recipe.task, tokenizer, dice)
    classes = len(labels_of(rows, recipe.task, recipe.data))
    bones = skeleton(source, task, classes=max(classes, 2), blocks_at=recipe.model.blocks_at)
    kind = adapter_kind(recipe.adapter)
    placed = place(recipe, list(federation.shards), costs(recipe, bones, kind))
    _check_split(strategy, placed, bones.depth)
    backbone = Backbone.open(
        source,
        task=task,
        classes=max(classes, 2),
        seed=recipe.seed,
        dtype=dtype_of(recipe),
        device=recipe.model.device,
        blocks_at=recipe.model.blocks_at,
        name=recipe.model.source,
        pad=padding_of(tokenizer),
    )
    engine = _engine(recipe, backbone, federation, dice)
    return Stage(recipe, strategy, federation, backbone, placed, engine, dice, source)


def with_method(stage: Stage, recipe: Recipe) -> Stage:
    """The same data, model and seats for another method and training; nothing is opened again."""
    strategy = build(recipe.strategy.name, recipe.strategy.options)
    _check_split(strategy, stage.placed, stage.backbone.depth)
    engine = _engine(recipe, stage.backbone, stage.federation, stage.dice)
    # Where adapters begin is worked out here: building skeletons is not safe on two threads.
    engine.initial(SlotSpec())
    return replace(stage, recipe=recipe, strategy=strategy, engine=engine)


def _engine(recipe: Recipe, backbone: Backbone, federation: Federation, dice: Dice) -> LocalEngine:
    return LocalEngine(
        backbone,
        federation.task,
        federation.shards,
        kind=adapter_kind(recipe.adapter),
        training=training(recipe),
        dice=dice,
        profile=recipe.privacy.profile,
        run=recipe.hash()[:12],
    )


def read_rows(recipe: Recipe, cache: assets.Cache, say: Say) -> list[Row]:
    """The rows of the recipe's data: a packaged set by name, else a path."""
    name = recipe.data.path
    if name in sources.SHIPPED:
        return sources.shipped(name, assets.resolve(name, cache, kind="data", say=say))
    path = Path(name).expanduser()
    if not path.exists() and name in cache.catalogue:
        raise DataError(
            f'data.path: the asset "{name}" cannot be read as rows. Packaged sets that can: '
            f"{', '.join(sources.SHIPPED)}."
        )
    return sources.read(path)


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


def training(recipe: Recipe) -> Training:
    """The recipe's training as the engine takes it."""
    t = recipe.train
    optim = Optim(t.optimizer, t.lr, t.head_lr, weight_decay=t.weight_decay, momentum=t.momentum)
    return Training(optim, t.batch, t.steps, t.epochs, t.clip_norm, t.label_prior)


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
    itemsize = torch.empty((), dtype=dtype_of(recipe)).element_size()
    sized = measure_costs(
        bones.model,  # pyright: ignore[reportArgumentType]
        bones.blocks_path,
        {},
        batch=recipe.train.batch,
        length=recipe.task.max_length,
        itemsize=itemsize,
    )
    shapes = layout(bones.model, kind, bones.blocks_path, head)
    per_block = [0] * sized.blocks
    outside = 0
    for name, shape in shapes.items():
        size = 4 * int(torch.Size(shape).numel())
        inner = name.partition(f"{bones.blocks_path}.")[2]
        if inner:
            per_block[int(inner.split(".", 1)[0])] += size
        else:
            outside += size
    return replace(sized, adapter_block_bytes=tuple(per_block), adapter_head_bytes=outside)


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
    devices = _devices(asked, clients)
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
        seat = Seat(Cut(choice.front, choice.back), asked.labels)
        seat.check(sized.blocks, open_profile=recipe.privacy.profile != "u-shape", who=client)
        out[client] = Placed(devices[client].name, seat, choice.bytes, choice.reason)
    return out


def _known(asked: PlanRecipe, clients: list[ClientId]) -> None:
    for field, names in (("cuts", asked.cuts), ("assign", asked.assign)):
        for client in names:
            if client not in clients:
                known = ", ".join(clients[:8])
                raise PlanError(f'plan.{field}: there is no client "{client}". Clients: {known}.')


def _devices(asked: PlanRecipe, clients: list[ClientId]) -> dict[ClientId, Device]:
    kinds = {d.name: Device(d.name, parse_bytes(d.memory)) for d in asked.devices}
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


def _check_split(strategy: Strategy[Any], placed: Mapping[ClientId, Placed], depth: int) -> None:
    cut = [c for c, p in placed.items() if not p.seat.near_only(depth)]
    if cut and strategy.split.startswith("no"):
        raise StrategyError(
            f'Method "{strategy.name}" does not work on a cut model: '
            f"{strategy.split.partition(':')[2].strip()} Give every client the whole model with "
            f"plan.cut=[{depth},0]."
        )
