"""`flexp serve`: waits for clients, plans their cuts, and plays the run with them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexp import assets, commands
from flexp import run as running
from flexp.events import Sink
from flexp.identity.authority import Authority
from flexp.identity.credentials import Credentials
from flexp.link.control import End
from flexp.link.grpc import Keepalive, split_address
from flexp.link.listen import Listener
from flexp.recipe import Recipe
from flexp.seating import frame_limit
from flexp.serving.floor import floor_of, open_stage
from flexp.serving.reception import Reception
from flexp.serving.roster import Roster
from flexp.stage import Say


@dataclass(frozen=True)
class Serving:
    """Where to listen, as whom, and for whom to wait.

    ``names``: exactly these clients begin; else as many as ``quorum``. Who is away for longer than
    ``patience`` seconds has failed its turn. ``stay``: how long to be there after the end.
    """

    listen: str
    credentials: Credentials | None = None
    authority: Path | None = None
    quorum: int = 2
    names: frozenset[str] = frozenset()
    patience: float = 60.0
    keepalive: Keepalive = "lan"
    clients: int = 64
    stay: float = 10.0
    opened: Callable[[int], None] = lambda port: None


def serve(
    recipe: Recipe,
    asked: Serving,
    cache: assets.Cache,
    sinks: Sequence[Sink],
    say: Say,
) -> dict[str, Any]:
    """Serves a recipe to its end; started again in the same folder, it goes on where it was."""
    out = Path(recipe.out) / recipe.name
    floor = floor_of(recipe, cache, say)
    roster = Roster(out / "roster.json")
    roster.read(recipe)
    running.fresh(out, resume=bool(roster.entries))
    authority = None if asked.authority is None else Authority.open(asked.authority)
    reception = Reception(floor, roster, say, authority)
    reception.manifest  # noqa: B018 every tensor is read now, not while a client waits
    listener = Listener(
        reception,
        asked.listen,
        asked.credentials,
        clients=asked.clients,
        keepalive=asked.keepalive,
        limit=frame_limit(recipe, floor.bones, len(floor.strategy.specs())),
    )
    try:
        host = split_address(asked.listen)[0]
        say(f"listening on {host}:{listener.port}, recipe {recipe.hash()}")
        asked.opened(listener.port)
        _wait(reception, roster, asked, say)
        stage = open_stage(floor, roster, patience=asked.patience, say=say)
        reception.open(stage)
        document = commands.carry_out(stage, sinks, out=out, resume=True, adapters=True, say=say)
        facts = {"rows": document["rows"]}
        reception.close(End(stage.recipe.rounds, facts))
        _part(reception, asked.stay)
        return document
    finally:
        listener.stop()


def _wait(reception: Reception, roster: Roster, asked: Serving, say: Say) -> None:
    if roster.started:
        say(f"going on with {', '.join(sorted(roster.entries))}")
        return
    names = ", ".join(sorted(asked.names)) if asked.names else f"{asked.quorum} clients"
    say(f"waiting for {names}")
    reception.wait_for(asked.quorum, asked.names)


def _part(reception: Reception, seconds: float) -> None:
    """Stays until all have hung up, but no longer than that."""
    until = time.monotonic() + seconds
    stage = reception.stage
    while stage is not None and time.monotonic() < until:
        if not stage.engine.guests.present():
            return
        time.sleep(0.1)
