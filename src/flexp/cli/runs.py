"""Commands that read a recipe: demo, run, compare, plan, doctor; and report."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from flexp.cli.base import Json, Overrides, RecipePath, app, begin, cache, emit
from flexp.errors import PlanError


@app.command()
def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="MiniLM on VADER, in about two minutes.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of data, heads and batches.")] = 0,
    as_json: Json = False,
) -> None:
    """Eight Shakespeare roles fine-tune their own SmolLM2, each on a device of its own size."""
    # The quick one runs two methods side by side, on one thread each.
    console = begin(as_json, "exact" if quick else "fast")
    from flexp import demonstration, live, terminal

    which = demonstration.QUICK if quick else demonstration.SHAKESPEARE
    with live.Live(console) as shown:
        document = demonstration.play(
            which, cache(), shown, say=shown.say, clock=time.time, seed=seed
        )
    if as_json:
        emit(document)
    else:
        terminal.show_demo(document, console)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="The folder of a run or of a server.")],
    as_json: Json = False,
) -> None:
    """Looks whether a run's checkpoints and its audit log are as they were written.

    Ends with 1 if something is not.
    """
    console = begin(as_json)
    from flexp import commands, terminal

    document = commands.verify(folder)
    if as_json:
        emit(document)
    else:
        terminal.show_verified(document, console)
    if document["problems"]:
        raise typer.Exit(1)


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after the newest checkpoint.")
    ] = False,
    replay: Annotated[
        Path | None,
        typer.Option(help="Folder of a finished run whose order without barrier is repeated."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Trains every client's personal model as a recipe says; ends with a PEFT adapter for each."""
    from flexp import recipe_file as recipes

    found = recipes.read(recipe, overrides or [])
    console = begin(as_json, found.mode)
    from flexp import commands, live, terminal

    with live.Live(console) as shown:
        bar = shown.begin(found.strategy.name, found.rounds)
        document = commands.run(found, cache(), [bar], resume=resume, replay=replay, say=shown.say)
    if as_json:
        emit(document)
    else:
        terminal.show_run(document, console)


@app.command()
def influence(
    folder: Annotated[Path, typer.Argument(help="The folder of a run of fed_influence.")],
    check: Annotated[
        list[str] | None,
        typer.Option(help='Train again without this client, or "all"; may be repeated.'),
    ] = None,
    as_json: Json = False,
) -> None:
    """Ranks the clients of a finished run by what everybody would have lost without each.

    With --check it also trains without them, and tells how the estimates correlate with that.
    """
    from flexp import recipe_file as recipes

    console = begin(as_json, recipes.read(folder / "recipe.yaml").mode)
    from flexp import influence as ranking
    from flexp import terminal

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    document = ranking.influence(folder, cache(), check=check or [], say=say)
    if as_json:
        emit(document)
    else:
        terminal.show_influence(document, console)


@app.command()
def compare(
    recipe: RecipePath,
    overrides: Overrides = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help='As "local,fedavg,flexp", or "all", or a YAML file of labels with what each '
            "changes. Without it: RECIPE.methods.yaml beside the recipe, else base, local, fedavg "
            "and the recipe's own."
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of data, beginnings and batches.")] = "0,1,2",
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Processes side by side; else what fits.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Memory for all processes, as 8GB; else 70 % of what is free."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Do what is not done yet.")] = False,
    as_json: Json = False,
) -> None:
    """Runs several methods on the same clients, data and seats, over seeds, and shows one table."""
    from flexp import recipe_file as recipes

    found = recipes.read(recipe, overrides or [])
    console = begin(as_json, found.mode)
    from flexp import comparison, terminal

    plan = comparison.Plan(
        comparison.asked(found, recipe, methods),
        comparison.seeds_of(seeds),
        jobs,
        comparison.bytes_of(memory),
        resume,
        lenient=methods == "all",
    )

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    document = comparison.compare(found, cache(), plan, say=say)
    if as_json:
        emit({"command": shlex.join(["flexp", *sys.argv[1:]]), **document})
    else:
        terminal.show_compare(document, console)


