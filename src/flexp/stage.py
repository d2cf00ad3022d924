"""Sets a run up from its recipe: model, data, plan and strategy, all checked before it starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from flexp import assets
from flexp.client.desk import Training
from flexp.data.federation import Federation, federate, space_of
from flexp.data.tokens import padding_of
from flexp.dice import Dice
from flexp.engine.base import Own
from flexp.engine.flow import Pace
from flexp.engine.host import Host
from flexp.engine.local import LocalEngine
from flexp.errors import RecipeError, StrategyError
from flexp.evaluate import pooled
from flexp.fleet import Fleet, fleet, packed_costs
from flexp.model.adapter import Kind, Prompt
from flexp.model.backbone import Backbone
from flexp.model.colora import CoLora
from flexp.model.cut import Seat, uncut
from flexp.model.ops import Optim, SlotSpec
from flexp.model.reader import open_reader
from flexp.model.skeleton import Skeleton, TaskKind, skeleton
from flexp.own_models import (
    Model,
    Models,
    factors_of,
    models_of,
    named,
    owners,
    smallest,
    unlike_models,
)
from flexp.own_tasks import check_own, classes_of, own_costs, own_of
from flexp.plan.costs import BlockCosts
from flexp.privacy.egress import check_labels
from flexp.recipe import Recipe
from flexp.rows import read_rows
from flexp.seating import Placed, adapter_kind, cache_of, costs, dtype_of, quantize_of, work
from flexp.strategies import build
from flexp.strategies.base import ClientId, Setting, Strategy

Say = Callable[[str], None]


@dataclass(frozen=True)
class Survey:
    """What is known before any weight is read: data, the model's skeleton, and everybody's seat."""

    recipe: Recipe
    source: Path
    tokenizer: Any
    federation: Federation
    classes: int
    bones: Skeleton
    kind: Kind
    costs: BlockCosts
    fleet: Fleet
    dice: Dice
    own_costs: Mapping[ClientId, BlockCosts]
    others: Models = field(default_factory=dict[str, Model])

    @property
    def placed(self) -> Mapping[ClientId, Placed]:
        """Where clients sit when the run begins."""
        return self.fleet.placed


E_co = TypeVar("E_co", bound=Host, covariant=True)


@dataclass(frozen=True)
class Stage(Generic[E_co]):
    """Everything that a run needs; ``fleet`` is where this method's clients sit and when.

    ``renew`` gives the stage of a coming round, in which more clients may be known.
    """

    survey: Survey
    recipe: Recipe
    strategy: Strategy[Any]
    backbone: Backbone
    fleet: Fleet
    engine: E_co
    renew: Callable[[Stage[Any], int], Stage[Any]] = lambda stage, round: stage

    def paces_at(self, round: int) -> dict[ClientId, Pace]:
        """How fast everybody is in a round; all alike where no speeds are declared."""
        placed = self.fleet.placed_at(round)
        known = all(p.pace is not None for p in placed.values())
        return {c: (p.pace if known and p.pace else Pace()) for c, p in placed.items()}

    @property
    def placed(self) -> Mapping[ClientId, Placed]:
        """Where clients sit when the run begins."""
        return self.fleet.placed

    @property
    def federation(self) -> Federation:
        """Everybody's data and the task."""
        return self.survey.federation

    @property
    def dice(self) -> Dice:
        """The randomness of the run."""
        return self.survey.dice

    @property
    def seats(self) -> dict[ClientId, Seat]:
        """The seats by client when the run begins."""
        return self.fleet.seats_at(0)

    def seats_at(self, round: int) -> dict[ClientId, Seat]:
        """The seats by client in a round."""
        return self.fleet.seats_at(round)


