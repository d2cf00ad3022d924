"""What a server knows of a run before any weight is read, and the stage that it is played on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from flexp import assets
from flexp.data.columns import in_order
from flexp.data.examples import Examples, Shard
from flexp.data.federation import Federation, make_task
from flexp.data.tasks import Task
from flexp.data.tokens import padding_of
from flexp.dice import Dice
from flexp.engine.guests import Policy
from flexp.engine.network import NetworkEngine
from flexp.errors import LinkError, RecipeError, StrategyError
from flexp.fleet import Fleet, fleet
from flexp.model.adapter import Kind
from flexp.model.backbone import Backbone
from flexp.model.reader import open_reader
from flexp.model.skeleton import Skeleton, skeleton
from flexp.own_models import named
from flexp.own_tasks import classes_of, own_costs
from flexp.plan.costs import BlockCosts, near_bytes
from flexp.planning import measured
from flexp.privacy.egress import check_labels
from flexp.recipe import Recipe
from flexp.seating import Placed, adapter_kind, costs, dtype_of, quantize_of, work
from flexp.serving.roster import Entry, Roster, planned
from flexp.stage import Say, Stage, Survey, check_ahead, seats_for, training
from flexp.strategies import build
from flexp.strategies.base import ClientId, Strategy

LABELS, LONGEST = 4096, 500  # of one client, and characters of one


@dataclass(frozen=True)
class Floor:
    """The recipe, the model's folder and skeleton, and what its blocks cost."""

    recipe: Recipe
    strategy: Strategy[Any]
    source: Path
    tokenizer: Any
    bones: Skeleton
    kind: Kind
    costs: BlockCosts

    def survey(
        self, recipe: Recipe, entries: Mapping[ClientId, Entry], *, draft: bool = False
    ) -> Survey:
        """Where these clients sit, by what they said of themselves.

        For a draft, before all have come, two labels stand for those that are not known yet.
        """
        labels = labels_of(self.recipe, entries)
        if draft and len(labels) < 2 and recipe.task.kind != "causal-lm":
            labels = ("one", "other")
        task = make_task(recipe.task, recipe.data, self.tokenizer, labels)
        own = {
            client: self._own_task(client, entry, task)
            for client, entry in entries.items()
            if self.has_own(client)
        }
        shards = {client: Shard(Examples()) for client in sorted(entries)}
        federation = Federation(shards, task, (), None, own)
        sized = own_costs(recipe, self.source, federation)
        working = partial(work, recipe, self.bones, self.kind)
        seated = fleet(recipe, {c: sized.get(c, self.costs) for c in shards}, working)
        return Survey(
            recipe,
            self.source,
            self.tokenizer,
            federation,
            classes_of(task),
            self.bones,
            self.kind,
            self.costs,
            seated,
            Dice(recipe.seed),
            sized,
        )

    def measured(self) -> dict[str, Any]:
        """This machine's speed in a block and its free memory, as a recipe declares a server."""
        here = measured(self.recipe, self.bones)
        return {"gflops": (here.flops or 0.0) / 1e9, "memory": here.memory}

    def propose(
        self, name: ClientId, roster: Roster, entry: Entry
    ) -> tuple[Placed, Mapping[str, int]]:
        """Where a client would sit among those who are there, and its bytes by part."""
        entries = {**roster.entries, name: entry}
        if roster.started:  # the others sit where they sit
            entries = {name: entry}
        recipe = planned(self.recipe, entries, roster.server)
        found = self.survey(recipe, entries, draft=True)
        placed = found.placed[name]
        seat, sized = placed.seat, found.own_costs.get(name, self.costs)
        parts = near_bytes(
            sized,
            seat.cut.front,
            seat.cut.back,
            head_near=seat.labels == "keep",
            recompute=seat.recompute,
            accumulate=seat.accumulate,
        )
        return placed, parts

    def has_own(self, client: ClientId) -> bool:
        asked = self.recipe.clients.get(client)
        return asked is not None and any((asked.task, asked.label))

    def _own_task(self, client: ClientId, entry: Entry, shared: Task) -> Task:
        kind: Any = entry.space[0] if entry.space else self.recipe.task.kind
        asked = self.recipe.clients[client].task
        told = (
            self.recipe.task
            if asked is None
            else self.recipe.task.model_copy(update=asked.model_dump(exclude_none=True))
        )
        labels = entry.space[1:] or (() if kind == "causal-lm" else ("one", "other"))
        told = told.model_copy(update={"kind": kind, "labels": labels})
        return make_task(told, self.recipe.data, self.tokenizer, labels)


def floor_of(recipe: Recipe, cache: assets.Cache, say: Say) -> Floor:
    """Reads the model's config; raises a FlexpError for what cannot run over a network."""
    strategy = build(recipe.strategy.name, recipe.strategy.options)
    check_ahead(strategy, recipe)
    if strategy.kind == "centralised":
        raise StrategyError(
            f'Method "{strategy.name}" puts all rows in one place, so it does not run over a '
            "network. Use `flexp run`, or another method."
        )
    if strategy.probes:
        raise StrategyError(
            f'Method "{strategy.name}" needs a probe, a whole small model, at every client, which '
            "nothing brings there over a network yet. Use `flexp run`, or another method."
        )
    if named(recipe):
        raise RecipeError(
            "clients.NAME.model: over a network all clients have the run's model so far. Remove "
            "it, or use `flexp run`."
        )
    if any(held.alone for held in recipe.participation.values()):
        raise RecipeError(
            "participation: over a network nobody can be told to be alone. Remove alone, or use "
            "`flexp run`."
        )
    check_labels(recipe.plan.labels, recipe.privacy.profile, text=recipe.task.kind == "causal-lm")
    source = assets.resolve(recipe.model.source, cache, revision=recipe.model.revision, say=say)
    bones = skeleton(source, recipe.task.kind, blocks_at=recipe.model.blocks_at)
    kind = adapter_kind(recipe.adapter)
    sized = costs(recipe, bones, kind)
    return Floor(
        recipe, strategy, source, open_reader(source, recipe.task.kind), bones, kind, sized
    )


