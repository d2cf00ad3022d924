"""The quick demo: four methods on the same clients, data, devices and number of steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from flexp import assets, recipe_file
from flexp import run as running
from flexp.errors import RecipeError
from flexp.events import Event, RunStarted, Sink, Stream, TurnEnded
from flexp.recipe import Recipe
from flexp.stage import Say, Stage, prepare, with_method

OUT = Path("runs/demo")


class Show(Protocol):
    """Where progress goes: a sink that is told of each run beforehand."""

    def begin(self, title: str, rounds: int) -> None: ...
    def __call__(self, event: Event) -> None: ...


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
    stage = prepare(recipes["flexp"], cache, say=say)
    rows: list[dict[str, Any]] = []
    traffic: dict[str, Counter[str]] = {}
    for name, recipe in recipes.items():
        mine = with_method(stage, recipe)
        show.begin(name, recipe.rounds)
        traffic[name] = Counter()
        stream = Stream()
        for sink in (_quiet_start(show), _counting(traffic[name])):
            stream.subscribe(sink)
        try:
            result = running.run(mine, stream)
            rows += running.rows(result.scores, name, seed)
            if name == "flexp":
                running.save_adapters(mine, result, OUT / "adapters")
        finally:
            mine.engine.close()
    stage.engine.close()
    return {
        "methods": list(recipes),
        "seed": seed,
        "seats": _seats(stage, traffic["flexp"]),
        "bytes": {name: dict(count) for name, count in traffic.items()},
        "says": _says(stage),
        "rows": rows,
    }


def _quiet_start(show: Show) -> Sink:
    """Passes progress on; seats are in the table at the end, once and not per method."""

    def sink(event: Event) -> None:
        if not isinstance(event, RunStarted) and type(event).__name__ != "SeatTaken":
            show(event)

    return sink


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
        "flexp: raw texts, labels, heads and the adapters of each device's own blocks never left "
        "it. local: nobody learns from others. fedavg: every device uploads its whole adapter.",
        f"Personal adapters of flexp: {OUT / 'adapters'}. Try: "
        f'flexp predict {OUT / "adapters" / "client-0"} "what a lovely day"',
    ]
