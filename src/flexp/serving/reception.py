"""Who may come in, and what everybody is told: the calls of a run, from hello to goodbye."""

from __future__ import annotations

import secrets
import threading
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, get_args

import msgspec
import torch

from flexp import __version__
from flexp.data.tasks import tokenizer_digest
from flexp.engine.guests import replaced
from flexp.engine.network import NetworkEngine
from flexp.errors import FlexpError, IdentityError, LinkError
from flexp.identity.authority import Authority
from flexp.identity.peer import who
from flexp.link.control import (
    PROTOCOL,
    Begin,
    Bye,
    Data,
    Echo,
    End,
    Enroll,
    Hello,
    Measured,
    Noted,
    Outcome,
    Problem,
    Proposal,
    Read,
    Ready,
    Welcome,
)
from flexp.link.frame import Body
from flexp.link.listen import Call
from flexp.link.messages import Message
from flexp.model.files import Manifest, manifest, read_part
from flexp.serving.admission import name_of
from flexp.serving.floor import Floor, labels_of
from flexp.serving.roster import Entry, Roster
from flexp.stage import Say, Stage

ECHO = 1_000_000
STEP = 1 << 19  # bytes of a file in one answer
STEPS = get_args(Message)


@dataclass
class Reception:
    """Answers every call of one run; before the quorum is there it only enters names.

    ``authority`` knows who was revoked, and lets devices enrol; without it certificates of the
    right authority are believed until they expire.
    """

    floor: Floor
    roster: Roster
    say: Say
    authority: Authority | None = None
    stage: Stage[NetworkEngine] | None = None
    over: End | None = None
    server: str = field(default_factory=lambda: secrets.token_hex(8))
    calls: dict[str, Call] = field(default_factory=dict[str, Call])  # who waits for the beginning
    here: set[str] = field(default_factory=set[str])
    measured: dict[str, Entry] = field(default_factory=dict[str, Entry])  # by who has not agreed
    changed: threading.Condition = field(default_factory=threading.Condition)

    @cached_property
    def manifest(self) -> Manifest:
        """The model's tensors and their digests."""
        return manifest(self.floor.source)

    # ---- for the server's own thread

    def wait_for(self, quorum: int, names: frozenset[str]) -> None:
        """Waits until so many clients, or all of these, are ready."""

        def enough() -> bool:
            return names <= self.here if names else len(self.here) >= quorum

        with self.changed:
            while not enough():
                self.changed.wait(timeout=1.0)
            if not self.roster.started:
                self.roster.started = True
                self.roster.entries = {c: self.roster.entries[c] for c in sorted(self.here)}
                self.roster.write(self.floor.recipe)

    def open(self, stage: Stage[NetworkEngine]) -> None:
        """The run begins: everybody who waits is told where it sits."""
        with self.changed:
            self.stage = stage
            for name, call in sorted(self.calls.items()):
                self._let_in(name, call)
            self.calls.clear()

    def close(self, end: End) -> None:
        """The run is over: who is here is told, and whoever comes yet."""
        with self.changed:
            self.over = end
            if self.stage is not None:
                for call in self.stage.engine.guests.present():
                    call.tell(end)

    # ---- for the calls' threads

    def answer(self, call: Call, body: Body, digest: str) -> Body:
        """The answer to a frame; a FlexpError ends the call with its text."""
        if isinstance(body, Hello):
            return self._hello(call, body)
        if isinstance(body, Enroll):
            return self._enroll(call, body)
        if not call.name:
            raise LinkError("Say hello first.")
        if isinstance(body, STEPS):
            answer = self._engine().message(call, body, digest)  # pyright: ignore[reportArgumentType]
            if isinstance(answer, Problem):
                self.refused(call, answer.text)
            return answer
        if isinstance(body, Outcome):
            return self._engine().outcome(call, body)
        try:
            return self._ask(call, body)
        except FlexpError as problem:
            self.refused(call, str(problem))
            return Problem(type(problem).__name__, str(problem))

    def refused(self, call: Call, text: str) -> None:
        """Something that a client said was refused: whoever runs the server reads why."""
        who_asked = f"{call.name} ({call.address})" if call.name else call.address
        shown = "".join(c if c.isprintable() else "?" for c in f"{who_asked}: {text}")
        self.say(f"refused {shown:.1000}")

    def gone(self, call: Call) -> None:
        """A call has ended."""
        with self.changed:
            if self.calls.get(call.name) is call:
                del self.calls[call.name]
                if self.stage is None:
                    self.here.discard(call.name)
                    self.say(f"{call.name} has gone before the beginning")
            self.changed.notify_all()
        if self.stage is not None and self.stage.engine.guests.gone(call) and self.over is None:
            self.say(f"{call.name} has lost its connection")

    def _ask(self, call: Call, body: Body) -> Body:
        if isinstance(body, Measured):
            return self._propose(call, body)
        if isinstance(body, Ready):
            return self._ready(call, body)
        if isinstance(body, Read):
            return self._read(body)
        if isinstance(body, Echo):
            return Data(bytes(min(body.back, ECHO)))
        if isinstance(body, Bye):
            self.say(f"{call.name} says goodbye" + (f": {body.why:.80}" if body.why else ""))
            return Noted()
        raise LinkError(f'A client does not say "{type(body).__name__}".')

    def _hello(self, call: Call, hello: Hello) -> Body:
        if hello.protocol != PROTOCOL:
            raise LinkError(
                f"This server speaks protocol {PROTOCOL} (flexp {__version__}), the client "
                f"{hello.protocol} (flexp {hello.program}). Install the same version on both."
            )
        if self.floor.recipe.mode == "exact" and _minor(hello.torch) != _minor(torch.__version__):
            raise LinkError(
                f"The recipe's mode is exact: all need one torch. This server has "
                f"{torch.__version__}, the client {hello.torch}."
            )
        call.name = name_of(call, hello.name, self.authority)
        call.wire = self.floor.recipe.link.of(call.name)
        resumed = False
        if self.stage is not None:
            known, guest = hello.server == self.server, self.stage.engine.guests[call.name]
            if guest.call is not None and guest.process != hello.process:
                self.say(f"{call.name}: another process takes its place")
            resumed = self.stage.engine.guests.attach(call, hello.process, knows_server=known)
            if resumed:
                self.stage.engine.guests.go_on(call, hello.order)
        if resumed:
            return Welcome(self.server, resumed=True)
        recipe = self.floor.recipe
        return Welcome(
            self.server,
            False,
            call.name,
            recipe.model_dump_json(),
            recipe.hash(),
            self.manifest.digest,
            tokenizer_digest(self.floor.tokenizer),
            (self.floor.source / "config.json").read_text("utf-8"),
        )

    def _enroll(self, call: Call, asked: Enroll) -> Body:
        if self.authority is None or call.certificate is None:
            raise IdentityError(
                "Nobody can enrol at this server: it was started without --ca FOLDER."
            )
        made = self.authority.admit(asked.csr, call.certificate)
        self.say(f"{who(made).name} has enrolled")
        return Data(made)

    def _propose(self, call: Call, device: Measured) -> Body:
        entry = msgspec.convert(msgspec.structs.asdict(device), Entry)
        with self.changed:
            if self.stage is not None and call.name in self.stage.fleet.placed:
                placed = self.stage.fleet.placed[call.name]
                return Proposal(placed.seat, placed.bytes, {}, placed.reason, final=True)
            placed, parts = self.floor.propose(call.name, self.roster, entry)
            known = self.roster.entries.get(call.name, entry)
            kept: dict[str, Any] = {
                "rows": known.rows,
                "space": known.space,
                "accepted": known.accepted,
            }
            # Not on the roster yet: nobody takes part who has not agreed.
            self.measured[call.name] = replace(entry, **kept)
        started = self.roster.started
        return Proposal(placed.seat, placed.bytes, dict(parts), placed.reason, final=started)

    def _ready(self, call: Call, ready: Ready) -> Body:
        if ready.accepted != self.floor.recipe.hash():
            raise LinkError(
                f"The client agreed to recipe {ready.accepted[:12]}, but this run is "
                f"{self.floor.recipe.hash()[:12]}. Look at the new one and agree again."
            )
        with self.changed:
            entry = self.measured.get(call.name) or self.roster.entries.get(call.name)
            if entry is None:
                raise LinkError("Say first what the device has.")
            told: dict[str, Any] = {
                "rows": ready.rows,
                "space": ready.space,
                "accepted": ready.accepted,
            }
            self.roster.set(call.name, replace(entry, **told))
            self.roster.write(self.floor.recipe)
            again = call.name in self.here
            self.here.add(call.name)
            train = ready.rows[0]
            self.say(f"{call.name} is {'back' if again else 'here'}: {train} rows for training")
            if self.stage is None:
                old = self.calls.get(call.name)
                self.calls[call.name] = call
                if old is not None and old is not call:
                    self.say(f"{call.name}: another process takes its place")
                    replaced(old)
            else:
                self._let_in(call.name, call)
            self.changed.notify_all()
        return Noted()

    def _let_in(self, name: str, call: Call) -> None:
        """Tells a client its seat, and what it is to do if an order waits for it."""
        stage = self._stage()
        if name not in stage.fleet.placed:  # late: it comes in with the next round
            self.calls[name] = call
            return
        placed = stage.fleet.placed[name]
        labels = labels_of(self.floor.recipe, self.roster.entries)
        call.tell(Begin(placed.seat, placed.bytes, placed.reason, labels))
        entry = self.roster.entries[name]
        engine = stage.engine
        if engine.guests[name].call is not call:
            engine.guests.attach(call, "", knows_server=False)
        engine.ready(call, entry.rows[0])
        if self.over is not None:
            call.tell(self.over)

    def _read(self, asked: Read) -> Body:
        size = max(0, min(asked.size, STEP))
        if not asked.path:
            text = self.manifest.to_json().encode()
            head = len(text).to_bytes(8, "little")
            return Data(head + text[asked.begin : asked.begin + size])
        names = {*self.manifest.small, *(p.file for p in self.manifest.pieces.values())}
        return Data(read_part(self.floor.source, names, asked.path, max(0, asked.begin), size))

    def _stage(self) -> Stage[NetworkEngine]:
        if self.stage is None:
            raise LinkError("The run has not begun.")
        return self.stage

    def _engine(self) -> NetworkEngine:
        return self._stage().engine


def _minor(version: str) -> str:
    """Major and minor of a version, without the build."""
    return ".".join(version.split("+", maxsplit=1)[0].split(".")[:2])
