"""The quick demo: four methods on the same clients, data, devices and number of steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from flexp import assets, recipe_file
from flexp import run as running
from flexp.errors import RecipeError
from flexp.events import Event, Sink, Stream, TurnEnded
from flexp.recipe import Recipe
from flexp.stage import Say, Stage, prepare, with_method

OUT = Path("runs/demo")


class Show(Protocol):
    """Where progress goes: a sink for each run."""

    def begin(self, title: str, rounds: int) -> Sink: ...


def shipped(name: str) -> Path:
    """A recipe that comes with the program: beside the package, or in a checkout."""
    here = Path(__file__).parent
    for folder in (here / "recipes", here.parents[1] / "recipes"):
        if (folder / name).is_file():
            return folder / name
    raise RecipeError(f'The recipe "{name}" is not installed with this copy of flexp.')


def variants(seed: int) -> dict[str, Recipe]:
    """The demo's recipe for each method: the common file, and what differs, tuned for each."""
    common = recipe_file.parse(shipped("quick.yaml").read_text(encoding="utf-8"), "quick.yaml")
    file = "quick.methods.yaml"
    differing = recipe_file.parse(shipped(file).read_text(encoding="utf-8"), file)
    out: dict[str, Recipe] = {}
    for name, changes in differing.items():
        own: Mapping[str, Any] = changes
        pairs = [f"strategy.name={name}", f"seed={seed}"]
        pairs += [f"{key}={value}" for key, value in own.items()]
        out[name] = recipe_file.make(recipe_file.override(common, pairs), "quick.yaml")
    return out


def play(cache: assets.Cache, show: Show, *, say: Say, seed: int = 0) -> dict[str, Any]:
    """Runs every method and returns seats and scores; writes the personal adapters of flexp."""
    recipes = variants(seed)
    opened = prepare(recipes["flexp"], cache, say=say)
    stages = {name: with_method(opened, recipe) for name, recipe in recipes.items()}
    traffic: dict[str, Counter[str]] = {name: Counter() for name in recipes}

    def one(name: str) -> running.Result:
        stream = Stream()
        for sink in (show.begin(name, recipes[name].rounds), _counting(traffic[name])):
            stream.subscribe(sink)
        return running.run(stages[name], stream)

    try:
        # Two methods at a time, each on one thread, use two cores better than one on two.
        with ThreadPoolExecutor(2) as pool:
            results = dict(zip(recipes, pool.map(one, recipes), strict=True))
        running.save_adapters(stages["flexp"], results["flexp"], OUT / "adapters")
    finally:
        for stage in (opened, *stages.values()):
            stage.engine.close()
    rows = [row for name, r in results.items() for row in running.rows(r.scores, name, seed)]
    return {
        "methods": list(recipes),
        "metric": opened.federation.task.metric,
        "seed": seed,
        "seats": _seats(opened, traffic["flexp"]),
        "bytes": {name: dict(count) for name, count in traffic.items()},
        "says": _says(opened),
        "rows": rows,
    }


def _counting(count: Counter[str]) -> Sink:
    def sink(event: Event) -> None:
        if isinstance(event, TurnEnded):
            count[f"{event.client}/sent"] += event.sent_bytes
            count[f"{event.client}/received"] += event.received_bytes

    return sink


def _seats(stage: Stage, traffic: Mapping[str, int]) -> list[dict[str, Any]]:
    depth = stage.backbone.depth
    out: list[dict[str, Any]] = []
    for client, placed in stage.placed.items():
        cut = placed.seat.cut
        first = stage.federation.shards[client].train.origins[0]
        out.append(
            {
                "client": client,
                "about": Path(first.rpartition(":")[0]).stem,
                "device": placed.device,
                "front": cut.front,
                "server_blocks": depth - cut.front - cut.back,
                "back": cut.back,
                "bytes": placed.bytes,
                "sent": traffic.get(f"{client}/sent", 0),
                "received": traffic.get(f"{client}/received", 0),
            }
        )
    return out


def _says(stage: Stage) -> list[str]:
    recipe = stage.recipe
    steps = recipe.rounds * (recipe.train.steps or 0)
    return [
        f"Every method: {steps} steps of {recipe.train.batch} texts per client, each with its own "
        "tuned learning rate. Memory and bytes are those of flexp.",
        "In this run the server computes the tail and the head: texts, labels and the loss stay on "
        "the devices, but from logits and their gradient the server can work the labels out.",
        "flexp: the adapters of a device's own blocks never left it. local: nobody learns from "
        "others. fedavg: every device uploads the adapters of its own blocks.",
        f"Personal adapters of flexp: {OUT / 'adapters'}. Try: "
        f'flexp predict {OUT / "adapters" / "client-0"} "what a lovely day"',
    ]
