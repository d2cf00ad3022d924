"""`flexp serve`: waits for clients, plans their cuts, and plays the run with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from flexp import assets, checkpoint, commands
from flexp import run as running
from flexp.engine.guests import WAITS_FOR_ALL, Policy
from flexp.engine.network import NetworkEngine
from flexp.errors import CheckpointError, FlexpError
from flexp.events import Sink, Stream
from flexp.holding import hold
from flexp.identity.authority import Authority
from flexp.identity.credentials import Credentials
from flexp.link.control import End
from flexp.link.grpc import Keepalive, split_address
from flexp.link.listen import Listener
from flexp.parcel import write_atomic
from flexp.recipe import Recipe
from flexp.seating import frame_limit
from flexp.serving import log as logs
from flexp.serving.epilogue import Epilogue
from flexp.serving.floor import Floor, floor_of, open_stage
from flexp.serving.gate import Gate
from flexp.serving.reception import Reception
from flexp.serving.roster import Roster
from flexp.serving.watch import GRAPHS, Watch
from flexp.stage import Say, Stage


@dataclass(frozen=True)
class Serving:
    """Where to listen, as whom, and for whom to wait.

    ``names``: exactly these clients begin; else as many as ``quorum``. ``policy``: for whom a round
    does not wait. ``stay``: how long to be there after the end (None:
    until all have their adapters).
    """

    listen: str
    credentials: Credentials | None = None
    authority: Path | None = None
    quorum: int = 2
    names: frozenset[str] = frozenset()
    policy: Policy = WAITS_FOR_ALL
    keepalive: Keepalive = "lan"
    clients: int = 64
    stay: float | None = None


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
    with hold(out, resume=True):
        return _serve(floor, out, asked, sinks, say)


def _serve(
    floor: Floor, out: Path, asked: Serving, sinks: Sequence[Sink], say: Say
) -> dict[str, Any]:
    """The same in a folder that no other process holds."""
    recipe, roster = floor.recipe, Roster(out / "roster.json")
    roster.read(recipe)
    roster.go_back(checkpoint.done(out / "checkpoint"))
    if roster.server is None:
        roster.server = floor.measured()
    if (out / "checkpoint").exists() and not roster.started:
        raise FlexpError(
            f"{out} holds a run already, which was not served. Choose another folder with "
            "out=FOLDER, or another name with name=NAME."
        )
    authority = None if asked.authority is None else Authority.open(asked.authority)
    log = logs.opened(out, say, began=roster.started)
    gate = Gate(recipe.mode == "exact", log, authority)
    reception = Reception(floor, roster, say, gate)
    reception.manifest  # noqa: B018 every tensor is read now, not while a client waits
    listener = Listener(
        reception,
        asked.listen,
        asked.credentials,
        clients=asked.clients,
        keepalive=asked.keepalive,
        limit=frame_limit(recipe, floor.bones, len(floor.strategy.specs())),
    )
    watch = Watch(reception, out, log)
    watch.start()
    try:
        host = split_address(asked.listen)[0]
        say(f"listening on {host}:{listener.port}")
        say(f"recipe {recipe.hash()}")
        _wait(reception, roster, asked, say)
        document = _play(reception, out, asked, sinks, say)
        reception.dismiss()
        return document
    finally:
        watch.stop()
        listener.stop()


def _play(
    reception: Reception, out: Path, asked: Serving, sinks: Sequence[Sink], say: Say
) -> dict[str, Any]:
    """The run, and what comes after it."""
    floor, roster = reception.floor, reception.roster

    def opened(stage: Stage[NetworkEngine]) -> None:
        plain = yaml.safe_dump(stage.recipe.plain(), sort_keys=False)
        write_atomic(out / "recipe.yaml", plain.encode())
        reception.open(stage)

    stage = open_stage(floor, roster, opened, policy=asked.policy, say=say)
    waiting = stage.engine.trunk.pending
    memory = (roster.server or floor.measured())["memory"]
    waiting.budget, waiting.patience = memory // 2, GRAPHS
    if done := _finished(out, stage):
        reception.over = End(stage.recipe.rounds)  # nobody is told meanwhile that it goes on
    reception.open(stage)
    if done:
        document = _told(out / "result.json")
        Epilogue(reception, stage, done, say).play(asked.stay)
        stage.engine.close()
        return document

    def after(result: running.Result) -> None:
        Epilogue(reception, result.stage, result, say).play(asked.stay)

    log = reception.gate.log
    return commands.carry_out(
        stage,
        [*sinks, log],
        out=out,
        resume=True,
        adapters=True,
        after=after,
        say=say,
        stream=log.stream,
    )


def _told(path: Path) -> dict[str, Any]:
    """What a run that is over has left."""
    try:
        found = json.loads(path.read_text("utf-8"))
        if not isinstance(found, dict):
            raise TypeError("it is no document")
    except (OSError, ValueError, TypeError, RecursionError) as problem:
        raise CheckpointError(
            f"{path} cannot be read: {problem!s:.200}. Remove it and start the same command again: "
            "it is made anew from the last checkpoint."
        ) from problem
    return cast("dict[str, Any]", found)


def _wait(reception: Reception, roster: Roster, asked: Serving, say: Say) -> None:
    if roster.started:
        say(f"going on with {', '.join(sorted(roster.entries))}")
        return
    names = ", ".join(sorted(asked.names)) if asked.names else f"{asked.quorum} clients"
    say(f"waiting for {names}")
    reception.wait_for(asked.quorum, asked.names)


def _finished(out: Path, stage: Stage[NetworkEngine]) -> running.Result | None:
    """The end of a run that is over already."""
    if not (out / "result.json").is_file():
        return None
    state, done = running.begin(stage, Stream(), out, resume=True)
    if done < stage.recipe.rounds:
        return None
    return running.Result((), state, running.after(stage, stage.recipe.rounds), stage)
