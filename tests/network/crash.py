"""Named points at which a process kills itself, as a power cut would, for tests of what is left.

A point is a function of the program, its call that counts, and whether death comes before it or
after. The process that dies is a real one: the nursery arms it before the program starts.
"""

from __future__ import annotations

import functools
import importlib
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Point:
    """``at`` is "module:name", as that module has it; with ``within``, calls in that span count."""

    at: str
    when: Literal["before", "after"]
    nth: int = 1
    within: str = ""


SERVER: dict[str, Point] = {
    "a client says hello": Point("flexp.serving.reception:Reception._hello", "before", 2),
    "a client was welcomed": Point("flexp.serving.reception:Reception._hello", "after", 3),
    "a client is entered": Point("flexp.serving.roster:Roster.write", "before", 2),
    "a client was entered": Point("flexp.serving.roster:Roster.write", "after", 2),
    "the run has its clients": Point("flexp.serving.roster:Roster.begin", "after"),
    "the blocks are loaded": Point("flexp.serving.floor:NetworkEngine", "before"),
    "the recipe is written": Point("flexp.commands:write_atomic", "before"),
    "an order goes out": Point("flexp.engine.guests:Guests.give", "before", 5),
    "an order went out": Point("flexp.engine.guests:Guests.give", "after", 5),
    "a tenancy was opened": Point("flexp.server.tenants:Tenants.join", "after", 5),
    "a message is carried out": Point("flexp.server.steps:StepTable.find", "before", 90),
    "a message was carried out": Point("flexp.server.steps:StepTable.keep", "after", 90),
    "an answer went out": Point("flexp.link.listen:Call.tell", "after", 120),
    "a graph is kept": Point("flexp.server.pending:Waiting.keep", "before", 20),
    "a graph was differentiated": Point("flexp.server.compute:Compute._descended", "after", 20),
    "far adapters have stepped": Point("flexp.server.tenants:Tenants.do", "after", 20),
    "a reply came": Point("flexp.server.trunk:Trunk._submit", "after", 4),
    "a turn is about to count": Point("flexp.server.tenants:Tenants.commit", "before", 5),
    "a turn counts": Point("flexp.server.tenants:Tenants.commit", "after", 5),
    "all turns of a round count": Point("flexp.server.tenants:Tenants.commit", "after", 6),
    "replies are merged": Point("flexp.strategies.flexp:FlexP.merge", "before", 2),
    "replies were merged": Point("flexp.strategies.flexp:FlexP.merge", "after", 2),
    "a checkpoint begins": Point("flexp.checkpoint:write", "before", 2),
    "a checkpoint has its state": Point("flexp.checkpoint:save", "after", 1, "second"),
    "a checkpoint has a tenant": Point("flexp.checkpoint:save", "after", 2, "second"),
    "a file of a checkpoint is written, not synced": Point("os:fsync", "before", 3, "second"),
    "a file of a checkpoint has no name yet": Point("pathlib:Path.replace", "before", 2, "second"),
    "a file of a checkpoint has its name": Point("pathlib:Path.replace", "after", 2, "second"),
    "a checkpoint has no digests yet": Point("flexp.checkpoint:write_atomic", "before", 2),
    "a checkpoint has its digests": Point("flexp.checkpoint:write_atomic", "after", 2),
    "a checkpoint has no name yet": Point("pathlib:Path.rename", "before", 1, "second"),
    "a checkpoint has its name": Point("pathlib:Path.rename", "after", 1, "second"),
    "a checkpoint is told": Point("flexp.run:Checkpointed", "before", 2),
    "a checkpoint was told": Point("flexp.engine.network:NetworkEngine.saved", "before", 2),
    "answers on disk are forgotten": Point("flexp.engine.network:NetworkEngine.saved", "after", 2),
    "an old checkpoint goes": Point("shutil:rmtree", "before", 3, "fourth"),
    "an old checkpoint is gone": Point("shutil:rmtree", "after", 3, "fourth"),
    "models are scored": Point("flexp.engine.network:NetworkEngine.look", "before"),
    "models were scored": Point("flexp.engine.network:NetworkEngine.look", "after"),
    "adapters are handed over": Point("flexp.engine.network:NetworkEngine.hand_over", "before"),
    "adapters were handed over": Point("flexp.engine.network:NetworkEngine.hand_over", "after"),
    "the result is written": Point("flexp.commands:write_atomic", "before", 2),
    "the result was written": Point("flexp.commands:write_atomic", "after", 2),
    "the end is told": Point("flexp.serving.reception:Reception.close", "before"),
    "the end was told": Point("flexp.serving.reception:Reception.close", "after"),
}
CLIENT: dict[str, Point] = {
    "it says hello": Point("flexp.joining.join:Joining.hello", "after"),
    "small files are fetched": Point("flexp.joining.join:fetch_small", "before"),
    "small files were fetched": Point("flexp.joining.join:fetch_small", "after"),
    "the terms are agreed to": Point("flexp.joining.join:write_atomic", "before", 2),
    "it is ready": Point("flexp.joining.join:Stay.come_in", "after"),
    "blocks are fetched": Point("flexp.joining.member:fetch_part", "before"),
    "a file of blocks has no name yet": Point("pathlib:Path.replace", "before", 1, "fetch"),
    "blocks were fetched": Point("flexp.joining.member:fetch_part", "after"),
    "it has begun": Point("flexp.joining.member:Member.begin", "after"),
    "an order came": Point("flexp.joining.member:Member.obey", "before", 2),
    "memory was opened": Point("flexp.client.store:StoredMemory.open", "after", 2),
    "it has joined a turn": Point("flexp.client.session:Session.join", "after", 2),
    "a forward goes out": Point("flexp.client.session:Session.forward", "before", 9),
    "a forward came back": Point("flexp.client.session:Session.forward", "after", 9),
    "a backward goes out": Point("flexp.client.session:Session.backward", "before", 9),
    "a backward came back": Point("flexp.client.session:Session.backward", "after", 9),
    "near adapters have stepped": Point("flexp.client.fit:Fit._move", "after", 7),
    "a reply goes out": Point("flexp.client.session:Session.submit", "before", 2),
    "a reply went out": Point("flexp.client.session:Session.submit", "after", 2),
    "what lasts was put away": Point("flexp.client.turn:_put_away", "after", 2),
    "memory settles": Point("flexp.client.store:StoredMemory.settle", "before", 2),
    "memory is written, not synced": Point("os:fsync", "before", 1, "settle"),
    "memory has no name yet": Point("pathlib:Path.replace", "before", 1, "settle"),
    "memory has its name": Point("pathlib:Path.replace", "after", 1, "settle"),
    "memory has settled": Point("flexp.client.store:StoredMemory.settle", "after", 2),
    "it leaves a turn": Point("flexp.client.session:Session.leave", "before", 2),
    "it has left a turn": Point("flexp.client.session:Session.leave", "after", 2),
    "memory counts": Point("flexp.client.store:StoredMemory.commit", "after", 4),
    "it looks at its rows": Point("flexp.engine.look:Look.at", "before"),
    "it has looked at its rows": Point("flexp.engine.look:Look.at", "after"),
    "its adapter is written": Point("flexp.export:write", "before"),
    "half of its adapter is there": Point("pathlib:Path.replace", "after", 1, "adapter"),
    "its adapter was written": Point("flexp.export:write", "after"),
    "it hears of the end": Point("flexp.joining.join:Stay._ended", "before"),
}
# Calls during which others count: a function and which of its calls.
SPANS: dict[str, tuple[str, int]] = {
    "second": ("flexp.checkpoint:write", 2),
    "fourth": ("flexp.checkpoint:write", 4),
    "fetch": ("flexp.joining.member:fetch_part", 1),
    "settle": ("flexp.client.store:StoredMemory.settle", 2),
    "adapter": ("flexp.export:write", 1),
}


def arm(point: Point) -> None:
    """From now on this process dies when it comes to the point."""
    inside = not point.within
    calls = 0

    def span(function: Callable[..., Any]) -> Callable[..., Any]:
        seen = 0

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen, inside
            seen += 1
            inside = seen == SPANS[point.within][1]
            try:
                return function(*args, **kwargs)
            finally:
                inside = False

        return wrapped

    def fatal(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function, updated=())
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += inside
            due = inside and calls == point.nth
            if due and point.when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            found = function(*args, **kwargs)
            if due:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        return wrapped

    if point.within:
        _replace(SPANS[point.within][0], span)
    _replace(point.at, fatal)


def _replace(at: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    module, _, path = at.partition(":")
    owner: Any = importlib.import_module(module)
    *holders, name = path.split(".")
    for holder in holders:
        owner = getattr(owner, holder)
    setattr(owner, name, wrap(getattr(owner, name)))
