"""Clients with a task, labels or an objective of their own: checked, sized, given a backbone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from flexp.data.federation import Federation
from flexp.data.tasks import Task
from flexp.engine.base import Own
from flexp.errors import RecipeError
from flexp.model.adapter import Kind
from flexp.model.backbone import Backbone
from flexp.model.kindred import join
from flexp.model.skeleton import TaskKind, skeleton
from flexp.plan.costs import BlockCosts
from flexp.recipe import Recipe
from flexp.seating import adapter_kind, costs
from flexp.strategies.base import ClientId


def classes_of(task: Task) -> int:
    """The width of a classifier's head, at least 2."""
    return max(2, len(getattr(task, "labels", ())))


def check_own(recipe: Recipe, federation: Federation) -> None:
    """RecipeError, with the client's name, where a task or objective needs the head elsewhere."""
    for client in federation.own:
        task = federation.own[client]
        if recipe.plan.labels != "keep":
            raise RecipeError(
                f"clients.{client}: its own task or labels need its head at the client. Set "
                "plan.labels to keep."
            )
        if recipe.train.label_prior and task.name == "causal-lm":
            raise RecipeError(
                f"clients.{client}: train.label_prior needs classifications only. Switch it off."
            )
    for client in federation.objectives:
        if recipe.plan.labels == "loss":
            raise RecipeError(
                f"clients.{client}: its objective needs the loss at the client. Set plan.labels to "
                "keep or logits."
            )


def own_costs(recipe: Recipe, source: Path, federation: Federation) -> dict[ClientId, BlockCosts]:
    """Bytes of the model's parts for clients whose head or rows are their own."""
    found, out = dict[tuple[Any, ...], BlockCosts](), dict[ClientId, BlockCosts]()
    for client, task in federation.own.items():
        given: Any = task
        kind, length = cast("TaskKind", task.name), int(given.max_length)
        key = (kind, classes_of(task), length)
        if key not in found:
            bones = skeleton(
                source, kind, classes=classes_of(task), blocks_at=recipe.model.blocks_at
            )
            mine = recipe.task.model_copy(update={"kind": kind, "max_length": length})
            asked = recipe.model_copy(update={"task": mine})
            found[key] = costs(asked, bones, adapter_kind(recipe.adapter))
        out[client] = found[key]
    return out


def own_of(
    federation: Federation, backbone: Backbone, adapter: Kind, opened: Callable[..., Backbone]
) -> dict[ClientId, Own]:
    """What clients have of their own: one backbone per head, its blocks those of the server's.

    ``opened`` gives the backbone of a kind of task with so many classes.
    """
    out = dict[ClientId, Own]()
    bodies = {(federation.task.name, classes_of(federation.task)): backbone}
    for client in sorted({*federation.own, *federation.objectives}):
        task = federation.task_of(client)
        key = (task.name, classes_of(task))
        if key not in bodies:
            bodies[key] = opened(*key)
            join(bodies[key], backbone, adapter, client)
        out[client] = Own(task, bodies[key], federation.objectives.get(client))
    return out
