"""The log holds what was written, survives a kill, and goes back to a checkpoint."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexp import events
from flexp.errors import CheckpointError, FlexpError
from flexp.events import (
    Checkpointed,
    Event,
    Interleaved,
    Merged,
    Noted,
    Recorder,
    RoundStarted,
    RunEnded,
    RunStarted,
    Scored,
    SeatMoved,
    SeatTaken,
    Stream,
    TurnEnded,
    TurnFailed,
    WentAlone,
    read,
    read_timed,
)

ONE_OF_EACH: list[Event] = [
    RunStarted("demo", "fedavg", 7, "exact", "ab12", {"torch": "2.13", "threads": [1, None]}),
    SeatTaken("c0", "phone", 2, 1, "keep", 600_000_000, "3 of 6 blocks fit"),
    SeatMoved(0, "c1", "laptop", 3, 2, "keep", 900_000_000, "5 of 6 blocks fit"),
    RoundStarted(0, ("c0", "c1")),
    WentAlone(0, "c2"),
    TurnEnded(0, 0, "c0", 0.1 + 0.2, 5, 1.5, 1024, 2048),
    TurnFailed(0, 0, "c1", 'out of "memory"\nat block 3'),
    Merged(0, 0, ("c0",)),
    Interleaved(0, 0, ("c0", "c1", "c0")),
    Scored(0, "all", "personal/own", "accuracy", 1 / 3),
    Checkpointed(0, "checkpoint/round-0"),
    Noted("warning", "päper ☂"),
    RunEnded(1, 2.0),
]


def clock() -> float:
    return 12.5


def record(path: Path, written: list[Event]) -> None:
    with Recorder(path, clock) as recorder:
        for event in written:
            recorder(event)


def one_round(number: int) -> list[Event]:
    return [
        RoundStarted(number, ("c0",)),
        TurnEnded(number, 0, "c0", 0.5, 1, 0.1, 10, 20),
        Merged(number, 0, ("c0",)),
        Checkpointed(number, f"round-{number}"),
    ]


def test_every_event_comes_back_as_it_was_written(tmp_path: Path) -> None:
    assert {type(event) for event in ONE_OF_EACH} == set(Event.__args__)
    path = tmp_path / "run" / "events.jsonl"
    record(path, ONE_OF_EACH)
    assert list(read(path)) == ONE_OF_EACH
    assert [at for at, _ in read_timed(path)] == [12.5] * len(ONE_OF_EACH)


def test_a_line_is_one_plain_json_object(tmp_path: Path) -> None:
    record(tmp_path / "e", [RoundStarted(3, ("c0", "c1"))])
    assert (tmp_path / "e").read_text() == (
        '{"event": "RoundStarted", "at": 12.5, "round": 3, "clients": ["c0", "c1"]}\n'
    )


@settings(deadline=None)
@given(st.floats(), st.text())
def test_any_float_and_any_text_survive(loss: float, text: str) -> None:
    event = TurnEnded(0, 0, text, loss, 1, 1, 1, 1)
    line = events._line(event, 0.0)
    plain = json.loads(line, parse_constant=pytest.fail)
    assert (plain["loss"] is None) == math.isnan(loss)
    assert plain["client"] == text
    assert line.count(b"\n") == 1
    _, got = events._parse(line, "log", 1)
    assert isinstance(got, TurnEnded)
    assert got.client == text
    assert got.loss == loss or (math.isnan(got.loss) and math.isnan(loss))
    assert type(got.seconds) is float


def test_facts_that_are_not_finite_are_null(tmp_path: Path) -> None:
    facts: dict[str, Any] = {"speed": {"here": math.inf}, "rows": [1, math.nan]}
    record(tmp_path / "e", [RunStarted("demo", "fedavg", 7, "exact", "ab12", facts)])
    (got,) = read(tmp_path / "e")
    assert isinstance(got, RunStarted)
    assert got.facts == {"speed": {"here": None}, "rows": [1, None]}


def test_an_event_is_in_the_file_before_the_next_is_written(tmp_path: Path) -> None:
    with Recorder(tmp_path / "e", clock) as recorder:
        for count, event in enumerate(ONE_OF_EACH, 1):
            recorder(event)
            assert list(read(tmp_path / "e")) == ONE_OF_EACH[:count]


def test_the_times_are_the_clock_s(tmp_path: Path) -> None:
    ticks = itertools.count(100)
    with Recorder(tmp_path / "e", lambda: next(ticks)) as recorder:
        recorder(RunEnded(1, 1.0))
        recorder(RunEnded(2, 1.0))
    assert [at for at, _ in read_timed(tmp_path / "e")] == [100.0, 101.0]


def test_a_log_cut_at_any_byte_is_read_and_continued(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    record(whole, one_round(0))
    data = whole.read_bytes()
    for size in range(len(data) + 1):
        path = tmp_path / "torn"
        path.write_bytes(data[:size])
        complete = data[:size].count(b"\n")
        assert list(read(path)) == one_round(0)[:complete]
        record(path, [RunEnded(1, 1.0)])
        assert list(read(path)) == [*one_round(0)[:complete], RunEnded(1, 1.0)]


@pytest.mark.parametrize("killed_after", range(12))
def test_a_resumed_log_equals_the_unbroken_one(tmp_path: Path, killed_after: int) -> None:
    unbroken = [event for number in range(3) for event in one_round(number)]
    written = unbroken[:killed_after]
    record(tmp_path / "e", written)
    done = [event.round for event in written if isinstance(event, Checkpointed)]
    if not done:
        return
    with Recorder(tmp_path / "e", clock) as recorder:
        assert recorder.rewind(done[-1])
        assert list(read(tmp_path / "e")) == unbroken[: 4 * len(done)]
        for event in unbroken[4 * len(done) :]:
            recorder(event)
    assert list(read(tmp_path / "e")) == unbroken


def test_a_kill_between_a_checkpoint_and_its_event_is_noticed(tmp_path: Path) -> None:
    record(tmp_path / "e", [*one_round(0), *one_round(1)[:-1]])
    with Recorder(tmp_path / "e", clock) as recorder:
        assert not recorder.rewind(1)
        recorder(one_round(1)[-1])
    assert list(read(tmp_path / "e")) == [*one_round(0), *one_round(1)]


def test_a_round_is_on_the_disk_before_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut there would else be a checkpoint that the log does not know."""
    synced: list[bytes] = []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append((tmp_path / "e").read_bytes()))
    record(tmp_path / "e", one_round(0))
    assert b'"Merged"' in synced[0].splitlines()[-1]
    assert b'"Checkpointed"' not in synced[0]


