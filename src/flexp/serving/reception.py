"""Who may come in, and what everybody is told: the calls of a run, from hello to goodbye."""

from __future__ import annotations

import secrets
import threading
from dataclasses import dataclass, field, replace
from functools import cached_property
from queue import SimpleQueue
from typing import Any, get_args

import msgspec

from flexp.data.tokens import tokenizer_digest
from flexp.engine.guests import replaced
from flexp.engine.network import NetworkEngine
from flexp.errors import FlexpError, LinkError
from flexp.link.control import (
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
    Refused,
    Welcome,
)
from flexp.link.frame import Body
from flexp.link.listen import Call
from flexp.link.messages import Message
from flexp.model.files import Manifest, manifest, read_part
from flexp.server.thread import Ended
from flexp.serving.floor import Floor, labels_of, space_in
from flexp.serving.gate import Gate
from flexp.serving.roster import WAITS, Entry, Roster
from flexp.stage import Say, Stage

ECHO = 1_000_000
STEP = 1 << 19  # bytes of a file in one answer
STEPS = get_args(Message)


@dataclass(frozen=True)
class Late:
    """Who came after the end, and for what: so many turns of its own, or to talk."""

    name: str
    entry: Entry | None
    more: int = 0
    speaks: bool = False


@dataclass
class Reception:
    """Answers every call of one run; before the quorum is there it only enters names."""

    floor: Floor
    roster: Roster
    say: Say
    gate: Gate
    stage: Stage[NetworkEngine] | None = None
    over: End | None = None
    late: SimpleQueue[Late] = field(default_factory=SimpleQueue[Late])  # after the end
    server: str = field(default_factory=lambda: secrets.token_hex(8))
    calls: dict[str, Call] = field(default_factory=dict[str, Call])  # who waits for the beginning
    devices: dict[str, Entry] = field(default_factory=dict[str, Entry])  # of who has not agreed
    asking: set[Call] = field(default_factory=set[Call])  # whose owners have not agreed yet
    here: set[str] = field(default_factory=set[str])
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
                self.roster.begin(names or frozenset(self.here))
                self.roster.write(self.floor.recipe)

    def open(self, stage: Stage[NetworkEngine]) -> None:
        """A round begins with these: everybody of them who waits is told where it sits."""
        with self.changed:
            self.stage = stage
            for name in sorted(self.calls.keys() & stage.fleet.placed.keys()):
                self._seat(name, self.calls.pop(name))

    def close(self, end: End) -> None:
        """The run is over: who is here is told. For who waits for a next round there is none."""
        with self.changed:
            self.over = end
            for name in self.calls:
                self.late.put(Late(name, self.roster.entries[name]))
            if self.stage is not None:
                for call in self.stage.engine.guests.present():
                    if self.calls.get(call.name) is not call:
                        call.tell(end)

    def dismiss(self) -> None:
        """The server ends: who was still asking its owner need not wait for an answer."""
        for call in self.asking.copy():
            call.tell(Refused("The run is over, and its server has ended."))
            call.close()

    # ---- for the calls' threads

    def answer(self, call: Call, body: Body, digest: str) -> Body:
        """The answer to a frame; a FlexpError ends the call with its text."""
        if isinstance(body, Hello):
            return self._hello(call, body)
        if isinstance(body, Enroll):
            return self.gate.enroll(call, body)
        if not call.name:
            raise LinkError("Say hello first.")
        try:
            answer = self._ask(call, body, digest)
        except Ended as problem:  # who was in goes on with the server that is started next
            return Refused(str(problem), again=True)
        except FlexpError as problem:
            answer = Problem(type(problem).__name__, str(problem))
        if isinstance(answer, Problem):
            self.refused(call, answer.text)
        return answer

    def refused(self, call: Call, text: str) -> None:
        """Something that a client said was refused: whoever runs the server reads why."""
        who_asked = f"{call.name} ({call.address})" if call.name else call.address
        self.gate.log.alert(call.name or call.peer, f"refused {who_asked}: {text}")

    def gone(self, call: Call) -> None:
        """A call has ended."""
        self.asking.discard(call)
        with self.changed:
            if self.calls.get(call.name) is call:
                del self.calls[call.name]
                if self.stage is None:
                    self.here.discard(call.name)
                    self.gate.log.note(call.name, f"{call.name} has gone before the beginning")
            self.changed.notify_all()
        if self.stage is not None and self.stage.engine.guests.gone(call) and self.over is None:
            self.gate.log.note(call.name, f"{call.name} has lost its connection")

    def _ask(self, call: Call, body: Body, digest: str) -> Body:
        if isinstance(body, STEPS):
            return self._engine().message(call, body, digest)  # pyright: ignore[reportArgumentType]
        if isinstance(body, Outcome):
            return self._engine().outcome(call, body)
        if isinstance(body, Measured):
            return self._propose(call, body)
        if isinstance(body, Ready):
            return self._ready(call, body)
        if isinstance(body, Read):
            source, size = self.floor.source, max(0, min(body.size, STEP))
            return Data(read_part(source, self.manifest, body.path, body.begin, size))
        if isinstance(body, Echo):
            return Data(bytes(min(body.back, ECHO)))
        if isinstance(body, Bye):
            if self.stage is not None:
                self.stage.engine.guests.left(call, back=body.back)
            told = f"gives up: {body.why:.80}" if body.why else "has left; it may come back"
            self.gate.log.note(call.name, f"{call.name} {told}")
            return Noted()
        raise LinkError(f'A client does not say "{type(body).__name__}".')

    def _hello(self, call: Call, hello: Hello) -> Body:
        self.gate.check(hello)
        name = self.gate.name(call, hello.name)
        speaks = hello.wants == "speak"
        if speaks and self.stage is None:
            return Refused("The server is about to begin.", again=True)
        if speaks and (self.over is None or name not in self._stage().fleet.placed):
            raise LinkError(
                f"{name} cannot talk through this server: "
                + ("the run goes on." if self.over is None else "it has taken part in no run here.")
            )
        recipe = self.floor.recipe
        call.name, call.process, call.speaks = name, hello.process, speaks
        call.wire = recipe.link.of(name)
        guests = None if self.stage is None else self.stage.engine.guests
        # Who has heard no order may not have heard its seat either.
        known = hello.server == self.server and hello.order > 0
        if guests is not None and guests.resumes(call, knows_server=known):
            guests.go_on(call, hello.order)
            if self.over is not None and guests[name].job is None:
                call.tell(self.over)
            self.gate.log.note(name, f"{name} is connected again")
            return Welcome(self.server, resumed=True)
        self.asking.add(call)
        return Welcome(
            self.server,
            False,
            name,
            recipe.model_dump_json(),
            recipe.hash(),
            self.manifest.digest,
            tokenizer_digest(self.floor.tokenizer),
            (self.floor.source / "config.json").read_text("utf-8"),
        )

    def _propose(self, call: Call, device: Measured) -> Body:
        entry = msgspec.convert(msgspec.structs.asdict(device), Entry)
        with self.changed:
            if self.stage is not None and call.name in self.stage.fleet.placed:
                placed = self.stage.fleet.placed[call.name]
                return Proposal(placed.seat, placed.bytes, {}, placed.reason, final=True)
            placed, parts = self.floor.propose(call.name, self.roster, entry)
            self.devices[call.name] = entry
        started = self.roster.started
        return Proposal(placed.seat, placed.bytes, dict(parts), placed.reason, final=started)

    def _ready(self, call: Call, ready: Ready) -> Body:
        if ready.accepted != self.floor.recipe.hash():
            raise LinkError(
                f"The client agreed to recipe {ready.accepted[:12]}, but this run is "
                f"{self.floor.recipe.hash()[:12]}. Look at the new one and agree again."
            )
        self.asking.discard(call)
        if call.speaks:
            self.late.put(Late(call.name, None, speaks=True))
            self._seat(call.name, call)
            return Noted()
        with self.changed:
            known = self.roster.entries.get(call.name)
            entry = self.devices.get(call.name) or known
            if self.roster.started and call.name in self.roster.members():
                entry = known  # its device is that of the plan, whatever it measures now
            if entry is None:
                raise LinkError("Say first what the device has.")
            told: dict[str, Any] = {
                "rows": ready.rows,
                "space": space_in(self.floor, self.roster, call.name, ready.space),
                "accepted": ready.accepted,
            }
            entry = replace(entry, **told)
            again = call.name in self.here
            self.here.add(call.name)
            train = ready.rows[0]
            back = "back" if again else "here"
            self.gate.log.note(call.name, f"{call.name} is {back}: {train} rows for training")
            if self.over is not None:
                job = self._stage().engine.guests[call.name].job
                if job is not None and job.order.kind != "speak":
                    self._seat(call.name, call)  # it goes on with what it was at
                    return Noted()
                self.calls[call.name] = call
                self.late.put(Late(call.name, entry, ready.more))
                return Noted()
            if self.roster.started and call.name not in self.roster.members():
                entry = replace(entry, joins=WAITS)
            self.roster.set(call.name, entry)
            self.roster.write(self.floor.recipe)
            if self.stage is None or call.name not in self.stage.fleet.placed:
                # until the beginning, or the next round
                old = self.calls.get(call.name)
                self.calls[call.name] = call
                if old is not None and old is not call:
                    self.gate.log.note(call.name, f"{call.name}: another process takes its place")
                    replaced(old)
            else:
                self._seat(call.name, call)
            self.changed.notify_all()
        return Noted()

    def _seat(self, name: str, call: Call) -> None:
        """Tells a client its seat, and what it is to do if an order waits for it."""
        stage = self._stage()
        placed = stage.fleet.placed[name]
        labels = labels_of(self.floor.recipe, self.roster.entries)
        call.tell(Begin(placed.seat, placed.reason, labels))
        if stage.engine.guests.attach(call):
            self.gate.log.note(name, f"{name}: another process takes its place")
        known = self.roster.entries.get(name)
        stage.engine.ready(call, 0 if known is None else known.rows[0])

    def _stage(self) -> Stage[NetworkEngine]:
        if self.stage is None:
            raise LinkError("The run has not begun.")
        return self.stage

    def _engine(self) -> NetworkEngine:
        return self._stage().engine
