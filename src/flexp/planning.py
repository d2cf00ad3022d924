"""What `flexp plan` tells: every client's seat of a recipe, or every cut of a model on devices."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flexp import assets
from flexp.errors import PlanError
from flexp.model.skeleton import Skeleton, drawn, read_config, skeleton
from flexp.model.targets import EVERY
from flexp.plan import (
    PROFILES,
    BlockCosts,
    Choice,
    Device,
    aims_of,
    default_goal,
    devices_of,
    limits_of,
    measure,
    near_bytes,
    plan,
    profile,
    server_of,
    step_bytes,
)
from flexp.plan.devices import measure_flops
from flexp.plan.options import Cut, Limits, Option, fitting, legal_cuts
from flexp.plan.reasons import Problem, problem_of, too_small
from flexp.privacy.egress import check_labels
from flexp.recipe import Recipe
from flexp.recipe_file import make
from flexp.seating import Placed, adapter_kind, costs, dtype_name, dtype_of, quantize_of, work
from flexp.stage import Say, Survey, survey
from flexp.strategies.base import ClientId

HERE = "here"
WHERE = "flexp plan"


@dataclass(frozen=True)
class Asked:
    """A model and devices, without a recipe. ``devices`` and ``server`` are profiles, or "here".

    Without ``task`` it is the one that the model was made for, if that is to continue text.
    """

    model: str
    devices: tuple[str, ...]
    batch: int = 8
    length: int = 128
    rank: int = 8
    task: str | None = None
    labels: str = "keep"
    server: str = "gpu-server"
    goal: str | None = None
    dtype: str = "float32"
    quantize: str = "none"


def of_recipe(
    recipe: Recipe, cache: assets.Cache, *, say: Say = lambda text: None
) -> dict[str, Any]:
    """Where every client would be cut and what it needs there; no weights are loaded."""
    return fleet(survey(recipe, cache, say=say))


def fleet(found: Survey) -> dict[str, Any]:
    """The seats of a survey: device, blocks, bytes by part, seconds and link bytes of a step.

    Then the seats that clients move to, with the round in which they do.
    """
    seats = [_seat(found, client, placed) for client, placed in found.placed.items()]
    moves = [{"round": m.round, **_seat(found, m.client, m.placed)} for m in found.fleet.moves]
    return {
        "model": found.recipe.model.source,
        "blocks": found.bones.depth,
        "dtype": dtype_name(found.recipe),
        "quantize": found.recipe.model.quantize,
        "batch": found.costs.batch,
        "seats": seats,
        "changes": moves,
    }


def _seat(found: Survey, client: ClientId, placed: Placed) -> dict[str, Any]:
    limits = limits_of(found.recipe.plan, found.bones.depth)
    cut = placed.seat.cut.front, placed.seat.cut.back
    sized = found.own_costs.get(client, found.costs)
    return {
        "client": client,
        "device": placed.device,
        **_row(sized, limits, cut, placed.seat.accumulate, placed.seat.recompute),
        "labels": placed.seat.labels,
        "seconds": placed.seconds,
        "reason": placed.reason,
    }


def _row(
    sized: BlockCosts, limits: Limits, cut: Cut, accumulate: int, recompute: int
) -> dict[str, Any]:
    parts = near_bytes(
        sized, *cut, head_near=limits.head_near, recompute=recompute, accumulate=accumulate
    )
    alone = limits.head_near and sum(cut) == sized.blocks
    return {
        "front": cut[0],
        "back": cut[1],
        "server_blocks": sized.blocks - sum(cut),
        "accumulate": accumulate,
        "recompute": recompute,
        "bytes": dict(parts),
        "step_bytes": 0 if alone else step_bytes(sized, limits.form, cut=cut),
    }


# ---- a model and devices


def of_model(asked: Asked, cache: assets.Cache, *, say: Say = lambda text: None) -> dict[str, Any]:
    """Every legal cut of a model on each device, and the one to take; only its config is read.

    PlanError if no cut fits any of the devices; one that is too small among others is told so in
    its ``problem``.
    """
    if not asked.devices:
        raise PlanError(f"Name devices: {', '.join(PROFILES)}, or {HERE} for this machine.")
    bones, asked = _bones(asked, cache, say)
    recipe = _recipe(asked, bones, say)
    check_labels(recipe.plan.labels, "u-shape", text=recipe.task.kind == "causal-lm")
    kind, dtype = adapter_kind(recipe.adapter), dtype_name(recipe)
    sized, done = costs(recipe, bones, kind), work(recipe, bones, kind)
    limits = limits_of(recipe.plan, bones.depth)
    names = list(recipe.plan.assign)
    found = devices_of(recipe.plan, names, dtype)
    devices = {name: found[name] for name in names}
    problem = problem_of(sized, devices, limits, done, server_of(recipe.plan, dtype))
    chosen, problems = _chosen(problem, recipe)
    shown = {**asdict(asked), "goal": recipe.plan.goal or default_goal(devices, problem.server)}
    shown["devices"] = [
        {
            **asdict(device),
            "source": _source(asked.devices[n]),
            "chosen": asdict(chosen[name]) if name in chosen else None,
            "problem": problems.get(name),
        }
        for n, (name, device) in enumerate(devices.items())
    ]
    shown["server"] = {"name": asked.server, **asdict(problem.server)}
    rows = [row for name in names for row in _cuts(problem, name, chosen.get(name))]
    return {**shown, "blocks": bones.depth, "cuts": rows}


def _bones(asked: Asked, cache: assets.Cache, say: Say) -> tuple[Skeleton, Asked]:
    """The skeleton of an asset, a folder or a hub id (only its config is fetched), and its task."""
    source: str | Path = asked.model
    if asked.model in (*cache.catalogue, *assets.drawn_models()):
        source = assets.resolve(asked.model, cache, say=say)
    task = asked.task
    if task is None:
        config = read_config(source, "causal-lm", 2, None)
        made = config.architectures or [""]
        speaks = str(made[0]).endswith(("ForCausalLM", "LMHeadModel"))
        sees = hasattr(config, "num_channels") and not hasattr(config, "vocab_size")
        task = "causal-lm" if speaks else "images" if sees else "classification"
    kind = make({"task": {"kind": task}}, WHERE).task.kind
    return skeleton(source, kind), replace(asked, task=kind)


def _recipe(asked: Asked, bones: Skeleton, say: Say) -> Recipe:
    """What was asked, as a recipe without data; every device is a client."""
    plain: dict[str, Any] = {
        "mode": "fast",
        "task": {"kind": asked.task, "max_length": asked.length},
        "model": {"source": asked.model, "dtype": asked.dtype, "quantize": asked.quantize},
        "adapter": {"rank": asked.rank}
        if not drawn(bones.config)
        else {"kind": "dense", "targets": [EVERY]},
        "train": {"batch": asked.batch},
    }
    here = None
    if HERE in (*asked.devices, asked.server):
        say("measuring this machine")
        here = measured(make(plain, WHERE), bones)
    devices: dict[str, dict[str, Any]] = {}
    for n, name in enumerate(asked.devices):
        again = asked.devices[:n].count(name)
        devices[name if not again else f"{name} {again + 1}"] = _device(name, here)
    plain["plan"] = {
        "labels": asked.labels,
        "devices": [{"name": name, **device} for name, device in devices.items()],
        "assign": {name: name for name in devices},
        "server": _device(asked.server, here),
        "goal": asked.goal,
    }
    return make(plain, WHERE)


def _device(name: str, here: Device | None) -> dict[str, Any]:
    """A device as a recipe declares it."""
    if name != HERE or here is None:
        return {"profile": name}
    # How it is connected to a server that is not there yet cannot be measured.
    return {"profile": "laptop", "memory": here.memory, "gflops": (here.flops or 0.0) / 1e9}


def measured(recipe: Recipe, bones: Skeleton) -> Device:
    """This machine, with its speed in one block of the model."""
    speed = measure_flops(
        bones,
        recipe.task.kind,
        batch=recipe.train.batch,
        length=recipe.task.max_length,
        dtype=dtype_of(recipe),
        quantize=quantize_of(recipe),
    )
    return replace(measure(), flops=speed)


def _source(name: str) -> str:
    if name == HERE:
        return "measured now; its link is a typical one of a home"
    return profile(name).source


def _chosen(problem: Problem, recipe: Recipe) -> tuple[dict[str, Choice], dict[str, str]]:
    """The plan of all devices that can hold some cut, and what the others lack."""
    problems = {
        name: too_small(problem, name, problem.options)
        for name, device in problem.devices.items()
        if not fitting(problem.options, device.memory)
    }
    able = {n: d for n, d in problem.devices.items() if n not in problems}
    if not able:
        raise PlanError(next(iter(problems.values())))
    goal = recipe.plan.goal or default_goal(able, problem.server)
    chosen = plan(
        problem.costs,
        able,
        problem.limits,
        goal,
        work=problem.work,
        server=problem.server,
        aims=aims_of(recipe.plan),
    )
    return chosen, problems


def _cuts(problem: Problem, name: str, chosen: Choice | None) -> list[dict[str, Any]]:
    """Every legal cut on one device: as it was chosen, else what costs least time and fits."""
    device = problem.devices[name]
    by_cut: dict[Cut, list[Option]] = {}
    for option in problem.options:
        by_cut.setdefault(option.cut, []).append(option)
    rows: list[dict[str, Any]] = []
    for cut in sorted(legal_cuts(problem.costs.blocks, problem.limits), key=lambda c: (sum(c), c)):
        options = by_cut[cut]
        fits = fitting(options, device.memory)
        taken = fits[0] if fits else min(options, key=lambda o: o.bytes)
        is_chosen = chosen is not None and cut == (chosen.front, chosen.back)
        if is_chosen and chosen is not None:
            taken = next(
                o
                for o in options
                if (o.accumulate, o.recompute) == (chosen.accumulate, chosen.recompute)
            )
        row = _row(problem.costs, problem.limits, cut, taken.accumulate, taken.recompute)
        rows.append(
            {
                "device": name,
                **row,
                "seconds": problem.seconds(taken, device),
                "missing": max(0, taken.bytes - device.memory),
                "chosen": is_chosen,
            }
        )
    return rows
