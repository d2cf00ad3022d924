"""Who takes part in a run over the network, with which device and from when: kept on disk.

A server that begins anew finds here what its clients said of themselves, so that the plan is the
same and nobody is asked again.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from flexp.errors import CheckpointError
from flexp.parcel import write_atomic
from flexp.recipe import Recipe

WAITS = -1
# What reading a file of another shape than ours can raise.
_DAMAGE = (
    OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError,
    msgspec.ValidationError,
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A client as it said it is; ``joins`` is the first round that it is there for.

    Who has come after the beginning waits for the next round.
    """

    memory: int
    flops: float | None
    uplink: float | None
    downlink: float | None
    latency: float
    rows: tuple[int, int, int] = (0, 0, 0)
    space: tuple[str, ...] = ()
    accepted: str = ""
    joins: int = 0

    def device(self, name: str) -> dict[str, Any]:
        """This client's device as a recipe declares one."""
        return {
            "name": name,
            "memory": self.memory,
            "gflops": None if self.flops is None else self.flops / 1e9,
            "up_mbit": None if self.uplink is None else self.uplink * 8e-6,
            "down_mbit": None if self.downlink is None else self.downlink * 8e-6,
            "latency_ms": self.latency * 1e3,
        }


class Roster:
    """Entries by client, in a file that is written whole whenever one changes.

    Calls enter clients while the round loop takes in those who wait: both hold ``lock``.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.entries = path, dict[str, Entry]()
        self.lock = threading.RLock()
        self.server: dict[str, Any] | None = None  # this machine, as a recipe declares it
        self.started = False  # whether the quorum was there and the run has begun

    def read(self, recipe: Recipe) -> None:
        """What an earlier server process has written, if it served this recipe."""
        if not self.path.is_file():
            return
        try:
            plain = json.loads(self.path.read_text("utf-8"))
            if plain["recipe"] != recipe.hash():
                raise CheckpointError(
                    f"{self.path} is of another recipe. Serve the recipe that the run began with, "
                    "or choose another folder with out=FOLDER."
                )
            for name, row in plain["clients"].items():
                self.entries[name] = msgspec.convert(row, Entry)
            self.started, self.server = plain["started"] is True, plain["server"]
            planned(recipe, self.members(), self.server)
        except _DAMAGE as problem:
            raise CheckpointError(
                f"{self.path} cannot be read: {problem!s:.300}. Restore it from a backup of this "
                "folder, or serve another folder with out=FOLDER."
            ) from problem

    def write(self, recipe: Recipe) -> None:
        """Puts all entries on disk."""
        with self.lock:
            clients = {name: asdict(entry) for name, entry in sorted(self.entries.items())}
            plain = {"recipe": recipe.hash(), "started": self.started, "server": self.server}
            plain["clients"] = clients
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path, json.dumps(plain, indent=1).encode())

    def begin(self, names: frozenset[str]) -> None:
        """The run begins with these; the others wait for the next round."""
        self.started = True
        for name, entry in self.entries.items():
            if name not in names:
                self.entries[name] = replace(entry, joins=WAITS)

    def set(self, name: str, entry: Entry) -> None:
        """Enters a client, or what it says anew; the round that it joins at stays."""
        with self.lock:
            known = self.entries.get(name)
            self.entries[name] = entry if known is None else replace(entry, joins=known.joins)

    def members(self) -> dict[str, Entry]:
        """Who is in the run, or would be if it began now."""
        with self.lock:
            return {name: entry for name, entry in self.entries.items() if entry.joins != WAITS}

    def go_back(self, done: int) -> None:
        """The run goes on after so many rounds: who joined later waits for the next one again."""
        with self.lock:
            later = {c: replace(e, joins=WAITS) for c, e in self.entries.items() if e.joins >= done}
            self.entries |= later if done else {}

    def take_in(self, known: Collection[str], round: int) -> dict[str, Entry]:
        """Those who are not known yet: they are there from this round on."""
        with self.lock:
            late = {c: replace(e, joins=round) for c, e in self.entries.items() if c not in known}
            self.entries |= late
            return late


def planned(
    recipe: Recipe, entries: Mapping[str, Entry], server: Mapping[str, Any] | None = None
) -> Recipe:
    """The recipe with everybody's device declared, except where it says itself who sits where.

    So is the server, unless the recipe does it.

    It can be run in one process, and then gives the same seats.
    """
    plain, plan = recipe.plain(), recipe.plan
    presence = dict(plain["participation"])
    for name, entry in entries.items():
        if entry.joins:
            presence[name] = {**presence.get(name, {}), "joins": entry.joins}
    told, link = {**plain["plan"]}, {**plain["link"]}
    link["wires"] = {c: v for c, v in link["wires"].items() if c in entries}
    presence = {c: v for c, v in presence.items() if c in entries}
    told["changes"] = [change for change in told["changes"] if change["client"] in entries]
    told["assign"], told["server"] = dict(told["assign"]), told["server"] or server
    for client in sorted(entries.keys() - plan.assign.keys()):
        device = entries[client].device(f"{client}'s device")
        told["devices"] = [*told["devices"], device]
        told["assign"][client] = device["name"]
    for field in ("cuts", "assign", "slow", "ranks"):
        told[field] = {c: v for c, v in told[field].items() if c in entries}
    return Recipe.model_validate({**plain, "plan": told, "link": link, "participation": presence})
