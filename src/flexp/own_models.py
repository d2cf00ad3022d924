"""Clients with a backbone of their own: another model of the same tokens, beside the run's.

Only the tokenizer must be the same. Cuts, plans and adapters of such a client are of its own model;
what methods exchange between models is their affair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flexp import assets, parcel
from flexp.data.federation import Federation
from flexp.engine.base import Own
from flexp.errors import RecipeError
from flexp.model.adapter import Kind
from flexp.model.backbone import Backbone
from flexp.model.cut import Seat
from flexp.model.reader import open_reader
from flexp.model.skeleton import Skeleton, skeleton
from flexp.plan.costs import BlockCosts
from flexp.plan.work import BlockWork
from flexp.recipe import Recipe
from flexp.recipe_clients import model_of
from flexp.seating import costs, work
from flexp.strategies.base import ClientId, Strategy
from flexp.tensors import Tensors


@dataclass(frozen=True)
class Model:
    """One model of a run beside the usual one, before its weights are read."""

    source: Path
    bones: Skeleton
    costs: BlockCosts
    work: Callable[[], BlockWork]


HERE = "run:"  # in front of a model's name in a file of factors
Models = Mapping[str, Model]  # by the name in the recipe


def named(recipe: Recipe) -> dict[ClientId, str]:
    """Which client has a model of its own, if that is not the run's anyway."""
    held, usual = recipe.clients, recipe.model.source
    return {client: name for client in held if (name := model_of(held, client, usual))}


def models_of(
    recipe: Recipe,
    cache: assets.Cache,
    federation: Federation,
    kind: Kind,
    *,
    reader: Any,
    say: Callable[[str], None],
    classes: int,
) -> dict[str, Model]:
    """The models of single clients; RecipeError where a client's cannot be, with its name."""
    found, task = dict[str, Model](), recipe.task.kind
    for client, name in sorted(named(recipe).items()):
        if client in federation.own:
            raise RecipeError(
                f"clients.{client}: a model of its own and a task of its own do not go together "
                "yet. Remove one of them."
            )
        if name in found:
            continue
        source = assets.resolve(name, cache, say=say)
        if not _alike(reader, open_reader(source, task)):
            raise RecipeError(
                f'clients.{client}.model: "{name}" reads other tokens or pixels than '
                f'"{recipe.model.source}". Choose models of one family, with one tokenizer.'
            )
        bones = skeleton(source, task, classes=classes, blocks_at=recipe.model.blocks_at)
        sized = costs(recipe, bones, kind)
        found[name] = Model(source, bones, sized, partial(work, recipe, bones, kind))
    return found


def _alike(one: Any, other: Any) -> bool:
    """Whether two readers give the same ids; readers of pixels say themselves what they take."""
    if hasattr(one, "get_vocab") and hasattr(other, "get_vocab"):
        return one.get_vocab() == other.get_vocab()
    return one == other


def made_for(recipe: Recipe) -> dict[str, Any]:
    """What frozen factors that agree depend on, as a file of them tells it."""
    asked, model = recipe.adapter, recipe.model
    names = sorted({model.source, *named(recipe).values()})
    shape = [asked.rank, asked.groups, *asked.targets]
    return {"models": names, "revision": model.revision, "shape": shape, "seed": recipe.seed}


def factors_of(recipe: Recipe) -> Mapping[str, Tensors]:
    """Frozen factors by model ("" is the run's) from ``adapter.aligned``; nothing without it.

    RecipeError for a file that is not there or was made for something else.
    """
    file = recipe.adapter.aligned
    if file is None:
        return {}
    if not Path(file).exists():
        raise RecipeError(f'adapter.aligned: there is no "{file}" yet. Run `flexp align` first.')
    held = parcel.load(file)
    if held.facts.get("for") != made_for(recipe):
        raise RecipeError(
            f'adapter.aligned: "{file}" is of other models, another rank, other groups or targets, '
            "or another seed. Name another file, and run `flexp align`."
        )
    return {name.removeprefix(HERE): factors for name, factors in held.adapters.items()}


def owners(
    recipe: Recipe, federation: Federation, others: Mapping[str, Backbone]
) -> dict[ClientId, Own]:
    """What clients with a model of their own have otherwise than the rest."""
    return {
        client: Own(federation.task, others[name], federation.objectives.get(client))
        for client, name in named(recipe).items()
        if client in federation.shards
    }


def smallest(bodies: Mapping[str, Backbone]) -> Backbone:
    """The one with the fewest numbers, the first by name of those that have as few."""
    sizes = {name: sum(p.numel() for p in b.model.parameters()) for name, b in bodies.items()}
    return bodies[min(sorted(sizes), key=lambda name: sizes[name])]


def unlike_models(strategy: Strategy[Any], seats: Mapping[ClientId, Seat]) -> str:
    """Why clients cannot have these backbones with a method; empty if they can."""
    if strategy.models or len({seat.model for seat in seats.values()}) < 2:
        return ""
    odd = ", ".join(f'"{client}"' for client, seat in seats.items() if seat.model)
    return f"all its clients need one model, and {odd} have another. Remove clients.NAME.model."