@app.command()
def plan(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe in YAML.")] = None,
    overrides: Overrides = None,
    model: Annotated[
        str | None,
        typer.Option(help="Instead of a recipe: an asset, a folder or a hub id."),
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(help='With --model: a profile, as phone-4gb, or "here"; may be repeated.'),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows of a step.")] = 8,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = 128,
    rank: Annotated[int, typer.Option(min=1, help="Of LoRA.")] = 8,
    task: Annotated[
        str | None, typer.Option(help="classification, causal-lm or images; else by the model.")
    ] = None,
    labels: Annotated[str, typer.Option(help="keep, logits or loss.")] = "keep",
    server: Annotated[str, typer.Option(help='A profile, or "here".')] = "gpu-server",
    goal: Annotated[
        str | None, typer.Option(help="optimized, memory_only or static; else optimized.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    quantize: Annotated[
        str, typer.Option(help="Of linear maps in blocks: none, int8 or nf4.")
    ] = "none",
    every: Annotated[bool, typer.Option("--all", help="Show every cut.")] = False,
    as_json: Json = False,
) -> None:
    """Shows what would run on each device, its memory, time and bytes, before any training.

    With a recipe: every client's seat. With --model and --device: every cut of that model on those
    devices, which fit, and which one to take; no data is needed, and no weights are read.
    """
    from flexp import planning, terminal
    from flexp import recipe_file as recipes

    if (model is None) == (recipe is None):
        raise PlanError("Give a recipe, or --model with --device, as: --model minilm --device here")
    console = begin(as_json)
    if recipe is not None:
        document = planning.of_recipe(recipes.read(recipe, overrides or []), cache())
    else:
        devices = tuple(device or ())
        how: dict[str, Any] = {"task": task, "labels": labels, "goal": goal}
        how |= {"dtype": dtype, "quantize": quantize}
        sizes = {"batch": batch, "length": length, "rank": rank}
        asked = planning.Asked(str(model), devices, server=server, **sizes, **how)
        document = planning.of_model(asked, cache())
    if as_json:
        emit(document)
    elif recipe is not None:
        terminal.show_plan(document, console)
    else:
        terminal.show_cuts(document, console, every=every)


@app.command()
def align(
    recipe: RecipePath,
    overrides: Overrides = None,
    data: Annotated[str, typer.Option(help="Public texts: a packaged set, or a path.")] = "spam",
    rows: Annotated[int, typer.Option(help="How many of them.")] = 200,
    steps: Annotated[int, typer.Option(help="Steps for each A.")] = 500,
    rate: Annotated[float, typer.Option(help="The first step's rate.")] = 5e-5,
    as_json: Json = False,
) -> None:
    """Makes frozen factors of Co-LoRA agree between a recipe's models, in adapter.aligned."""
    from flexp import recipe_file as recipes

    found = recipes.read(recipe, overrides or [])
    console = begin(as_json, found.mode)
    from flexp import commands, terminal
    from flexp.model.aligned import How

    how = How(steps, rate)
    document = commands.align(found, cache(), data, rows=rows, how=how, say=console.print)
    if as_json:
        emit(document)
    else:
        terminal.show_align(document, console)


@app.command()
def doctor(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe whose data to look at.")] = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Tells what this machine has and, with a recipe, what each client's data looks like."""
    from flexp import recipe_file as recipes

    found = recipes.read(recipe, overrides or []) if recipe is not None else None
    console = begin(as_json)
    from flexp import commands, terminal

    document = commands.doctor(found, cache())
    if as_json:
        emit(document)
    else:
        terminal.show_doctor(document, console)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs; several are compared.")],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
    as_json: Json = False,
) -> None:
    """Writes one HTML file: fleet, curves, own against global, bytes and memory."""
    console = begin(as_json)
    from flexp import commands

    document = commands.write_report(runs, out)
    if as_json:
        emit(document)
    else:
        console.print(document["out"], highlight=False, markup=False)
