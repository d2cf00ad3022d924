"""The demos: four methods on the same clients, data, devices and number of steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import yaml

from flexp import assets, commands, planning, recipe_file, voices
from flexp import run as running
from flexp.data.tokens import open_tokenizer
from flexp.engine.base import assigned
from flexp.engine.local import LocalEngine
from flexp.errors import RecipeError
from flexp.events import Event, Recorder, Sink, Stream, TurnEnded
from flexp.link.metered import Ledger
from flexp.parcel import file_name, write_atomic
from flexp.privacy import attack
from flexp.recipe import Recipe
from flexp.rows import read_rows
from flexp.stage import Say, Stage, opened, survey, with_method
from flexp.threads import adopt

OUT = Path("runs")


@dataclass(frozen=True)
class Demo:
    """A demo: the name of its recipes, how many methods run at a time, and what it shows last."""

    name: str
    side_by_side: int
    closing: Callable[[Stage[LocalEngine], running.Result, Path, assets.Cache], dict[str, Any]]


class Show(Protocol):
    """Where progress goes: a sink for each run, and the fleet before anything is trained."""

    def begin(self, title: str, rounds: int) -> Sink: ...
    def fleet(self, document: Mapping[str, Any]) -> None: ...


def shipped(name: str) -> Path:
    """A recipe that comes with the program: beside the package, or in a checkout."""
    here = Path(__file__).parent
    for folder in (here / "recipes", here.parents[1] / "recipes"):
        if (folder / name).is_file():
            return folder / name
    raise RecipeError(f'The recipe "{name}" is not installed with this copy of flexp.')


def variants(demo: str, seed: int) -> dict[str, Recipe]:
    """A demo's recipe for each method: the common file, and what differs, tuned for each."""
    name = f"{demo}.yaml"
    common = recipe_file.parse(shipped(name).read_text(encoding="utf-8"), name)
    file = f"{demo}.methods.yaml"
    differing = recipe_file.parse(shipped(file).read_text(encoding="utf-8"), file)
    out: dict[str, Recipe] = {}
    for method, changes in differing.items():
        own: Mapping[str, Any] = changes
        pairs = [f"strategy.name={method}", f"seed={seed}"]
        pairs += [f"{key}={value}" for key, value in own.items()]
        out[method] = recipe_file.make(recipe_file.override(common, pairs), name)
    return out


def play(
    demo: Demo, cache: assets.Cache, show: Show, *, say: Say, clock: Callable[[], float], seed: int
) -> dict[str, Any]:
    """Runs every method and returns seats and scores; writes events, report and adapters."""
    recipes = variants(demo.name, seed)
    found = survey(recipes["flexp"], cache, say=say)
    show.fleet(planning.fleet(found))
    first = opened(found)
    stages = {name: with_method(first, recipe) for name, recipe in recipes.items()}
    traffic: dict[str, Counter[str]] = {name: Counter() for name in recipes}
    out = OUT / f"demo-{demo.name}"

    def one(name: str) -> running.Result:
        stream = Stream()
        with Recorder(out / name / "events.jsonl", clock) as recorder:
            recorder.clear()
            plain = yaml.safe_dump(recipes[name].plain(), sort_keys=False)
            write_atomic(out / name / "recipe.yaml", plain.encode())
            for sink in (
                recorder,
                _counting(traffic[name]),
                show.begin(name, recipes[name].rounds),
            ):
                stream.subscribe(sink)
            return running.run(stages[name], stream)

    with ExitStack() as stack:
        for stage in (first, *stages.values()):
            stack.callback(stage.engine.close)
        with ThreadPoolExecutor(demo.side_by_side, initializer=adopt) as pool:
            results = dict(zip(recipes, pool.map(one, recipes), strict=True))
        running.save_adapters(results["flexp"], out / "adapters")
        folders = [out / name for name in recipes]
        rows = [row for name, r in results.items() for row in running.rows(r.scores, name, seed)]
        return {
            "methods": list(recipes),
            "metric": first.federation.task.metric,
            "seed": seed,
            "seats": _seats(first, traffic["flexp"]),
            "bytes": {name: dict(count) for name, count in traffic.items()},
            "report": commands.write_report(folders, out / "report.html")["out"],
            "rows": rows,
            **demo.closing(stages["flexp"], results["flexp"], out, cache),
        }


def _counting(count: Counter[str]) -> Sink:
    def sink(event: Event) -> None:
        if isinstance(event, TurnEnded):
            count[f"{event.client}/sent"] += event.sent_bytes
            count[f"{event.client}/received"] += event.received_bytes
            for kind, size in event.kinds.items():
                count[f"{event.client}/{kind}"] += int(cast("int", size))

    return sink


