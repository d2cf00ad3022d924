"""Commands that take what a run leaves: predict, chat, export."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from flexp.cli.base import Json, app, begin, cache, emit


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
