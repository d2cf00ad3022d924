"""`flexp join`: dials, shows what it would take part in, and works until the run is over."""

from __future__ import annotations

import secrets
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch

from flexp import __version__, assets
from flexp.client.store import StoredMemory
from flexp.data import sources
from flexp.data.sources import Row
from flexp.data.tokens import tokenizer_digest
from flexp.errors import (
    DataError,
    ExportError,
    FlexpError,
    LinkError,
    ParcelError,
    Stopped,
)
from flexp.identity.credentials import Credentials
from flexp.joining.folder import owner_of, take
from flexp.joining.member import Member, spaces_of
from flexp.joining.parts import bones_of, check_local, fetch_small, manifest_of, recipe_of
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
from flexp.link.grpc import Keepalive
from flexp.model.files import Manifest
from flexp.model.reader import open_reader
from flexp.model.skeleton import Skeleton
from flexp.parcel import file_name, write_atomic
from flexp.plan.devices import measure, measure_flops, measure_link
from flexp.recipe import Recipe
from flexp.seating import dtype_of, frame_limit, quantize_of
from flexp.strategies import build
from flexp.strategies.base import Strategy

Say = Callable[[str], None]
Agree = Callable[[Terms], bool]


@dataclass(frozen=True)
class Joining:
    """What the owner of a device says: where to, with which rows, and within which limits.

    ``accept`` is the hash of a recipe that is agreed to already; ``model`` a folder, asset or hub
    id to load instead of fetching blocks from the server; ``memory`` in bytes, None for what is
    free; ``more`` turns of its own are wanted if the run is over.
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
    device: str = "cpu"
    more: int = 0
    wants: Literal["train", "speak"] = "train"
    tune: Callable[[str], None] = lambda mode: None  # told the recipe's mode before anything runs
    process: str = field(default_factory=partial(secrets.token_hex, 8))

    def hello(self, server: str, order: int) -> Hello:
        """The first words of a stream."""
        versions = __version__, str(torch.__version__)
        name = self.name or owner_of(self.folder)
        return Hello(PROTOCOL, *versions, name, self.process, server, order, self.wants)

    def dial(self, say: Say) -> GrpcLink:
        """The link to the server."""
        return GrpcLink(
            self.address,
            self.hello,
            self.credentials,
            keepalive=self.keepalive,
            patience=self.patience,
            notice=say,
        )


def join(asked: Joining, cache: assets.Cache, agree: Agree, say: Say) -> dict[str, Any]:
    """Takes part in a run until it is over; returns what came of it.

    ``agree`` shows the terms to the owner; LinkError if it says no, and whatever the server or
    the data refuse.
    """
    try:
        rows = sources.read(asked.data)  # a wrong path costs no connection
    except DataError as problem:
        raise DataError(str(problem).replace("data.path", "--data")) from problem
    link = asked.dial(say)
    stay = Stay(asked, link, rows, cache, agree, say)
    try:
        return stay.until_the_end()
    except (Stopped, KeyboardInterrupt) as end:
        with suppress(FlexpError, TimeoutError):
            link.post(Bye(back=getattr(end, "signal", 0) == signal.SIGTERM)).result(timeout=2)
        raise
    except (FlexpError, OSError) as problem:
        with suppress(FlexpError):  # the server may be what has gone
            link.post(Bye(why=type(problem).__name__))
        if isinstance(problem, OSError):
            raise ParcelError(
                f"{problem.filename or asked.folder} cannot be used: {problem.strerror}. "
                "Make room or name another --folder, and start the same command again."
            ) from problem
        raise
    finally:
        link.close()


@dataclass
class Stay:
    """A client's time with a server, over as many connections as it takes."""

    asked: Joining
    link: GrpcLink
    rows: Sequence[Row]
    cache: assets.Cache
    agree: Agree
    say: Say
    member: Member | None = None
    lacking: str = ""  # why the adapter of the end was not written

    def until_the_end(self) -> dict[str, Any]:
        """Does what the server says until the run is over."""
        while True:
            try:
                told = self.link.next()
                if isinstance(told, Welcome):
                    self.member = self.come_in(told)
                elif self.member is None:
                    continue
                elif isinstance(told, Begin):
                    self._begin(self.member, told)
                elif isinstance(told, Order):
                    self._obey(self.member, told)
                elif isinstance(told, End):
                    if self.lacking:
                        raise ExportError(f"The run is over, without an adapter: {self.lacking}")
                    return self._ended(self.member, told)
            except TurnLost as lost:
                self.say(str(lost))

    def _begin(self, member: Member, told: Begin) -> None:
        cut = told.seat.cut
        self.say(f"{cut.front} front and {cut.back} back blocks run here: {told.reason}")
        member.begin(told)

    def _obey(self, member: Member, order: Order) -> None:
        try:
            member.obey(order)
            self.lacking = ""
        except TurnLost:
            raise
        except Exception as problem:  # noqa: BLE001 whatever goes wrong, the server hears of it
            kind = type(problem).__name__
            self.say(f"{kind}: {problem}")
            self.lacking = f"{kind}: {problem}" if order.kind == "adapter" else ""
            self.link.ask(Outcome(order.number, error=kind))

    def come_in(self, welcome: Welcome) -> Member:
        """From the welcome to the waiting room; a server that began anew meets the same member."""
        recipe = recipe_of(welcome)
        self.asked.tune(recipe.mode)
        name, member = welcome.client, self.member
        take(self.asked.folder, name)
        if member is not None and member.recipe.hash() != recipe.hash():
            member = None
        strategy = build(recipe.strategy.name, recipe.strategy.options)
        if self.asked.wants == "train":
            self._agreed(recipe, strategy, welcome)
        bones = bones_of(recipe, welcome, self.asked.folder)
        self.link.limit = frame_limit(recipe, bones, len(strategy.specs()))
        if member is None:
            model, theirs = self._model(recipe, welcome)
            folder = self.asked.folder
            run = f"{file_name(recipe.name)}-{recipe.hash()[:12]}"
            memory = StoredMemory(folder / "memory" / run)
            member = Member(
                name,
                recipe,
                strategy,
                self.link,
                self.rows,
                model=model,
                theirs=theirs,
                memory=memory,
                folder=folder,
                device=self.asked.device,
                say=self.say,
            )
        if tokenizer_digest(open_reader(member.model, recipe.task.kind)) != welcome.tokenizer:
            raise LinkError(
                f"The tokenizer in {member.model}, or how it takes images, is another one than the "
                "server's. Leave --model out to fetch it from the server."
            )
        self.link.wire = recipe.link.of(name)
        space = spaces_of(recipe, name, self.rows)
        if self.asked.wants == "train":
            member.try_rows(space)
        self.link.ask(Ready(recipe.hash(), member.counts(), space, self.asked.more))
        return member

    def _agreed(self, recipe: Recipe, strategy: Strategy[Any], welcome: Welcome) -> None:
        """Goes on only if the owner has agreed to this very recipe, now or before."""
        device = self._measured(recipe, bones_of(recipe, welcome, self.asked.folder))
        proposal = cast("Proposal", self.link.ask(device))
        note, wanted = self.asked.folder / "accepted", welcome.hash
        agreed = {self.asked.accept} if self.asked.accept else set[str]()
        if note.is_file():
            agreed.add(note.read_text("utf-8", errors="replace").strip())
        address, memory = self.asked.address, device.memory
        terms = Terms(welcome.client, address, recipe, strategy, welcome, proposal, memory)
        if wanted not in agreed and not self.agree(terms):
            raise LinkError(
                "Not joined. To agree to this recipe without being asked: --accept " + wanted
            )
        write_atomic(note, wanted.encode())

    def _measured(self, recipe: Recipe, bones: Skeleton) -> Measured:
        """This device: free memory within the owner's limit, speed in a block, and the way."""
        asked, here = self.asked, measure()
        memory = min(here.memory, asked.memory) if asked.memory else here.memory
        flops = measure_flops(
            bones,
            recipe.task.kind,
            batch=recipe.train.batch,
            length=recipe.task.max_length,
            dtype=dtype_of(recipe),
            quantize=quantize_of(recipe),
            runs=3,
        )

        def there_and_back(size: int) -> int:
            return len(cast("Data", self.link.ask(Echo(bytes(size), size))).data)

        try:
            rate, latency = measure_link(there_and_back, runs=3)
        except FlexpError:  # too fast to be measured
            return Measured(memory, flops)
        return Measured(memory, flops, rate, rate, latency)

    def _model(self, recipe: Recipe, welcome: Welcome) -> tuple[Path, Manifest | None]:
        """The model's folder: this device's own, if it is the server's model, else a new one."""
        theirs = manifest_of(self.link, welcome.model)
        asked, revision = self.asked, recipe.model.revision
        if asked.model is not None:
            folder = assets.resolve(asked.model, self.cache, revision=revision, say=self.say)
            check_local(folder, theirs)
            return folder, None
        folder = asked.folder / "model"
        fetch_small(self.link, theirs, folder)
        return folder, theirs

    def _ended(self, member: Member, told: End) -> dict[str, Any]:
        ledger, adapter = member.ledger, self.asked.folder / "adapter"
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
