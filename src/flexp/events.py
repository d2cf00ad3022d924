"""Typed events, the append-only JSONL recorder, sinks that subscribe."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from flexp.errors import CheckpointError, FlexpError, nearest
from flexp.plain import json_text

if TYPE_CHECKING:  # so that a report can read events without loading torch
    from flexp.parcel import Facts


@dataclass(frozen=True)
class RunStarted:
    """Once, before anything else; ``facts`` holds the model and its weights."""

    name: str
    method: str
    seed: int
    mode: str
    recipe_hash: str
    facts: Facts


@dataclass(frozen=True)
class SeatTaken:
    """When a client has been given its cut; ``memory_bytes`` is the prediction, with its reason."""

    client: str
    device: str
    front: int
    back: int
    labels: str
    memory_bytes: int
    reason: str


@dataclass(frozen=True)
class SeatMoved:
    """When a client sits elsewhere from this round on; the fields are those of ``SeatTaken``."""

    round: int
    client: str
    device: str
    front: int
    back: int
    labels: str
    memory_bytes: int
    reason: str


@dataclass(frozen=True)
class WentAlone:
    """When a client trains without the server in this round; nothing of its turn is merged."""

    round: int
    client: str


@dataclass(frozen=True)
class RoundStarted:
    """When a round's clients have been chosen; in an empty round nobody was there."""

    round: int
    clients: tuple[str, ...]


@dataclass(frozen=True)
class TurnEnded:
    """When a client's reply has arrived; bytes and seconds are those of the whole turn.

    ``kinds`` are the bytes by way and kind of tensor, as "up hidden". ``measured`` holds
    near_flops, far_flops and peak_bytes of the turn where they were measured, and its messages.
    """

    round: int
    wave: int
    client: str
    loss: float
    steps: int
    seconds: float
    sent_bytes: int
    received_bytes: int
    kinds: Facts = field(default_factory=dict[str, Any])
    measured: Facts = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class TurnFailed:
    """When a client gave no reply; the round goes on without it."""

    round: int
    wave: int
    client: str
    error: str


@dataclass(frozen=True)
class Merged:
    """When the strategy has merged the replies of these clients."""

    round: int
    wave: int
    clients: tuple[str, ...]


@dataclass(frozen=True)
class Interleaved:
    """After rounds without a barrier: whose messages the server heard, in that order."""

    first: int
    round: int
    order: tuple[str, ...]


@dataclass(frozen=True)
class Scored:
    """One number of an evaluation: whose data, which named cell, which metric."""

    round: int
    client: str
    cell: str
    metric: str
    value: float


@dataclass(frozen=True)
class Checkpointed:
    """When the state after a round is safely on disk."""

    round: int
    path: str


@dataclass(frozen=True)
class RunEnded:
    """Once, after the last round."""

    rounds: int
    seconds: float


@dataclass(frozen=True)
class Noted:
    """Whatever a person should know and no other event says; level is info or warning."""

    level: str
    text: str


RoundEvent = (
    SeatMoved | RoundStarted | WentAlone | TurnEnded | TurnFailed
    | Merged | Interleaved | Scored | Checkpointed
)  # fmt: skip
Event = RunStarted | SeatTaken | RoundEvent | RunEnded | Noted
Sink = Callable[[Event], None]
_KINDS: dict[str, type[Event]] = {kind.__name__: kind for kind in Event.__args__}


class Stream:
    """Where events are written; every sink gets each of them, in one order for all."""

    def __init__(self) -> None:
        self._sinks: list[Sink] = []
        self._lock = threading.RLock()  # turns of several clients end in several threads

    def subscribe(self, sink: Sink) -> None:
        """Give every later event to ``sink`` as well."""
        self._sinks.append(sink)

    def write(self, event: Event) -> None:
        """Hand the event to all sinks before returning; an error in a sink is the writer's."""
        with self._lock:
            for sink in self._sinks:
                sink(event)


