"""What an operator sees of clients and of the machine, and how little of it there can be."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fixtures_clock import Clock
from msgspec import structs
from network.cluster import CLIENTS, Cluster, Recipe, until
from network.fake import Fake

from flexp.engine.guests import Guests, Job, Policy
from flexp.events import Event, Noted, RoundStarted, RunEnded
from flexp.link.control import Begin, Order
from flexp.link.listen import Call
from flexp.link.rate import Buckets, Rate
from flexp.model.cut import Cut, Seat
from flexp.serving.log import Log
from flexp.serving.sieve import Sieve
from flexp.serving.watch import LOW, Watch

FAR = Seat(Cut(1, 1))


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def log(said: list[str], clock: Clock) -> Log:
    return Log(said.append, lines=Buckets(Rate(3, 1), clock))


# ---- the log


def test_of_one_peer_there_is_a_line_a_second_and_the_rest_is_counted(
    log: Log, said: list[str], clock: Clock
) -> None:
    for n in range(10_000):
        log.alert("mallory", f"refused {n}")
    log.note("anna", "anna is connected again")
    assert said == ["refused 0", "refused 1", "refused 2", "anna is connected again"]
    clock.now = 1.0
    log.alert("mallory", "refused once more")
    assert said[-1] == "refused once more (9997 lines before it were left out)"
    clock.now = 2.0
    log.note("mallory", "mallory is connected again")
    assert said[-1] == "mallory is connected again"


def test_very_many_peers_are_no_way_around_it(log: Log, said: list[str]) -> None:
    for n in range(10_000):
        log.alert(f"peer {n}", "refused")
    assert len(said) < 1100
    assert len(log.left) <= 1024


def test_warnings_are_events_while_the_run_goes_on(log: Log, said: list[str]) -> None:
    events: list[Event] = []
    log.stream.subscribe(log)
    log.stream.subscribe(events.append)
    log.alert("a", "before it has begun")
    log.stream.write(RoundStarted(0, ("anna",)))
    log.alert("b", "in it")
    log.note("b", "no warning")
    log.stream.write(RunEnded(1, 2.0))
    log.alert("c", "after it")
    assert said == ["before it has begun", "no warning", "after it"]
    assert [e for e in events if isinstance(e, Noted)] == [Noted("warning", "in it")]


def test_a_warning_after_the_run_has_broken_off_is_a_line(log: Log, said: list[str]) -> None:
    def closed(event: Event) -> None:
        if type(event) is Noted:
            raise ValueError("write to closed file")

    log.stream.subscribe(log)
    log.stream.subscribe(closed)
    log.stream.write(RoundStarted(0, ("anna",)))
    log.alert("a", "what happened")
    assert said == ["what happened"]


# ---- what gRPC writes by itself


def test_lines_of_grpc_are_sieved_and_all_else_passes(
    log: Log, said: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    raw = b"I1126 20:17:10.6 12202 ssl_transport_security.cc:25] Handshake failed with error X\n"
    with Sieve(log):
        os.write(2, b"an ordinary line\n")
        for _ in range(5000):
            os.write(2, raw)
        os.write(2, b"F1126 20:17:10.6 1 a.cc:1] fatal\n")
        print("of Python", file=sys.stderr)
    os.write(2, raw)
    assert said == ["Handshake failed with error X"] * 3
    assert log.left == {"grpc": 4997}
    lines = capfd.readouterr().err.splitlines()
    assert sorted(lines) == sorted(
        ["an ordinary line", "of Python", "F1126 20:17:10.6 1 a.cc:1] fatal", raw.decode().strip()]
    )


# ---- the watch


class Room:
    """A reception with one client at work, whose graphs are swept how often is counted."""

    def __init__(self, clock: Clock) -> None:
        self.guests, self.swept = Guests(Policy(), clock), 0
        pending = SimpleNamespace(sweep=self.sweep)
        self.stage = SimpleNamespace(
            engine=SimpleNamespace(
                guests=self.guests,
                trunk=SimpleNamespace(pending=pending),
                backbone=SimpleNamespace(depth=4),
            )
        )
        self.call = Call(None, "ipv4:127.0.0.1:5")
        self.call.name, self.call.process, self.call.heard = "anna", "p", 0.0
        self.order = Order(1, "train", FAR)
        self.guests.attach(self.call)
        self.guests.seated(self.call)
        self.guests.give(self.job(self.order))

    def sweep(self) -> None:
        self.swept += 1

    def job(self, order: Order) -> Job:
        work: Any = SimpleNamespace(client="anna")
        return Job(work, {}, order, SimpleQueue(), 0.0)


@pytest.fixture
def room(clock: Clock) -> Room:
    return Room(clock)


@pytest.fixture
def watch(room: Room, log: Log, clock: Clock, tmp_path: Path) -> Watch:
    return Watch(cast("Any", room), tmp_path, log, still=60.0, clock=clock)


def test_a_client_that_stands_still_is_told_once(
    watch: Watch, room: Room, said: list[str], clock: Clock
) -> None:
    clock.now = 60.0
    watch.look()
    assert not said
    clock.now = 61.0
    watch.look()
    watch.look()
    assert said == [
        "anna is connected, but nothing has come of its turn for 60 seconds; the others wait for it"
    ]
    room.call.heard = 100.0
    clock.now = 150.0
    watch.look()
    assert len(said) == 1
    clock.now = 161.0
    watch.look()
    assert len(said) == 2
    assert room.swept == 5


@pytest.mark.parametrize(
    "order",
    [Order(1, "speak", FAR), Order(1, "train", Seat(Cut(4, 0)))],
    ids=["talks", "has all on its device"],
)
def test_who_need_not_say_anything_may_be_silent(
    watch: Watch, room: Room, said: list[str], clock: Clock, order: Order
) -> None:
    room.guests.give(room.job(order))
    clock.now = 1e6
    watch.look()
    assert not said


def test_who_has_nothing_to_do_or_is_not_there_does_not_stand_still(
    watch: Watch, room: Room, said: list[str], clock: Clock
) -> None:
    clock.now = 1e6
    room.guests.gone(room.call)
    watch.look()
    assert room.guests.resumes(room.call, knows_server=True)
    room.guests.end(room.guests["anna"].job or room.job(room.order))
    watch.look()
    assert not said


def test_a_disk_that_fills_up_is_told_until_there_is_room_again(
    watch: Watch, said: list[str], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = LOW - 1

    def usage(path: Path) -> Any:
        return SimpleNamespace(free=free)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    watch.look()
    watch.look()
    assert len(said) == 1
    assert "make room" in said[0]
    free = LOW
    watch.look()
    free = 0
    watch.look()
    assert len(said) == 2


def test_a_look_that_fails_does_not_end_the_watch(
    watch: Watch, room: Room, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    monkeypatch.setattr("flexp.serving.watch.EVERY", 0.001)
    again = threading.Event()

    def sweep() -> None:
        room.swept += 1
        if room.swept > 2:
            again.set()
        raise RuntimeError("odd")

    room.sweep = sweep
    room.stage.engine.trunk.pending.sweep = sweep
    watch.start()
    assert again.wait(20)
    watch.stop()
    assert "RuntimeError: odd" in said[0]


# ---- a server


def test_what_a_server_has_refused_is_a_warning_of_its_run(
    cluster: Cluster, recipe_of: Recipe, mine: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(out=str(tmp_path / "served"))
    server = cluster.serve(recipe, "--clients", ",".join(CLIENTS[:2]))
    other = cluster.join(CLIENTS[1], mine / f"{CLIENTS[1]}.jsonl")
    with Fake(cluster.port) as fake:
        fake.come_in(CLIENTS[0])
        fake.told(Begin)
        order = fake.told(Order)
        fake.say(structs.replace(order))
        fake.refusal()
        events = tmp_path / "served" / "mine" / "events.jsonl"

        def warned() -> list[str]:
            told = [json.loads(line) for line in events.read_text("utf-8").splitlines()]
            return [e["text"] for e in told if e["event"] == "Noted" and e["level"] == "warning"]

        until(lambda: any("refused anna" in text for text in warned()), "it", 30, server.text)
    assert not other.over()
