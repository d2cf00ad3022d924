"""Targets 4 and 11: steps that are carried out once, and what both sides go on from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from fuzz.draws import Draws, scratch

from flexp.client.store import StoredMemory
from flexp.errors import CheckpointError, StepError
from flexp.link.messages import Answer, Phase, StepKey
from flexp.server.steps import KEPT, StepTable

Sent = tuple[StepKey, str]


@dataclass
class World:
    """A client with its disk, a server with its checkpoints, and a way between that may fail.

    The server's part is ``StepTable`` and a list of what was applied. The rules it is held to are
    written here again, from the history alone: a key is carried out once, and answered alike.
    """

    folder: Path
    disk: StoredMemory = field(init=False)
    table: StepTable = field(default_factory=StepTable)
    log: tuple[tuple[str, ...], ...] = ()  # turns that counted
    applied: list[str] = field(default_factory=list[str])  # of the turn under way
    history: dict[StepKey, tuple[str, int]] = field(default_factory=dict[StepKey, tuple[str, int]])
    order: list[StepKey] = field(default_factory=list[StepKey])  # of first answers, in this life
    newest: tuple[int, int, int] = (-1, 0, 0)
    committed: tuple[int, int, int] = (-1, 0, 0)
    left: StepKey | None = None
    number: int = 0  # of the client's order
    saved: list[tuple[tuple[str, ...], ...]] = field(default_factory=lambda: [(), ()])
    floors: tuple[int, int] = (0, 0)
    mine: list[str] = field(default_factory=list[str])  # what the client has asked for
    sent: list[Sent] = field(default_factory=list[Sent])  # on this connection
    step: int = 0
    call: int = 0
    answers: int = 0

    def __post_init__(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.disk = StoredMemory(self.folder)
        self.begin()

    # ---- what happens

    def begin(self) -> None:
        """The server gives the client an order: both go on from the turns that count."""
        self.number += 1
        self.applied, self.table = [], StepTable()
        self.history, self.order = {}, []
        self.newest = self.committed = (-1, 0, 0)
        self.disk.open(len(self.log), self.floors[0])
        held = self.disk.facts.get("log", [])
        assert held == [list(turn) for turn in self.log], "the two sides differ after a resume"
        self.mine, self.sent, self.step, self.call = [], [], 0, 0

    def send(self, *, heard: bool = True, ahead: int = 0) -> None:
        """The client's next message, perhaps of a later step; its answer may get lost."""
        self.call += 1
        if ahead:
            self.step += ahead
        key = self.key("do")
        digest = f"op {self.number}.{self.call}"
        self.deliver(key, digest)
        self.mine.append(digest)
        if not heard:  # so it asks again, byte for byte
            self.deliver(key, digest)

    def key(self, phase: Phase) -> StepKey:
        return StepKey(f"run.{self.number}", len(self.log), 0, self.step, self.call, phase)

    def again(self, which: int, *, other: bool = False) -> None:
        """A message of this connection comes once more, or another one under its key."""
        if self.sent:
            key, digest = self.sent[which % len(self.sent)]
            self.deliver(key, f"{digest} changed" if other else digest)

    def failing(self) -> None:
        """A message that the server cannot carry out, and that leaves nothing."""
        before = self.facts()
        self.call += 1

        assert self.table.find(self.key("do"), "odd") is None
        assert self.facts() == before, "a message that failed has left something"

    def leave(self) -> None:
        """The turn is over: on the client's disk first, then at the server, once."""
        self.disk.facts["log"] = [*map(list, self.log), list(self.mine)]
        self.disk.settle()
        self.call += 1
        key = self.key("leave")
        self.deliver(key, "leave")
        if self.left != key:
            assert self.applied == self.mine, "what was asked for is not what was done"
            self.log = (*self.log, tuple(self.applied))
            self.left = key
        self.disk.commit()
        self.begin()

    def save(self) -> None:
        """The server writes a checkpoint, and forgets the answers to the step that is over."""
        self.saved = [self.saved[1], self.log]
        self.floors = (self.floors[1], len(self.log))
        self.table.commit()
        self.order, self.committed, self.step = [], self.newest, self.step + 1

    def kill_client(self, *, while_settling: bool = False) -> None:
        """A new process begins the order anew, with what is on its disk."""
        if while_settling:  # the turn is on its disk, and the server has not heard of it
            self.disk.facts["log"] = [*map(list, self.log), list(self.mine)]
            self.disk.settle()
        self.disk = StoredMemory(self.folder)
        self.begin()

    def kill_server(self, *, damaged: bool = False) -> None:
        """A new server begins with its newest whole checkpoint, and knows no message."""
        self.log, self.left, self.floors = self.saved[0 if damaged else 1], None, (0, 0)
        self.saved = [self.log, self.log]
        self.begin()

    # ---- the server, and what it must do

    def deliver(self, key: StepKey, digest: str) -> None:
        wanted = self.expected(key, digest)
        before, ran = self.facts(), len(self.applied)

        def run() -> Answer:
            self.answers += 1
            if key.phase == "do":
                self.applied.append(digest)
            return Answer(facts={"n": self.answers})

        try:
            answer = self.table.find(key, digest)
            if answer is None:
                answer = run()
                self.table.keep(key, digest, answer)
            got = answer.facts["n"]
        except StepError:
            assert wanted is None, f"{key} was refused"
            assert self.facts() == before, "a refused message has changed something"
            return
        assert wanted is not None, f"{key} was not refused"
        if wanted:
            assert got == wanted, "a repeated message got another answer"
            assert len(self.applied) == ran, "a repeated message was carried out again"
        else:
            assert got == self.answers
            self.history[key] = (digest, self.answers)
            at = (key.round, key.wave, key.step)
            if at > self.newest:
                self.newest, self.order = at, []
            self.order.append(key)
            self.sent.append((key, digest))

    def expected(self, key: StepKey, digest: str) -> int | None:
        """None: refused. 0: carried out. Else the number of the answer that it got before."""
        at = (key.round, key.wave, key.step)
        if key in self.history and at == self.newest and key in self.order:
            seen, number = self.history[key]
            return number if seen == digest and key in self.order[-KEPT:] else None
        return 0 if self.newest <= at and at > self.committed else None

    def facts(self) -> tuple[object, ...]:
        rows = {k: (d, a is None) for k, (d, a) in self.table.rows.items()}
        return tuple(self.applied), rows, self.table.latest, self.table.committed


