"""Commands for several machines: serve, join, enroll."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from flexp.cli.base import Json, Overrides, RecipePath, app, begin, cache, emit

Identity = Annotated[
    Path | None, typer.Option(help="Folder with key and certificates; none on this machine only.")
]
Profile = Annotated[
    str, typer.Option("--keepalive", help="lan notices a dead peer in 3 s, mobile saves battery.")
]


@app.command()
def serve(
    recipe: RecipePath,
    overrides: Overrides = None,
    listen: Annotated[
        str, typer.Option(help="HOST:PORT; 0.0.0.0:7143 for other machines.")
    ] = "127.0.0.1:7143",
    identity: Identity = None,
    ca: Annotated[
        Path | None, typer.Option(help="The authority, so that kits can enrol and revoking works.")
    ] = None,
    quorum: Annotated[int, typer.Option(min=1, help="Clients to wait for.")] = 2,
    clients: Annotated[
        str | None, typer.Option(help="Wait for exactly these, as anna,ben; instead of a quorum.")
    ] = None,
    patience: Annotated[
        float, typer.Option(min=0, help="Seconds that a client may be away within a turn.")
    ] = 60.0,
    deadline: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds after which a round ends without who is not done."),
    ] = None,
    enough: Annotated[
        int, typer.Option(min=0, help="Replies that a round needs to end at its deadline.")
    ] = 1,
    stay: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Seconds to be there after the end, for chats and newcomers; else "
            "until all have their adapters.",
        ),
    ] = None,
    keepalive: Profile = "lan",
    as_json: Json = False,
) -> None:
    """Waits for clients on other machines, plans what each runs, and plays the run with them.

    Started again in the same folder it goes on where it was: kill it at any time.
    """
    from flexp import recipe_file as recipes

    found = recipes.read(recipe, overrides or [])
    console = begin(as_json, found.mode)
    from flexp import live, terminal
    from flexp.engine.guests import Policy
    from flexp.identity import credentials
    from flexp.serving.log import Log
    from flexp.serving.serve import Serving
    from flexp.serving.serve import serve as served
    from flexp.serving.sieve import Sieve

    asked = Serving(
        listen,
        None if identity is None else credentials.load(identity, role="server"),
        ca,
        quorum,
        frozenset(name.strip() for name in clients.split(",")) if clients else frozenset(),
        policy=Policy(patience, deadline, enough),
        keepalive=keepalive_of(keepalive),
        stay=stay,
    )
    with live.Live(console) as shown, Sieve(Log(shown.say)):
        bar = shown.begin(found.strategy.name, found.rounds)
        document = served(found, asked, cache(), [bar], shown.say)
    if as_json:
        emit(document)
    else:
        terminal.show_run(document, console)


@app.command()
def join(
    server: Annotated[str, typer.Argument(help="HOST:PORT of the server.")],
    data: Annotated[Path, typer.Option(help="This client's rows: a file or folder.")],
    identity: Identity = None,
    name: Annotated[str, typer.Option(help="Who this is, where there are no certificates.")] = "",
    folder: Annotated[
        Path, typer.Option(help="What is kept here: memory, blocks, the adapter.")
    ] = Path("joined"),
    accept: Annotated[
        str, typer.Option(help="Hash of the recipe that is agreed to; else you are asked.")
    ] = "",
    model: Annotated[
        str | None,
        typer.Option(
            help="The model on this device (folder, asset or hub id); else its blocks "
            "come from the server."
        ),
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(help="What training may use here, as 1.5GiB; else what is free.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; one in exact mode.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    more: Annotated[
        int, typer.Option(min=0, help="If the run is over: turns on its own, with new rows too.")
    ] = 0,
    patience: Annotated[
        float | None, typer.Option(min=0, help="Seconds to try to reach the server; else for ever.")
    ] = None,
    keepalive: Profile = "lan",
    as_json: Json = False,
) -> None:
    """Takes part in a run on a server: trains here on rows that stay here, ends with an adapter.

    Shows what will run here and what leaves, and asks. Stop it any time; the same command goes on.
    """
    from flexp.client.heap import give_back

    give_back()
    console = begin(as_json)
    import torch

    from flexp import terminal
    from flexp.identity import credentials
    from flexp.joining.join import Joining
    from flexp.joining.join import join as joined
    from flexp.plan.devices import parse_bytes

    def tune(mode: str) -> None:
        torch.set_num_threads(1 if mode == "exact" else threads or os.cpu_count() or 1)

    asked = Joining(
        server,
        data,
        folder,
        name,
        None if identity is None else credentials.load(identity, role="client"),
        accept=accept,
        model=model,
        memory=None if max_memory is None else parse_bytes(max_memory),
        device=device,
        more=more,
        patience=patience,
        keepalive=keepalive_of(keepalive),
        tune=tune,
    )

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    def agree(terms: Any) -> bool:
        terminal.show_terms(terms.document(), console)
        return sys.stdin.isatty() and typer.confirm("Take part?", err=True)

    document = joined(asked, cache(), agree, say)
    if as_json:
        emit(document)
    else:
        terminal.show_joined(document, console)


@app.command()
def enroll(
    kit: Annotated[Path, typer.Argument(help="The start-up kit, from `flexp ca kit`.")],
    out: Annotated[Path, typer.Option(help="A new folder for this device's identity.")],
    server: Annotated[
        str | None, typer.Option(help="HOST:PORT, if the kit does not say it.")
    ] = None,
    patience: Annotated[float, typer.Option(min=0, help="Seconds to try.")] = 20.0,
    as_json: Json = False,
) -> None:
    """Makes a key on this device and fetches the certificate for it, once, with a start-up kit."""
    console = begin(as_json)
    from flexp.joining.enrolment import enrol

    document = enrol(kit, out, server, patience=patience)
    if as_json:
        emit(document)
    else:
        console.print(f"{document['name']}: identity in {document['out']}", highlight=False)


def keepalive_of(text: str) -> Any:
    """One of the two profiles; RecipeError is for recipes, so this is LinkError."""
    from flexp.errors import LinkError

    if text not in ("lan", "mobile"):
        raise LinkError(f'--keepalive "{text}": write lan or mobile.')
    return text