def test_rewinding_to_a_round_without_checkpoint_changes_nothing(tmp_path: Path) -> None:
    record(tmp_path / "e", one_round(0))
    with Recorder(tmp_path / "e", clock) as recorder:
        with pytest.raises(CheckpointError, match="no checkpoint of round 5"):
            recorder.rewind(5)
        with pytest.raises(CheckpointError):
            recorder.rewind(-2)
        recorder(RunEnded(1, 1.0))
    assert list(read(tmp_path / "e")) == [*one_round(0), RunEnded(1, 1.0)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"event": "RunEnder", "at": 1}', 'line 2: unknown event "RunEnder". Did you mean "RunEn'),
        ('{"at": 1}', 'line 2: unknown event ""'),
        ("[]", "line 2: unknown event"),
        ("{oops", "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ("\xff", "line 2 is not JSON"),
        ('{"event": "RunEnded", "at": 1, "rounds": 1}', r"no RunEnded .*\['rounds'\] instead of"),
        (
            '{"event": "RunEnded", "rounds": 1, "seconds": 1}',
            "line 2: this is no RunEnded .*'' is no float",
        ),
        (
            '{"event": "RunEnded", "at": 1, "rounds": "1", "seconds": 1}',
            "line 2: this is no RunEnded .*'1' is no int",
        ),
        ('{"event": "RunEnded", "at": 1, "rounds": true, "seconds": 1}', "True is no int"),
        ('{"event": "RunEnded", "at": 1, "rounds": 1, "seconds": "soon"}', "'soon' is no float"),
        (
            '{"event": "Merged", "at": 1, "round": 1, "wave": 0, "clients": "c0"}',
            "'c0' is no tuple",
        ),
        (
            '{"event": "Merged", "at": 1, "round": 1, "wave": 0, "clients": [0]}',
            "0 is no str",
        ),
        ('{"event": "RunEnded", "at": 1, "rounds": 1, "seconds": 1, "x": 1}', "'x'. instead of"),
    ],
)
def test_a_line_that_is_no_event_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "events.jsonl"
    record(path, [RoundStarted(0, ())])
    path.write_bytes(path.read_bytes() + line.encode("latin-1") + b"\n")
    with pytest.raises(FlexpError, match=message) as caught:
        list(read(path))
    assert "events.jsonl, line 2" in str(caught.value)


def test_all_sinks_get_all_later_events_in_order() -> None:
    stream, first, second = Stream(), list[Event](), list[Event]()
    stream.subscribe(first.append)
    stream.write(ONE_OF_EACH[0])
    stream.subscribe(second.append)
    for event in ONE_OF_EACH[1:]:
        stream.write(event)
    assert first == ONE_OF_EACH
    assert second == ONE_OF_EACH[1:]


def test_every_event_says_when_it_is_written() -> None:
    for kind in Event.__args__:
        assert kind.__doc__
        assert not kind.__doc__.startswith(f"{kind.__name__}(")  # what dataclass writes by itself
        assert not {f.name for f in fields(kind)} & {"event", "at"}


def test_reading_a_log_loads_no_training_code() -> None:
    source = str(Path(events.__file__).parents[1])
    code = f"import sys; sys.path.insert(0, {source!r}); import flexp.events; "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
