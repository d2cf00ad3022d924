"""`flexp join`: dials, shows what it would take part in, and works until the run is over."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from flexp import __version__, assets
from flexp.client.store import StoredMemory
from flexp.data import sources
from flexp.data.sources import Row
from flexp.data.tasks import open_tokenizer, tokenizer_digest
from flexp.errors import FlexpError, LinkError, RecipeError
from flexp.joining.member import Member, spaces_of
from flexp.joining.parts import check_local, fetch_small, manifest_of
from flexp.joining.terms import Terms
from flexp.link.control import (
    PROTOCOL,
    Begin,
    Bye,
    Data,
    Echo,
    End,
    Hello,
    Measured,
    Order,
    Outcome,
    Proposal,
    Ready,
    Welcome,
)
from flexp.link.dial import GrpcLink, TurnLost
from flexp.link.grpc import Credentials, Keepalive
from flexp.model.files import Manifest
from flexp.model.skeleton import Skeleton, bare, read_config
from flexp.parcel import write_atomic
from flexp.plan.devices import Device, measure, measure_flops, measure_link
from flexp.recipe import Recipe
from flexp.recipe_file import make
from flexp.seating import dtype_of
from flexp.strategies import build

Say = Callable[[str], None]
Agree = Callable[[Terms], bool]


@dataclass(frozen=True)
class Joining:
    """What the owner of a device says: where to, with which rows, and within which limits.

    ``accept`` is the hash of a recipe that is agreed to already; ``model`` a folder, asset or hub
    id to load instead of fetching blocks from the server; ``memory`` in bytes, None for what is free.
    """

    address: str
    data: Path
    folder: Path
    name: str = ""
    credentials: Credentials | None = None
    accept: str = ""
    model: str | None = None
    memory: int | None = None
    keepalive: Keepalive = "lan"
    patience: float | None = None
    process: str = field(default_factory=partial(secrets.token_hex, 8))

    def hello(self, server: str, order: int) -> Hello:
        """The first words of a stream."""
        versions = __version__, torch.__version__
        return Hello(PROTOCOL, *versions, self.name, self.process, server, order)


def join(asked: Joining, cache: assets.Cache, agree: Agree, say: Say) -> dict[str, Any]:
    """Takes part in a run until it is over; returns what came of it.

    ``agree`` shows the terms to the owner; LinkError if it says no, and whatever the server or
    the data refuse.
    """
    rows = sources.read(asked.data)  # a wrong path costs no connection
    link = GrpcLink(
        asked.address,
        asked.hello,
        asked.credentials,
        keepalive=asked.keepalive,
        patience=asked.patience,
        notice=say,
    )
    try:
        return _take_part(asked, link, rows, cache, agree=agree, say=say)
    except KeyboardInterrupt:
        link.post(Bye())
        raise
    finally:
        link.close()


def _take_part(
    asked: Joining,
    link: GrpcLink,
    rows: Sequence[Row],
    cache: assets.Cache,
    *,
    agree: Agree,
    say: Say,
) -> dict[str, Any]:
    member: Member | None = None
    while True:
        try:
            told = link.next()
            if isinstance(told, Welcome):
                member = _come_in(asked, link, rows, cache, told, member, agree=agree, say=say)
            elif isinstance(told, Begin) and member is not None:
                seat, reason = told.seat, told.reason
                say(f"cut {seat.cut}: {seat.cut.front} front and {seat.cut.back} back blocks here")
                say(f"  {reason}")
                member.begin(told)
            elif isinstance(told, Order) and member is not None:
                _obey(member, link, told, say)
            elif isinstance(told, End) and member is not None:
                return _ended(asked, member, told)
        except TurnLost as lost:
            say(f"{lost}")


def _obey(member: Member, link: GrpcLink, order: Order, say: Say) -> None:
    try:
        member.obey(order)
    except TurnLost:
        raise
    except Exception as problem:  # noqa: BLE001 whatever goes wrong here, the server hears of it
        text = f"{type(problem).__name__}: {problem}"
        say(text)
        link.ask(Outcome(order.number, error=text))


def _come_in(
    asked: Joining,
    link: GrpcLink,
    rows: Sequence[Row],
    cache: assets.Cache,
    welcome: Welcome,
    member: Member | None,
    *,
    agree: Agree,
    say: Say,
) -> Member:
    """From the welcome to the waiting room; a server that begun anew finds the same member."""
    recipe = make(json.loads(welcome.recipe), "the server's recipe")
    if recipe.hash() != welcome.hash:
        raise RecipeError("The server's recipe has not the hash that it says. Do not join it.")
    if member is None or member.recipe.hash() != recipe.hash():
        member = None
    name = welcome.client
    strategy = build(recipe.strategy.name, recipe.strategy.options)
    if member is None:
        say(f"measuring this device for {recipe.model.source}")
    device = _measured(asked, link, recipe, _bones(recipe, welcome, asked.folder))
    proposal = cast("Proposal", link.ask(device))
    terms = Terms(name, asked.address, recipe, strategy, welcome, proposal, device.memory)
    _agree(asked, terms, agree)
    if member is None:
        model, theirs = _model(asked, link, recipe, welcome, cache, say)
        memory = StoredMemory(asked.folder / "memory" / recipe.name)
        member = Member(
            name, recipe, strategy, link, rows, model, theirs, memory, asked.folder, say
        )
    if tokenizer_digest(open_tokenizer(member.model)) != welcome.tokenizer:
        raise LinkError(
            f"The tokenizer in {member.model} is another one than the server's. Leave --model out "
            "to fetch it from the server."
        )
    link.wire = recipe.link.of(name)
    counts = member.counts()
    link.ask(Ready(recipe.hash(), counts, spaces_of(recipe, name, rows), member.memory.held()))
    say("waiting for the others")
    return member


def _agree(asked: Joining, terms: Terms, agree: Agree) -> None:
    """Goes on only if the owner has agreed to this very recipe, now or before."""
    note = asked.folder / "accepted"
    agreed = {asked.accept} if asked.accept else set[str]()
    if note.is_file():
        agreed.add(note.read_text("utf-8").strip())
    if terms.welcome.hash not in agreed and not agree(terms):
        raise LinkError(
            f"Not joined. To agree to this recipe without being asked: --accept {terms.welcome.hash}"
        )
    asked.folder.mkdir(parents=True, exist_ok=True)
    write_atomic(note, terms.welcome.hash.encode())


def _bones(recipe: Recipe, welcome: Welcome, folder: Path) -> Skeleton:
    """The model's skeleton, from the config that came with the welcome."""
    place = folder / "model"
    place.mkdir(parents=True, exist_ok=True)
    if not (place / "config.json").is_file():
        write_atomic(place / "config.json", welcome.config.encode())
    config = read_config(place, recipe.task.kind, 2, None)
    return bare(config, recipe.task.kind, blocks_at=recipe.model.blocks_at)