def survey(recipe: Recipe, cache: assets.Cache, *, say: Say = lambda text: None) -> Survey:
    """Reads data and config and places every client; raises a FlexpError if something is wrong."""
    task = recipe.task.kind
    if recipe.train.label_prior and (task == "causal-lm" or recipe.plan.labels == "loss"):
        raise RecipeError(
            "train.label_prior needs a classification whose loss is at the client. Switch it off, "
            'or set task.kind to "classification" or "images", and plan.labels to "keep" or '
            '"logits".'
        )
    check_labels(recipe.plan.labels, recipe.privacy.profile, text=task == "causal-lm")
    rows = read_rows(recipe, cache, say)
    source = assets.resolve(recipe.model.source, cache, revision=recipe.model.revision, say=say)
    tokenizer = open_reader(source, task)
    dice = Dice(recipe.seed)
    federation = federate(rows, recipe.data, recipe.task, tokenizer, dice, clients=recipe.clients)
    check_own(recipe, federation)
    classes = classes_of(federation.task)
    bones = skeleton(source, task, classes=classes, blocks_at=recipe.model.blocks_at)
    kind = adapter_kind(recipe.adapter)
    sized = costs(recipe, bones, kind)
    working = partial(work, recipe, bones, kind)
    more: dict[str, Any] = {"reader": tokenizer, "classes": classes, "say": say}
    others = models_of(recipe, cache, federation, kind, **more)
    apart = {c: others[name] for c, name in named(recipe).items()}
    own = own_costs(recipe, source, federation) | {c: m.costs for c, m in apart.items()}
    own |= packed_costs(recipe, sized, own)
    everybody = {c: own.get(c, sized) for c in federation.shards}
    seated = fleet(recipe, everybody, working, {c: m.work for c, m in apart.items()})
    known = recipe, source, tokenizer, federation, classes, bones, kind, sized, seated, dice, own
    return Survey(*known, others)


def prepare(
    recipe: Recipe, cache: assets.Cache, *, say: Say = lambda text: None
) -> Stage[LocalEngine]:
    """Opens everything that a recipe names; raises a FlexpError before anything is trained."""
    build(recipe.strategy.name, recipe.strategy.options)  # a typing error costs no download
    return opened(survey(recipe, cache, say=say))


def opened(found: Survey) -> Stage[LocalEngine]:
    """Loads the backbone of a survey and makes everything ready to train."""
    recipe = found.recipe
    strategy = build(recipe.strategy.name, recipe.strategy.options)
    seated = seats_for(strategy, found, recipe)
    backbone = (others := bodies(found)).pop("")
    own = own_of(found.federation, backbone, found.kind, partial(_backbone, found))
    own |= owners(recipe, found.federation, others)
    engine = _engine(strategy, found, recipe, backbone, own, others=others)
    return Stage(found, recipe, strategy, backbone, seated, engine)


def bodies(found: Survey) -> dict[str, Backbone]:
    """All backbones of a run by the names that seats have for them; the run's own is ""."""
    asked = found.recipe.task.kind, found.classes
    return {name: _backbone(found, *asked, name) for name in ("", *found.others)}


def _backbone(found: Survey, kind: TaskKind, classes: int, model: str = "") -> Backbone:
    recipe = found.recipe
    made = Backbone.open(
        found.others[model].source if model else found.source,
        task=kind,
        classes=classes,
        seed=recipe.seed,
        dtype=dtype_of(recipe),
        quantize=quantize_of(recipe),
        device=recipe.model.device,
        blocks_at=recipe.model.blocks_at,
        name=model or recipe.model.source,
        pad=padding_of(found.tokenizer),
        fast=recipe.mode == "fast",
    )
    made.agreed = dict(factors_of(recipe).get(model, {}))
    return made


def with_method(stage: Stage[LocalEngine], recipe: Recipe) -> Stage[LocalEngine]:
    """The same data, model and seats for another method and training; nothing is opened again."""
    found = stage.survey
    strategy = build(recipe.strategy.name, recipe.strategy.options)
    seated = seats_for(strategy, found, recipe)
    held, others = (stage.backbone, stage.engine.own), stage.engine.others
    engine = _engine(strategy, found, recipe, *held, others=others)
    # Where adapters begin is worked out here: building skeletons is not safe on two threads.
    engine.initial(SlotSpec())
    return replace(stage, recipe=recipe, strategy=strategy, fleet=seated, engine=engine)