def _seats(stage: Stage[LocalEngine], traffic: Mapping[str, int]) -> list[dict[str, Any]]:
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
                "left": _left(client, traffic),
            }
        )
    return out


def _left(client: str, traffic: Mapping[str, int]) -> dict[str, int]:
    """Bytes that left a client, by kind of tensor."""
    stem = f"{client}/up "
    return {k.removeprefix(stem): v for k, v in sorted(traffic.items()) if k.startswith(stem)}


def _same(stage: Stage[LocalEngine], what: str) -> str:
    recipe = stage.recipe
    steps = recipe.rounds * (recipe.train.steps or 0)
    return (
        f"Every method: {steps} steps of {recipe.train.batch} {what} per client, each with its own "
        "tuned learning rate. Devices are declared and simulated in one process; memory is what "
        "the plan predicts, and memory and bytes are those of flexp."
    )


_WHO = (
    "flexp: the adapters of a device's own blocks never left it. local: nobody learns from "
    "others. fedavg: every device uploads the adapters of its own blocks."
)


def _quick(
    stage: Stage[LocalEngine], result: running.Result, out: Path, cache: assets.Cache
) -> dict[str, Any]:
    del result, cache
    return {
        "says": [
            _same(stage, "texts"),
            "Texts, labels, logits and the head stay on the devices; the gradients that come to "
            "the server still tell it most labels. One seed and few rows say little: the "
            "README has three seeds of more.",
            _WHO,
            f"Personal adapters of flexp: {out / 'adapters'}. Try: "
            f'flexp predict {out / "adapters" / "client-0"} "what a lovely day"',
        ]
    }


QUICK = Demo("quick", 2, _quick)

PROMPT = "Horatio: My lord, what do you fear?\n"
SPEAKERS = ("Hamlet (Hamlet)", "Falstaff (Henry IV, Part 2)")
LENGTH, PUBLIC = 24, 96  # tokens of the sentence under attack; public texts of twice that length


def _shakespeare(
    stage: Stage[LocalEngine], result: running.Result, out: Path, cache: assets.Cache
) -> dict[str, Any]:
    """One prompt continued by three, what Hamlet's device gave away, and how to open an adapter."""
    folders = [out / "adapters" / file_name(name) for name in SPEAKERS]
    said = voices.open_voices(folders, cache)
    answers: dict[str, str] = {}
    for name in (voices.BASE, *said.names):
        role = "Hamlet" if name == voices.BASE else name.partition(" (")[0]
        answers |= said.speak(f"{PROMPT}{role}:", tokens=32, only=(name,))
    return {
        "prompt": PROMPT.strip(),
        "voices": answers,
        "leak": leak(stage, result, SPEAKERS[0], cache),
        "says": [
            _same(stage, "speeches"),
            "U-shape: text, labels, loss and head stayed on the devices. " + _WHO,
            "Open an adapter with plain PEFT:",
            "  from transformers import AutoModelForCausalLM; from peft import PeftModel",
            f'  model = AutoModelForCausalLM.from_pretrained("{stage.survey.source}")',
            f'  model = PeftModel.from_pretrained(model, "{folders[0]}")',
            f'Or talk to it: flexp chat "{folders[0]}" --frame "Horatio: {{text}}\\nHamlet:"',
        ],
    }


def leak(
    stage: Stage[LocalEngine], result: running.Result, client: str, cache: assets.Cache
) -> dict[str, Any]:
    """One speech that a curious server recovers from the hidden states of a client's front.

    The attacker's own text is what other roles say, of whom nobody takes part.
    """
    task = stage.federation.task
    work = assigned(stage.strategy, stage.engine, result.state, client, result.turn)
    with stage.engine.visit(stage.strategy, work, result.turn, Ledger()) as (desk, _):
        test = desk.shard.test
        batch = task.collate(test, [max(range(len(test)), key=lambda n: len(test.ids[n]))])
        with torch.no_grad():
            hidden = desk.model.hidden(batch, at="cut")[0]
    true = batch.inputs["input_ids"][0, :LENGTH]
    others = [
        row
        for row in read_rows(stage.recipe, cache, lambda text: None)
        if row.fields["role"] not in stage.placed
    ]
    ids = [i for text in task.encode(others[: 40 * PUBLIC]).ids for i in text]
    public = torch.tensor(ids[: 2 * LENGTH * PUBLIC]).reshape(-1, 2 * LENGTH)
    front = stage.seats[client].cut.front
    found = attack.recover(stage.backbone, hidden[:LENGTH], front=front, public=public)
    tokenizer: Any = open_tokenizer(stage.survey.source)
    return {
        "client": client,
        "front": front,
        "said": tokenizer.decode(true),
        "recovered": tokenizer.decode(found),
        "rate": attack.rate(found, true),
    }


SHAKESPEARE = Demo("shakespeare", 1, _shakespeare)
