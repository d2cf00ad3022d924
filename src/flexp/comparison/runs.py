"""Carries a comparison out: every method on every seed, in processes side by side, resumable.

All runs of a seed have one data set, one fleet of seats, one beginning of adapters and one order of
batches; methods differ in what their recipes say and in nothing else.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty
from typing import Any

import torch

from flexp import assets, commands, libraries, recipe_file
from flexp.comparison.table import Ground, of_run, summary
from flexp.errors import AdapterError, FlexpError, StrategyError
from flexp.model.adapter import layout
from flexp.model.skeleton import bare
from flexp.parcel import file_name, write_atomic
from flexp.plain import json_text
from flexp.plan.costs import near_bytes
from flexp.plan.declared import devices_of, server_of
from flexp.plan.devices import measure
from flexp.recipe import Recipe
from flexp.seating import adapter_kind, dtype_name
from flexp.stage import Say, Survey, opened, seats_for, survey, with_method
from flexp.strategies import build

LIBRARIES = 600_000_000  # bytes of a process before it opens a model
SHARE = 0.7  # of the memory that is free now, if no budget is given
RunId = tuple[int, str]  # a seed and a method's label
COMMON = ("seed", "data", "task", "model", "plan", "clients", "participation")  # of all runs


@dataclass(frozen=True)
class Plan:
    """What is compared: labels with what each changes in the recipe, seeds, and the means for it.

    ``memory`` bounds the processes that run side by side, in bytes. ``lenient`` leaves out what
    cannot run, with the reason, instead of refusing the whole comparison.
    """

    methods: Mapping[str, Mapping[str, Any]]
    seeds: tuple[int, ...] = (0, 1, 2)
    jobs: int | None = None
    memory: int | None = None
    resume: bool = False
    lenient: bool = False


@dataclass(frozen=True)
class Comparison:
    """A recipe, what is compared, and the folder of it all."""

    common: Recipe
    plan: Plan
    refused: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def folder(self) -> Path:
        """The folder with a folder for every run."""
        return Path(self.common.out) / f"{self.common.name}-compare"

    @property
    def wanted(self) -> list[RunId]:
        """All runs, seed by seed."""
        labels = [label for label in self.plan.methods if label not in self.refused]
        return [(seed, label) for seed in self.plan.seeds for label in labels]

    def place(self, run: RunId) -> Path:
        """The folder of one run."""
        seed, label = run
        return self.folder / file_name(label) / f"seed-{seed}"

    def recipe(self, run: RunId) -> Recipe:
        """The recipe of one run: the common one, its method, and what the plan changes for it."""
        seed, label = run
        changes = {"strategy.name": label, **self.plan.methods[label], "seed": seed}
        plain: dict[str, Any] = self.common.plain()
        if changes["strategy.name"] != plain["strategy"]["name"]:
            plain["strategy"] = {}  # the common options are another method's
        pairs = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
        return recipe_file.make(recipe_file.override(plain, pairs), f"method {label}")

    def done(self, run: RunId) -> bool:
        """Whether a run is finished; FlexpError if its folder holds another one."""
        path = self.place(run)
        try:
            result = json.loads((path / "result.json").read_text("utf-8"))
        except (OSError, ValueError):
            return False  # it goes on from its newest checkpoint, if there is one
        if result["recipe_hash"] != self.recipe(run).hash():
            raise FlexpError(
                f"{path} was made by another recipe. Compare with the recipe that it began with, "
                "or choose another folder with out=FOLDER."
            )
        return True


@dataclass(frozen=True)
class Share:
    """The runs of one process, and the threads that it may use."""

    comparison: Comparison
    runs: tuple[RunId, ...]
    assets: Path
    threads: int


def compare(
    recipe: Recipe, cache: assets.Cache, plan: Plan, *, say: Say = lambda text: None
) -> dict[str, Any]:
    """Runs what is not done yet and returns the table; FlexpError before anything starts."""
    whole = Comparison(recipe, plan)
    check_plan(whole)
    found = survey(recipe, cache, say=say)
    whole = Comparison(recipe, plan, refusals(whole, found))
    for label, why in whole.refused.items():
        say(f"{label} is left out. {why}")
    if not whole.wanted:
        raise FlexpError("None of these methods can run here. Name others with --methods.")
    todo = [run for run in whole.wanted if not whole.done(run)]
    if len(todo) < len(whole.wanted):
        say(f"{len(whole.wanted) - len(todo)} of {len(whole.wanted)} runs are done already")
    if todo:
        jobs = min(plan.jobs or side_by_side(found, plan.memory), len(todo))
        carry_out(whole, todo, jobs, cache.root, say)
    document = table(whole, found)
    write_atomic(whole.folder / "comparison.json", json_text(document, indent=1).encode())
    return document


def check_plan(whole: Comparison) -> None:
    """Raises FlexpError for what can be seen before any file is read."""
    plan = whole.plan
    if not plan.seeds or len(set(plan.seeds)) < len(plan.seeds):
        raise FlexpError("A comparison needs at least one seed, and each only once.")
    if not plan.methods:
        raise FlexpError("There is no method to compare. Name some with --methods.")
    for label, key in ((label, key) for label, held in plan.methods.items() for key in held):
        if key.partition(".")[0] in COMMON:
            raise FlexpError(
                f"{label}: {key} is the same for all methods of a comparison. Give it for all, as "
                f"in `flexp compare RECIPE {key}=...`."
            )
    runs = [whole.recipe((plan.seeds[0], label)) for label in plan.methods]
    for recipe in (whole.common, *runs):
        build(recipe.strategy.name, recipe.strategy.options)
    if whole.folder.exists() and not plan.resume:
        raise FlexpError(
            f"{whole.folder} holds a comparison already. Continue it with --resume, or choose "
            "another folder with out=FOLDER."
        )


def refusals(whole: Comparison, found: Survey) -> dict[str, str]:
    """Methods that cannot run here, and why; their error unless the plan is lenient."""
    refused: dict[str, str] = {}
    for label in whole.plan.methods:
        recipe = whole.recipe((whole.plan.seeds[0], label))
        strategy = build(recipe.strategy.name, recipe.strategy.options)
        try:
            seats_for(strategy, found, recipe)
            if recipe.adapter != whole.common.adapter:
                bones = bare(found.bones.config, recipe.task.kind, blocks_at=recipe.model.blocks_at)
                layout(bones.model, adapter_kind(recipe.adapter), bones.blocks_path, ())
        except (AdapterError, StrategyError) as problem:
            if not whole.plan.lenient:
                raise
            refused[label] = str(problem)
    return refused


def side_by_side(found: Survey, memory: int | None) -> int:
    """How many processes fit: as many as processors, within the memory budget, at least one."""
    whole = near_bytes(found.costs, found.bones.depth, 0)
    client = whole["adapters"] + whole.get("cache", 0)
    each = LIBRARIES + whole["total"] + len(found.placed) * client
    budget = int(SHARE * measure().memory) if memory is None else memory
    return max(1, min(os.cpu_count() or 1, budget // each))


def carry_out(whole: Comparison, todo: Sequence[RunId], jobs: int, root: Path, say: Say) -> None:
    """Shares the runs among processes; the first error is raised once all have stopped."""
    threads = 1 if whole.common.mode == "exact" else max(1, (os.cpu_count() or 1) // jobs)
    cuts = [len(todo) * n // jobs for n in range(jobs + 1)]
    shares = [Share(whole, tuple(todo[a:b]), root, threads) for a, b in itertools.pairwise(cuts)]
    say(f"{len(todo)} runs, {jobs} at a time")
    spawn = multiprocessing.get_context("spawn")
    with (
        spawn.Manager() as manager,
        ProcessPoolExecutor(jobs, mp_context=spawn, initializer=quiet) as pool,
    ):
        told = manager.Queue()
        futures = [pool.submit(work, share, told.put) for share in shares]
        _listen(futures, told.get, say)
        for future in futures:
            future.result()


def quiet() -> None:
    """Keeps a library's notes of a process of ours off the terminal."""
    logging = libraries.transformers().logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _listen(futures: Sequence[Future[None]], get: Callable[..., str], say: Say) -> None:
    over = False
    while not over:
        over = all(f.done() for f in futures)
        try:
            while True:
                say(get(timeout=0.1 if over else 0.5))
        except Empty:
            continue