def _measured(asked: Joining, link: GrpcLink, recipe: Recipe, bones: Skeleton) -> Measured:
    """This device: free memory within the owner's limit, speed in a block, and the way."""
    here: Device = measure(asked.name or "this device")
    memory = min(here.memory, asked.memory) if asked.memory else here.memory
    flops = measure_flops(
        bones,
        recipe.task.kind,
        batch=recipe.train.batch,
        length=recipe.task.max_length,
        dtype=dtype_of(recipe),
        runs=3,
    )

    def there_and_back(size: int) -> int:
        return len(cast("Data", link.ask(Echo(bytes(size), size))).data)

    try:
        rate, latency = measure_link(there_and_back, runs=3)
    except FlexpError:  # too fast to be measured
        return Measured(memory, flops)
    return Measured(memory, flops, rate, rate, latency)


def _model(
    asked: Joining,
    link: GrpcLink,
    recipe: Recipe,
    welcome: Welcome,
    cache: assets.Cache,
    say: Say,
) -> tuple[Path, Manifest | None]:
    """The folder of the model: this device's own, if it is the server's model, else a new one."""
    theirs = manifest_of(link, welcome.model)
    if asked.model is not None:
        folder = assets.resolve(asked.model, cache, revision=recipe.model.revision, say=say)
        check_local(folder, theirs)
        return folder, None
    folder = asked.folder / "model"
    fetch_small(link, theirs, folder)
    return folder, theirs


def _ended(asked: Joining, member: Member, told: End) -> dict[str, Any]:
    ledger = member.ledger
    adapter = asked.folder / "adapter"
    return {
        "client": member.name,
        "run": member.recipe.name,
        "method": member.strategy.name,
        "rounds": told.rounds,
        "turns": member.memory.turns,
        "sent_bytes": ledger.sent,
        "received_bytes": ledger.received,
        "messages": ledger.messages,
        "adapter": str(adapter) if adapter.is_dir() else None,
        "scores": dict(member.scores),
    }