def run_steps(data: bytes) -> None:
    """Everything that a network and two kills can do, in any order."""
    draws, world = Draws(data), World(scratch() / "world")
    rules: tuple[Callable[[], None], ...] = (
        world.send,
        lambda: world.send(heard=False),
        lambda: world.send(ahead=draws.whole(1, 3)),
        lambda: world.again(draws.whole(0, 99)),
        lambda: world.again(draws.whole(0, 99), other=True),
        world.failing,
        world.leave,
        world.save,
        world.kill_client,
        lambda: world.kill_client(while_settling=True),
        world.kill_server,
        lambda: world.kill_server(damaged=True),
    )
    for _ in range(60):
        if not draws.more:
            break
        draws.choose(rules)()
    world.leave()


# ---- 11: which turn both have


def run_resume(data: bytes) -> None:
    """Any turns on a disk, any that the server says: what both have, or a refusal that says so."""
    draws, folder = Draws(data), scratch() / "turns"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    numbers = (0, 1, 2, 3, 7, 999_999, 1_000_000)
    held = {n for n in numbers[1:] if draws.whole(0, 1)}
    writer = StoredMemory(folder)
    for n in held:
        writer.put("slot/personal", {"w": torch.tensor(float(n))})
        writer.facts["turn"], writer.turns = n, n - 1
        writer.settle()
    strays = ("1.parcel", "x.parcel", "000001.parcel.bak", ".000009.parcel.a.tmp", "0000007.parcel")
    for name in strays:
        if not draws.whole(0, 3):
            (folder / name).write_bytes(draws.take(8))
    asked, floor = draws.choose((*numbers, -1, 4)), draws.choose((*numbers, -5))
    memory = StoredMemory(folder)
    assert set(memory.held()) == held
    before = {p.name for p in folder.iterdir()}
    try:
        memory.open(asked, floor)
    except CheckpointError as problem:
        assert asked not in held | {0}, "refused what both have"
        assert str(asked) in str(problem)
        assert str(folder) in str(problem)
        assert {p.name for p in folder.iterdir()} == before, "a refusal has thrown something away"
        return
    assert asked in held | {0}, "went on from what is not there"
    assert (memory.turns, memory.facts.get("turn", 0)) == (asked, asked)
    assert set(memory.held()) == {n for n in held if n >= min(floor, asked)}
    memory.facts["turn"] = asked + 1
    memory.settle()
    memory.commit()
    again = StoredMemory(folder)
    again.open(asked + 1)
    assert again.facts["turn"] == asked + 1


def scripts() -> list[bytes]:
    """Something to begin with: any bytes are a script."""
    return [bytes(range(n, n + 40)) for n in range(0, 200, 20)] + [b"", bytes(60)]
