"""`flexp influence`: who a finished run that was observed would have been worse without.

The metric is the mean loss over all clients' own test rows. With e_c from the run's last state, a
client's change is the loss at theta + e_c less that at theta, so above 0 it helped the others; the
slope is the same to first order, by a central difference. A check trains again without the client,
everything else as it was: who trains when, on which batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import StatisticsError, correlation
from typing import Any

from flexp import assets, checkpoint, recipe_file
from flexp import run as running
from flexp.engine.base import assigned
from flexp.engine.local import LocalEngine
from flexp.engine.look import Look
from flexp.errors import FlexpError
from flexp.events import Stream
from flexp.recipe import StrategyRecipe
from flexp.stage import Say, Stage, prepare, with_method
from flexp.strategies.base import ClientId
from flexp.strategies.fed_influence import FedInfluence, Watched
from flexp.tensors import Tensors, add, norm

NEAR_BY = 0.1  # of e_c: how far the slope looks
Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Seen:
    """A finished run's stage and last state, and the method that observed it."""

    stage: Stage[LocalEngine]
    observer: FedInfluence
    state: Watched

    @cached_property
    def here(self) -> Metrics:
        """The metrics of the run as it was."""
        return self.metrics(self.state)

    def metrics(self, state: Watched) -> Metrics:
        """The mean of each metric over all clients' own test rows, each with a state's model."""
        stage, engine = self.stage, self.stage.engine
        turn, sums = running.after(stage, stage.recipe.rounds), dict[str, float]()
        clients = [c for c in stage.fleet.known(stage.recipe.rounds) if len(engine.shards[c].test)]
        work = [assigned(self.observer, engine, state, c, turn) for c in clients]
        rows = {c: len(engine.shards[c].test) for c in clients}
        for client, cells in engine.look(self.observer, work, turn, Look("test")).items():
            for metric, value in cells["own"].items():
                sums[metric] = sums.get(metric, 0.0) + value * rows[client] / sum(rows.values())
        return sums

    def row(self, client: ClientId) -> dict[str, Any]:
        """What is estimated of a client."""
        at = {t: self.metrics(self.observer.without(self.state, client, t)) for t in (1, -NEAR_BY)}
        ahead = self.metrics(self.observer.without(self.state, client, NEAR_BY))
        slope = (ahead["loss"] - at[-NEAR_BY]["loss"]) / (2 * NEAR_BY)
        return {
            "client": client,
            "turns": self.state.turns[client],
            "norm": self.length(self.state.shifts[client]),
            "slope": slope,
            "change": at[1]["loss"] - self.here["loss"],
            "without": dict(at[1]),
        }

    def length(self, shift: Tensors) -> float:
        """The length of what a run learned together would differ by."""
        return norm({k: shift[k] for k in self.state.of})

    def check(self, client: ClientId) -> dict[str, Any]:
        """The same of a run that was trained without it."""
        asked = self.observer.of
        told = {"name": asked} if isinstance(asked, str) else dict(asked)
        method = StrategyRecipe.model_validate(told)
        recipe = self.stage.recipe.model_copy(update={"strategy": method})
        stage = with_method(self.stage, recipe)
        try:
            state: Tensors = running.run(stage, Stream(), without=(client,)).state
            # Near parts that are clients' own are in their memories.
            seen = replace(self, stage=stage)
            found = seen.metrics(replace(self.state, of=state))
        finally:
            stage.engine.close()
        apart = self.length(add(state, self.state.of, -1.0))
        change = found["loss"] - self.here["loss"]
        return {"real_norm": apart, "real_change": change, "real_without": dict(found)}


def influence(
    folder: Path,
    cache: assets.Cache,
    *,
    check: Sequence[str] = (),
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Ranks the clients of a finished run, who helped most first; ``check`` has names, or "all"."""
    recipe = recipe_file.read(folder / "recipe.yaml")
    stage = prepare(recipe, cache, say=say)
    observer = stage.strategy
    if not isinstance(observer, FedInfluence):
        raise FlexpError(
            f"{folder} was not observed. Train it again with strategy.name=fed_influence "
            f"strategy.of={recipe.strategy.name}."
        )
    found = checkpoint.newest(folder / "checkpoint", recipe)
    if found is None or found[0] < recipe.rounds:
        raise FlexpError(f"{folder} is not finished. Go on with: flexp run --resume.")
    try:
        state: Watched = checkpoint.read(found[1], observer, stage.engine)
        seen = Seen(stage, observer, state)
        rows = [seen.row(client) for client in state.shifts]
        for row in checked(rows, check):
            say(f"training without {row['client']}")
            row.update(seen.check(row["client"]))
    finally:
        stage.engine.close()
    return {
        "out": str(folder),
        "method": observer.observed.name,
        "mode": observer.mode,
        "rounds": recipe.rounds,
        "higher_is_better": stage.federation.task.higher_is_better,
        "metrics": dict(seen.here),
        "rows": sorted(rows, key=lambda row: -row["change"]),
        "pearson": {
            "norm": pearson(rows, "norm", "real_norm"),
            "change": pearson(rows, "change", "real_change"),
            "slope": pearson(rows, "slope", "real_change"),
        },
    }


def checked(rows: Sequence[dict[str, Any]], asked: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of whom to train without; FlexpError for a client that was not watched."""
    known = {row["client"]: row for row in rows}
    names = list(known) if "all" in asked else list(dict.fromkeys(asked))
    if unknown := [name for name in names if name not in known]:
        raise FlexpError(f'--check: "{unknown[0]}" was not watched. Watched: {", ".join(known)}.')
    return [known[name] for name in names]


def pearson(rows: Sequence[Mapping[str, Any]], one: str, other: str) -> float | None:
    """The correlation over the clients that were checked; None of fewer than three, or if equal."""
    pairs = [(row[one], row[other]) for row in rows if other in row]
    if len(pairs) < 3:
        return None
    try:
        return correlation(*zip(*pairs, strict=True))
    except StatisticsError:
        return None
