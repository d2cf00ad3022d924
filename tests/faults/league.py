"""A light server and its clients under attack: recipe, rows, and what they have committed."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from faults.light import write_model
from network.cluster import Cluster, Program, until

CLIENTS = ("anna", "ben", "carl", "dora")
CUTS = {"anna": [1, 0], "ben": [2, 1], "carl": [1, 1], "dora": [1, 2]}
Digests = dict[Any, str]


def rows(folder: Path, client: str, seed: int = 0, count: int = 24) -> Path:
    """A client's own rows."""
    folder.mkdir(parents=True, exist_ok=True)
    stream = random.Random(f"{seed}/{client}")
    lines: list[str] = []
    for n in range(count):
        text = "".join(stream.choice("abcdefghijklmnop") for _ in range(stream.randint(4, 9)))
        lines.append(json.dumps({"text": text, "label": ("no", "yes")[n % 2]}))
    path = folder / f"{client}.jsonl"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def recipe(folder: Path, *, rounds: int, steps: int, name: str = "light", **more: Any) -> Path:
    """A run whose result depends on every step: dropout, personal near parts, a merged trunk."""
    plain: dict[str, Any] = {
        "name": name,
        "rounds": rounds,
        "data": {"path": "rows", "split": [0.5, 0.25, 0.25]},
        "task": {"max_length": 12, "labels": ["no", "yes"]},
        "model": {"source": str(write_model(folder / "model"))},
        "adapter": {"rank": 2, "alpha": 4.0, "dropout": 0.1},
        "train": {"steps": steps, "batch": 4, "lr": 0.01},
        "strategy": {"name": "flexp", "trunk": "pulled"},  # so that tenancies last, too
        "plan": {"cuts": CUTS, "server": {"memory": "1GB"}},
        "out": str(folder / "served"),
        **more,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(plain), "utf-8")
    return path


@dataclass
class League:
    """A server and clients of one recipe, each of whom can be started again as it was."""

    cluster: Cluster
    recipe: Path
    clients: tuple[str, ...] = CLIENTS
    programs: dict[str, Program] = field(default_factory=dict[str, Program])
    at: str = ""  # where clients dial, if there is something between
    env: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def checkpoints(self) -> Path:
        return self.cluster.folder / "served" / "light" / "checkpoint"

    def begin(self, *argv: str) -> None:
        """All of them, and the run."""
        self.start("server", *argv)
        for client in self.clients:
            self.start(client)

    def start(self, name: str, *argv: str) -> None:
        """Somebody, for the first time or again; the server has the port that it had."""
        cluster = self.cluster
        if name == "server":
            first = ("--clients", ",".join(self.clients), "--stay", "0", *argv)
            self.programs[name] = cluster.serve(self.recipe, *first, env=self.env)
            return
        data = rows(cluster.folder / "rows", name)
        self.programs[name] = cluster.join(name, data, "--name", name, at=self.at, env=self.env)

    def ended(self, patience: float = 100.0) -> None:
        """Waits for a good end of everybody."""
        for name, program in self.programs.items():
            assert program.wait(patience) == 0, f"{name}:\n{program.text()[-4000:]}"

    def still_on(self) -> None:
        """Nobody has gone by itself."""
        gone = {n: p.text()[-2000:] for n, p in self.programs.items() if p.over()}
        assert not gone, gone

    def done(self) -> int:
        """Rounds that are committed at the server, by the names on its disk alone."""
        with suppress(FileNotFoundError):
            found = [int(p.name) for p in self.checkpoints.iterdir() if p.name.isdigit()]
            return max(found, default=0)
        return 0

    def wait_for_round(self, number: int, patience: float = 100.0) -> None:
        """Until so many rounds are committed."""

        def text() -> str:
            return "\n".join(f"{n}:\n{p.text()[-1500:]}" for n, p in self.programs.items())

        until(lambda: self.done() >= number, f"round {number}", patience, text)

    def committed(self) -> Digests:
        """Digest of every checkpoint of the server by round, and of every client's turns.

        AssertionError for what cannot be read or is not what its own note says. What the server
        deletes meanwhile is left out, unless it is of its newest.
        """
        found: Digests = {}
        for path in sorted(self.checkpoints.glob("[0-9]*")):
            try:
                found[int(path.name)] = checkpoint_digest(path)
            except FileNotFoundError:
                assert int(path.name) < self.done(), f"{path} is not whole"
        for client in self.clients:
            for path in sorted(self.memory(client).glob("*/[0-9]*.parcel")):
                with suppress(FileNotFoundError):
                    found[client, int(path.stem)] = sha256(path)
        return found

    def memory(self, client: str) -> Path:
        return self.cluster.folder / "devices" / client / "memory"

    def adapters(self) -> Digests:
        """Digests of what everybody has in the end."""
        return {c: sha256(self.cluster.adapter(c) / "adapter_model.safetensors") for c in CLIENTS}


def checkpoint_digest(path: Path) -> str:
    """One digest of all that a checkpoint holds, each file checked against the note beside it."""
    listed: dict[str, str] = json.loads((path / "checkpoint.json").read_bytes())["files"]
    for name, digest in listed.items():
        assert sha256(path / name) == digest, f"{path / name} is damaged"
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def same(storm: Digests, clean: Digests) -> int:
    """All that a storm has committed is what the clean run had; how many digests were compared."""
    wrong = [key for key, digest in storm.items() if clean[key] != digest]
    assert not wrong, f"not as in the clean run: {wrong}"
    return len(storm)


def leftovers(folder: Path) -> list[str]:
    """Files of a write that never ended."""
    every = (p.relative_to(folder).as_posix() for p in folder.rglob("*"))
    return sorted(p for p in every if p.endswith((".tmp", ".part", ".writable")))


def pause(seconds: float) -> None:
    """The moment of an attack: no event is waited for, the moment is what is drawn."""
    time.sleep(seconds)
