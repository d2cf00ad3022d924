"""Where a training step goes: front, wire, trunk, tail and loss, optimizers, and nobody's time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flexp.bench.job import Place, Scale, at_work, step
from flexp.bench.machine import Machine
from flexp.bench.rows import Row
from flexp.link.messages import Answer, Link, Message
from flexp.link.wire import Wire
from flexp.model.slots import Slots

WHAT = {
    "front": "embeddings and front, forward and backward, with what a step does around them",
    "wire": "packing, unpacking, checks and counting of what crosses",
    "trunk": "the server's blocks, forward and backward",
    "tail": "norm, output embedding and loss, forward and backward",
    "optimizer": "AdamW of the adapters on both sides",
    "idle": "wall time in which this process did not compute, of the wall time of a step",
}
CASES: Mapping[str, tuple[str, Wire]] = {"fp32": ("fp32", "fp32"), "bf16": ("bf16", "int8")}


@dataclass
class Marks:
    """Processor seconds of one step, by what was done, and where each message began and ended."""

    far: float = 0.0
    optimizer: float = 0.0
    server_optimizer: float = 0.0
    crossings: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])

    def behind(self, began: float, ended: float) -> None:
        """A message was behind the wire for so long."""
        self.far += ended - began

    def crossed(self, began: float, ended: float) -> None:
        """A message went over the wire, and its answer came."""
        self.crossings.append((began, ended))


@dataclass
class Timed:
    """A link that notes when each message went in and when its answer was there."""

    inner: Link
    note: Callable[[float, float], None]

    def send(self, message: Message) -> Answer:
        """Delivers the message."""
        began = time.process_time()
        try:
            return self.inner.send(message)
        finally:
            self.note(began, time.process_time())

    def close(self) -> None:
        """Closes the link inside."""
        self.inner.close()


def anatomy(scale: Scale, machine: Machine) -> list[Row]:
    """A step in fp32 over an fp32 wire, and one in bf16 over int8."""
    del machine
    rows: list[Row] = []
    for name, (dtype, wire) in CASES.items():
        job, marks = scale.job, Marks()
        body, batch = job.backbone(dtype), scale.job.batch()

        def wrap(client: str, link: Link, marks: Marks = marks) -> Link:
            del client
            return Timed(link, marks.behind)

        with at_work(job, body, wrap=wrap, wire=wire) as place:
            watched(place, marks)
            step(place.desk, batch)
            found = [one(place, marks, batch) for _ in range(scale.rounds)]
        whole = statistics.median(f["cpu"] for f in found)
        for part, what in WHAT.items():
            seconds = statistics.median(f[part] for f in found)
            of = statistics.median(f["wall"] for f in found) if part == "idle" else whole
            details = {"seconds": round(seconds, 5), "of_seconds": round(of, 5), "wire": wire}
            share = 100 * seconds / of
            rows.append(Row(f"anatomy.{name}.{part}", share, "%", what, details=details))
    return rows


def watched(place: Place, marks: Marks) -> None:
    """Sets watches on the session and on both sides' optimizers."""
    desk = place.desk
    desk.session.link = Timed(desk.session.link, marks.crossed)
    home = place.engine.tenants[desk.client]
    _on_operations(desk.model.near, lambda s: _add(marks, "optimizer", s))
    _on_operations(home.slots, lambda s: _add(marks, "server_optimizer", s))


def _add(marks: Marks, what: str, seconds: float) -> None:
    setattr(marks, what, getattr(marks, what) + seconds)


def _on_operations(slots: Slots, note: Callable[[float], None]) -> None:
    inner = slots.do

    def do(ops: Any) -> Any:
        began = time.process_time()
        out = inner(ops)
        note(time.process_time() - began)
        return out

    vars(slots)["do"] = do


def one(place: Place, marks: Marks, batch: Any) -> dict[str, float]:
    """Processor seconds of one step, part by part."""
    marks.far = marks.optimizer = marks.server_optimizer = 0.0
    marks.crossings.clear()
    wall, began = time.perf_counter(), time.process_time()
    step(place.desk, batch)
    ended, wall = time.process_time(), time.perf_counter() - wall
    (first, answered), (back, done) = marks.crossings
    return {
        "front": first - began + ended - done - marks.optimizer,
        "wire": answered - first + done - back - marks.far,
        "trunk": marks.far - marks.server_optimizer,
        "tail": back - answered,
        "optimizer": marks.optimizer + marks.server_optimizer,
        "cpu": ended - began,
        "wall": wall,
        "idle": max(0.0, wall - (ended - began)),
    }
