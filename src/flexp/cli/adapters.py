"""Commands that take what a run leaves: predict, chat, export."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from flexp.cli.base import Json, app, begin, cache, emit

Via = Annotated[
    str | None, typer.Option(help="HOST:PORT of a server that stays: run the model through it.")
]
Folder = Annotated[Path, typer.Option(help="With --via: the folder that `flexp join` had.")]
Identity = Annotated[Path | None, typer.Option(help="With --via: this device's identity.")]
Name = Annotated[str, typer.Option(help="With --via, without certificates: who this is.")]


@app.command()
def predict(
    words: Annotated[
        list[str],
        typer.Argument(
            help="An adapter folder, as runs/NAME/adapters/ME, then texts, or files of images; "
            "with --via without the folder."
        ),
    ],
    via: Via = None,
    folder: Folder = Path("joined"),
    identity: Identity = None,
    name: Name = "",
    as_json: Json = False,
) -> None:
    """Labels or continues texts with one client's adapter, beside the pretrained model.

    With --via on a device that cannot hold the model: its own blocks here, the rest at the server.
    """
    console = begin(as_json)
    from flexp import answers, terminal

    if via is None:
        document = answers.predict(Path(words[0]), words[1:], cache())
    else:
        document = through(via, folder, identity, name, words, console=console)
    if as_json:
        emit(document)
    else:
        terminal.show_predictions(document, console)


@app.command()
def chat(
    adapters: Annotated[
        list[Path] | None, typer.Argument(help="Adapter folders of one base model.")
    ] = None,
    via: Via = None,
    folder: Folder = Path("joined"),
    identity: Identity = None,
    name: Name = "",
    prompt: Annotated[
        str | None, typer.Option(help="Answer this and end; else read lines until the end.")
    ] = None,
    frame: Annotated[
        str, typer.Option(help='What is put around a text, as "Horatio: {text}\\nHamlet:".')
    ] = "{text}",
    tokens: Annotated[int, typer.Option(min=1, help="Length of an answer.")] = 40,
    as_json: Json = False,
) -> None:
    """Continues what you say with the base model and with clients' adapters, side by side.

    With --via a device that cannot hold the model talks with its own: every token's hidden state
    crosses the link, both ways.
    """
    console = begin(as_json)
    from flexp import answers, terminal

    frame = frame.replace("\\n", "\n")
    texts = iter(lambda: sys.stdin.readline().strip(), "") if prompt is None else iter([prompt])
    if via is not None:
        framed = (answers.framed(frame, text) for text in texts)
        document = through(
            via, folder, identity, name, framed, console=console, tokens=tokens, live=not as_json
        )
        if as_json:
            emit(document)
        return
    answer = answers.chat(adapters or [], cache(), frame=frame, tokens=tokens)
    said: list[dict[str, str]] = []
    for text in texts:
        said.append(answer(text))
        if not as_json:
            terminal.show_voices(said[-1], console)
    if as_json:
        emit({"adapters": [str(path) for path in adapters or []], "answers": said})


def through(
    via: str,
    folder: Path,
    identity: Path | None,
    name: str,
    texts: Iterable[str],
    *,
    console: Console,
    tokens: int = 40,
    live: bool = False,
) -> dict[str, Any]:
    """Texts answered by a personal model that runs through a server."""
    from flexp.client.heap import give_back

    give_back()
    import torch

    from flexp.identity import credentials
    from flexp.joining.join import Joining
    from flexp.joining.talk import talk

    def tune(mode: str) -> None:
        torch.set_num_threads(1 if mode == "exact" else os.cpu_count() or 1)

    known = None if identity is None else credentials.load(identity)
    asked = Joining(via, folder, folder, name, known, tune=tune)

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    def heard(row: Mapping[str, Any]) -> None:
        if live:
            say(str(row.get("adapter", row.get("label"))))

    return talk(asked, cache(), texts, tokens=tokens, say=say, heard=heard)


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
    from flexp import answers, terminal

    document = answers.export_adapter(adapter, out, cache(), merged=merged)
    if as_json:
        emit(document)
    else:
        terminal.show_export(document, console)