def work(share: Share, tell: Callable[[str], None]) -> None:
    """The runs of one process, seed by seed; each seed's model and data are opened once."""
    torch.set_num_threads(share.threads)
    whole, cache = share.comparison, assets.Cache(share.assets)
    for seed in dict.fromkeys(seed for seed, _ in share.runs):
        first = opened(survey(whole.common.model_copy(update={"seed": seed}), cache))
        try:
            for run in (run for run in share.runs if run[0] == seed):
                stage = with_method(first, whole.recipe(run))
                stage.engine.measures = True
                document = commands.carry_out(
                    stage, [], out=whole.place(run), resume=True, adapters=False
                )
                tell(f"{run[1]}, seed {seed}: {_said(document)}")
        finally:
            first.engine.close()


def _said(document: Mapping[str, Any]) -> str:
    metric: str = document["rows"][0]["metric"]  # the main one comes first
    means = {
        r["cell"].split("/")[1]: r["value"]
        for r in document["rows"]
        if r["client"] == "all" and r["metric"] == metric
    }
    words = {"own": "own", "global": "everybody's"}
    return f"{metric} " + ", ".join(f"{means[k]:.4g} {w}" for k, w in words.items() if k in means)


def table(whole: Comparison, found: Survey) -> dict[str, Any]:
    """The document of a comparison whose runs are all finished."""
    asked, dtype = whole.common.plan, dtype_name(whole.common)
    devices = devices_of(asked, list(found.placed), dtype)
    ground = Ground(devices, server_of(asked, dtype).flops, found.costs)
    rows = [row for run in whole.wanted for row in of_run(whole.place(run), run[1], run[0], ground)]
    first = json.loads((whole.place(whole.wanted[0]) / "result.json").read_text("utf-8"))
    return {
        "name": whole.common.name,
        "metric": rows[0]["metric"],
        "higher_is_better": first["higher_is_better"],
        "mode": whole.common.mode,
        "seeds": list(whole.plan.seeds),
        "facts": first["facts"],
        "methods": {label: dict(changes) for label, changes in whole.plan.methods.items()},
        "refused": dict(whole.refused),
        "out": str(whole.folder),
        "summary": summary(rows, higher=first["higher_is_better"]),
        "rows": rows,
    }