class Recorder(AbstractContextManager["Recorder", None]):
    """A sink that appends one JSON line per event to a file.

    ``clock`` gives the seconds that are written as ``at``. A line that a kill cut short is removed
    when the file is opened. Close the recorder, or use it in a ``with``.
    """

    def __init__(self, path: str | Path, clock: Callable[[], float]) -> None:
        self.path = Path(path)
        self._clock = clock
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        self._cut(lambda lines: sum(len(line) for line in lines if line.endswith(b"\n")))

    def __call__(self, event: Event) -> None:
        """Append the event; those of a round are on the disk before its checkpoint is."""
        self._file.write(_line(event, self._clock()))
        self._file.flush()
        if isinstance(event, Merged):
            os.fsync(self._file.fileno())

    def rewind(self, to_round: int) -> bool:
        """Drop what came after that round's checkpoint, before the run goes on from there.

        False if a kill came between the checkpoint and its event: then write that event again.
        """
        found = False

        def end(lines: Iterator[bytes]) -> int:
            nonlocal found
            size, last = 0, -1
            for number, line in enumerate(lines, 1):
                _, event = _parse(line, self.path, number)
                size, last = size + len(line), getattr(event, "round", last)
                if found := isinstance(event, Checkpointed) and event.round == to_round:
                    return size
            if last == to_round:
                return size
            raise CheckpointError(
                f'"{self.path}" has no checkpoint of round {to_round}. Restore all from one backup.'
            )

        self._cut(end)
        return found

    def clear(self) -> None:
        """Drop everything, for a run that starts from its beginning."""
        self._cut(lambda lines: 0)

    def close(self) -> None:
        """Close the file; the recorder takes no further events."""
        self._file.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _cut(self, end: Callable[[Iterator[bytes]], int]) -> None:
        """Shorten the file to the size that ``end`` finds among its lines."""
        self._file.seek(0)
        self._file.truncate(end(iter(self._file)))


def read(path: str | Path) -> Iterator[Event]:
    """The events of a log in order; a last line that is still being written is left out."""
    return (event for _, event in read_timed(path))


def read_timed(path: str | Path) -> Iterator[tuple[float, Event]]:
    """The events with the seconds at which they were recorded."""
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                yield _parse(line, path, number)


def _line(event: Event, at: float) -> bytes:
    line: dict[str, Any] = {"event": type(event).__name__, "at": float(at)}
    line |= {f.name: getattr(event, f.name) for f in fields(event)}
    # What has no value is null; what has grown without end says so, also in a mean over clients.
    endless = {k: str(v) for k, v in line.items() if isinstance(v, float) and math.isinf(v)}
    return json_text(line | endless).encode() + b"\n"


def _parse(line: bytes, path: str | Path, number: int) -> tuple[float, Event]:
    where = f"{path}, line {number}"
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FlexpError(f"{where} is not JSON: {error}. Restore or remove this line.") from error
    plain = cast("dict[str, Any]", found) if isinstance(found, dict) else {}
    name, at = str(plain.pop("event", "")), plain.pop("at", "")
    if name not in _KINDS:
        raise FlexpError(f'{where}: unknown event "{name}". {nearest(name, _KINDS)}')
    types = {f.name: str(f.type) for f in fields(_KINDS[name])}
    try:
        if plain.keys() != types.keys():
            raise TypeError(f"it has the fields {list(plain)} instead of {list(types)}")
        values = {key: _typed(plain[key], kind) for key, kind in types.items()}
        return _typed(at, "float"), _KINDS[name](**values)
    except (TypeError, ValueError) as error:
        raise FlexpError(f"{where}: this is no {name} of this version: {error}.") from error


def _typed(value: Any, kind: str) -> Any:
    """The JSON value as the field's type; TypeError if it is something else."""
    if kind == "float" and value is None:
        return math.nan
    if kind == "float" and (value in ("nan", "inf", "-inf") or type(value) in (int, float)):
        return float(value)  # the words are those of older logs
    if kind == "tuple[str, ...]" and isinstance(value, list):
        return tuple(_typed(item, "str") for item in cast("list[Any]", value))
    if type(value) is not {"int": int, "str": str, "Facts": dict}.get(kind):
        raise TypeError(f"{value!r:.60} is no {kind}")
    return value