def labels_of(recipe: Recipe, entries: Mapping[ClientId, Entry]) -> tuple[str, ...]:
    """The labels of the recipe's task: its own, else all that clients with that task have."""
    if recipe.task.kind == "causal-lm" or recipe.task.labels:
        return recipe.task.labels
    own = {c for c, asked in recipe.clients.items() if asked.task or asked.label}
    names = {label for c, e in entries.items() if c not in own for label in e.space[1:]}
    return in_order(names)


def _check_space(recipe: Recipe, name: ClientId, space: tuple[str, ...]) -> None:
    asked, labels = recipe.clients.get(name), space[1:]
    own = None if asked is None or asked.task is None else asked.task.kind
    if not space or space[0] not in (recipe.task.kind, own):
        raise LinkError(f"{name} has no rows of this run's kind of task, {recipe.task.kind}.")
    if len(labels) > LABELS or any(not 0 < len(label) <= LONGEST for label in labels):
        raise LinkError(
            f"{name} has {len(labels)} labels; a run takes {LABELS} of at most {LONGEST} "
            "characters. Is the recipe's data.label the column of the labels?"
        )
    if len(set(labels)) < len(labels):
        raise LinkError(f"{name} names a label twice.")


def space_in(
    floor: Floor, roster: Roster, name: ClientId, space: tuple[str, ...]
) -> tuple[str, ...]:
    """A client's kind of task and labels; those of a run that has begun stay as they are.

    LinkError for what no rows have: it would be on disk, and no server could begin with it.
    """
    _check_space(floor.recipe, name, space)
    entries, own = roster.members(), floor.has_own(name)
    member = name in entries
    if not roster.started or (own and not member):
        return space
    labels = entries[name].space[1:] if own else labels_of(floor.recipe, entries)
    if new := sorted(set(space[1:]) - set(labels)):
        raise LinkError(
            f"The run has begun with the labels {', '.join(labels)}, and these rows have "
            f'"{new[0]}" too. Leave such rows out, or wait for another run.'
        )
    return entries[name].space if member else space


def open_stage(
    floor: Floor,
    roster: Roster,
    opened: Callable[[Stage[NetworkEngine]], None],
    *,
    policy: Policy,
    say: Say,
) -> Stage[NetworkEngine]:
    """Loads the blocks of the server and seats everybody who is in the run.

    ``opened`` hears of every later stage on which more clients sit than before.
    """
    entries = roster.members()
    recipe = planned(floor.recipe, entries, roster.server)
    found = floor.survey(recipe, entries)
    seated = seats_for(floor.strategy, found, recipe)
    say(f"loading {recipe.model.source}")
    backbone = Backbone.open(
        floor.source,
        task=recipe.task.kind,
        classes=found.classes,
        seed=recipe.seed,
        dtype=dtype_of(recipe),
        quantize=quantize_of(recipe),
        device=recipe.model.device,
        blocks_at=recipe.model.blocks_at,
        name=recipe.model.source,
        pad=padding_of(floor.tokenizer),
        outside=recipe.plan.labels != "keep",
    )
    engine = NetworkEngine(
        backbone,
        found.federation.task,
        kind=floor.kind,
        training=training(recipe),
        dice=found.dice,
        run=floor.recipe.hash()[:12],
        tasks=found.federation.own,
        together=recipe.mode == "fast",
        policy=policy,
    )
    renew = partial(_renewed, floor, roster, opened)
    return Stage(found, recipe, floor.strategy, backbone, seated, engine, renew)


def _renewed(
    floor: Floor,
    roster: Roster,
    opened: Callable[[Stage[NetworkEngine]], None],
    stage: Stage[NetworkEngine],
    round: int,
) -> Stage[NetworkEngine]:
    """The stage with those who came since: they are there from this round on."""
    late = roster.take_in(stage.fleet.placed, round)
    if not late:
        return stage
    roster.write(floor.recipe)
    stage = added(floor, stage, dict(sorted(late.items())))
    recipe = planned(floor.recipe, roster.members(), roster.server)
    stage = replace(stage, recipe=recipe)
    opened(stage)
    return stage


def added(
    floor: Floor, stage: Stage[NetworkEngine], fresh: Mapping[ClientId, Entry]
) -> Stage[NetworkEngine]:
    """The stage with more clients; those who are there sit where they sit."""
    rounds = max(floor.recipe.rounds, *(e.joins + 1 for e in fresh.values()))
    recipe = floor.recipe.model_copy(update={"rounds": rounds})
    told = stage.recipe.plan.server
    server = None if told is None else told.model_dump(mode="json")
    found = floor.survey(planned(recipe, fresh, server), fresh)
    seats = seats_for(floor.strategy, found, found.recipe)
    known = stage.survey.federation
    federation = replace(
        known,
        shards={**known.shards, **found.federation.shards},
        own={**known.own, **found.federation.own},
    )
    stage.engine.tasks = federation.own
    joined = Fleet(
        {**stage.fleet.placed, **seats.placed},
        (*stage.fleet.moves, *seats.moves),
        {**stage.fleet.presence, **seats.presence},
        stage.fleet.solo,
    )
    return replace(stage, survey=replace(stage.survey, federation=federation), fleet=joined)