def _engine(
    strategy: Strategy[Any],
    found: Survey,
    recipe: Recipe,
    backbone: Backbone,
    own: Mapping[ClientId, Own],
    *,
    others: Mapping[str, Backbone],
) -> LocalEngine:
    shards = found.federation.shards
    return LocalEngine(
        backbone,
        found.federation.task,
        shards,
        kind=adapter_kind(recipe.adapter),
        training=training(recipe),
        dice=found.dice,
        profile=recipe.privacy.profile,
        run=recipe.hash()[:12],
        pool=pooled(shards, None, "train") if strategy.kind == "centralised" else None,
        own=own,
        wires={c: recipe.link.of(c) for c in shards},
        together=recipe.mode == "fast",
        others=others,
        probe=smallest({"": backbone, **others}) if strategy.probes and others else None,
    )


def training(recipe: Recipe) -> Training:
    """The recipe's training as the engine takes it."""
    t = recipe.train
    optim = Optim(t.optimizer, t.lr, t.head_lr, weight_decay=t.weight_decay, momentum=t.momentum)
    more = t.clip_norm, t.label_prior, t.still, recipe.link.ahead
    how: dict[str, Any] = {"cache": cache_of(recipe), "group_by_length": t.group_by_length}
    return Training(optim, t.batch, t.steps, t.epochs, *more, **how)


def seats_for(strategy: Strategy[Any], found: Survey, recipe: Recipe) -> Fleet:
    """Where a method's clients sit: as placed, or all at one place with the whole model.

    Raises StrategyError if the method cannot run with this task, adapter, cut, rank or fleet.
    """
    check_ahead(strategy, recipe)
    depth, given = found.bones.depth, replace(found.fleet, solo=strategy.alone)
    if strategy.kind == "centralised":
        reason = "one place has the whole model and all rows"
        placed = {c: Placed("one place", uncut(depth), 0, reason) for c in found.placed}
        given = replace(given, placed=placed, moves=())
    deep = {name: model.bones.depth for name, model in found.others.items()} | {"": depth}
    for seats in given.seatings():
        refusal = strategy.refuses(setting_of(found, recipe, seats))
        refusal = refusal or unlike_models(strategy, seats)
        cut = any(not s.near_only(deep[s.model]) for s in seats.values())
        if strategy.split.startswith("no") and cut:
            reason = strategy.split.partition(":")[2].strip()
            refusal = f"{reason} Give every client the whole model with plan.cut=[{depth},0]."
        kind = adapter_kind(recipe.adapter)
        if isinstance(kind, Prompt) and kind.at == "cut":
            blocks = [s.cut.front + s.cut.back < deep[s.model] for s in seats.values()]
            wanted = "its prompts at the cut need blocks at the server. Move cuts, or adapter.at."
            refusal = refusal if all(blocks) else wanted
        if isinstance(kind, CoLora) and not strategy.gates:
            refusal = refusal or "it wears no Co-LoRA. Set adapter.kind=lora."
        lone = any(given.alone(r) for r in range(recipe.rounds))
        if not refusal and lone and "personal" not in strategy.slots:
            refusal = 'it has no slot "personal" to train alone. Remove alone from participation.'
        if refusal:
            raise StrategyError(f'Method "{strategy.name}" cannot run here: {refusal}')
    return given


def check_ahead(strategy: Strategy[Any], recipe: Recipe) -> None:
    """StrategyError for ``link.ahead`` with a method whose messages go one by one."""
    if recipe.link.ahead and not strategy.barrier:
        raise StrategyError(
            f'Method "{strategy.name}" has no barrier here, so its messages go one by one and each '
            "step by itself: a front that lacks a step would gain nothing. Switch link.ahead off."
        )


def setting_of(found: Survey, recipe: Recipe, seats: Mapping[ClientId, Seat]) -> Setting:
    """What a method is asked to run in."""
    federation = found.federation
    heads = {c: space_of(federation.task_of(c)) for c in federation.shards}
    head = recipe.adapter.head and any(space[0] != "causal-lm" for space in heads.values())
    kind = adapter_kind(recipe.adapter)
    how = training(recipe)
    return Setting(recipe.task.kind, kind, seats, found.bones.depth, head, heads, how)
