"""Real server and client processes for a test, on this machine; all are gone when it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from safetensors.torch import load_file

from flexp import assets, commands, recipe_file

if TYPE_CHECKING:  # the benchmark has this folder on its path, and is called network itself
    from network.crash import Point

Recipe = Callable[..., Path]
CLIENTS = ("anna", "ben", "carl dee")
CUTS = {"anna": [1, 0], "ben": [2, 1], "carl dee": [3, 1]}
NURSERY = Path(__file__).with_name("nursery.py")
PATIENCE = 100.0  # seconds until a test that waits has failed


class Nursery:
    """Where processes come from."""

    def __init__(self, script: Path = NURSERY) -> None:
        self.number = 0
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
            text=True,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request and its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.number += 1
        self.process.stdin.write(json.dumps({**request, "number": self.number}) + "\n")
        self.process.stdin.flush()
        while True:  # a test that was stopped in mid-question has left its answer here
            answer = json.loads(self.process.stdout.readline())
            if answer["number"] == self.number:
                return answer

    def close(self) -> None:
        """Ends all that it started."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=20)
        self.process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class Program:
    """One running command."""

    nursery: Nursery
    pid: int
    log: Path
    code: int | None = None

    def text(self) -> str:
        """What it has written so far."""
        return self.log.read_text("utf-8", errors="replace") if self.log.exists() else ""

    def over(self) -> bool:
        """Whether it has ended; then ``code`` says how."""
        if self.code is None:
            self.code = self.nursery.ask(pid=self.pid)["code"]
        return self.code is not None

    def wait(self, patience: float = PATIENCE) -> int:
        """Its exit code."""
        until(self.over, f"{self.log.name} to end", patience, self.text)
        assert self.code is not None
        return self.code

    def wait_for(self, pattern: str, patience: float = PATIENCE) -> re.Match[str]:
        """Until it has written something like this."""

        def found() -> bool:
            return re.search(pattern, self.text()) is not None or self.over()

        until(found, f"{pattern!r} in {self.log.name}", patience, self.text)
        match = re.search(pattern, self.text())
        assert match is not None, f"{self.log.name} ended without {pattern!r}:\n{self.text()}"
        return match

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        """A signal; SIGKILL unless another is named."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, how)
        if how is signal.SIGKILL:
            self.wait(20)


@dataclass
class Cluster:
    """A server and its clients, in a folder of their own."""

    nursery: Nursery
    folder: Path
    programs: list[Program] = field(default_factory=list[Program])
    port: int = 0
    ca: Path | None = None  # of a cluster over TLS

    def start(
        self,
        name: str,
        *argv: str,
        env: Mapping[str, str] = {},
        address_space: int = 0,
        crash: Point | None = None,
        netns: str = "",
    ) -> Program:
        """Starts a command; its output goes to ``name.log``.

        ``crash`` is where it dies, ``netns`` the network namespace that it runs in.
        """
        log = self.folder / f"{name}.log"
        answer = self.nursery.ask(
            argv=list(argv),
            cwd=str(self.folder),
            log=str(log),
            env=dict(env),
            address_space=address_space,
            crash=None if crash is None else asdict(crash),
            netns=netns,
        )
        self.programs.append(Program(self.nursery, answer["pid"], log))
        return self.programs[-1]

    def done(self, name: str, *argv: str) -> str:
        """Runs a command to its end, which must be a good one; what it wrote."""
        program = self.start(name, *argv)
        assert program.wait() == 0, program.text()
        return program.text()

    def with_tls(self, host: str = "127.0.0.1") -> Cluster:
        """From now on everybody shows a certificate: an authority, and an identity for a server."""
        self.ca = self.folder / "ca"
        self.done("ca-init", "ca", "init", str(self.ca))
        where = ("--server", host, "--out", str(self.folder / "host"))
        self.done("ca-issue", "ca", "issue", str(self.ca), *where)
        return self

    def kit(self, name: str) -> Path:
        """A start-up kit, which knows where the server is."""
        kit = self.folder / f"{name}.kit"
        host = ("--host", f"127.0.0.1:{self.port}") if self.port else ()
        self.done(f"kit-{name}", "ca", "kit", str(self.ca), name, "--out", str(kit), *host)
        return kit

    def enrol(self, *names: str) -> None:
        """Every one of these makes a key and fetches its certificate, as people do."""
        kits = {name: self.kit(name) for name in names}
        under_way = [
            self.start(f"enroll-{n}", "enroll", str(kit), "--out", str(self.identity(n)))
            for n, kit in kits.items()
        ]
        for program in under_way:
            assert program.wait() == 0, program.text()

    def identity(self, name: str) -> Path:
        """The folder of a client's key and certificates."""
        return self.folder / "devices" / f"{name}'s identity"

    def serve(
        self, recipe: Path, *argv: str, name: str = "server", host: str = "127.0.0.1", **how: Any
    ) -> Program:
        """`flexp serve` on a free port, or on the one that it had before."""
        here = f"{host}:{self.port}"
        if self.ca is not None and "--identity" not in argv:
            argv = ("--identity", str(self.folder / "host"), "--ca", str(self.ca), *argv)
        log = self.folder / f"{name}.log"
        before = len(_ports(log.read_text("utf-8"))) if log.exists() else 0
        program = self.start(name, "serve", str(recipe), "--listen", here, *argv, **how)

        def listens() -> bool:
            return len(_ports(program.text())) > before or program.over()

        until(listens, "the port", PATIENCE, program.text)
        assert not program.over(), program.text()
        self.port = _ports(program.text())[-1]
        return program

    def join(
        self, name: str, data: Path, *argv: str, at: str = "", log: str = "", **how: Any
    ) -> Program:
        """`flexp join` as somebody; it agrees to any recipe that the server's log names."""
        where = at or f"127.0.0.1:{self.port}"
        folder = self.folder / "devices" / name
        accept = ("--accept", self.hash()) if "--accept" not in argv else ()
        who = ("--name", name) if self.ca is None else ("--identity", str(self.identity(name)))
        who = who if not {"--name", "--identity"} & {*argv} else ()
        given = ("--data", str(data), "--folder", str(folder), *accept, *who, *argv)
        return self.start(log or name, "join", where, *given, **how)

    def hash(self) -> str:
        """The recipe's hash, as the server says it."""
        log = self.folder / "server.log"

        def found() -> re.Match[str] | None:
            return re.search(r"recipe ([0-9a-f]{64})", log.read_text("utf-8"))

        return until(found, "the recipe's hash", PATIENCE, log.read_text).group(1)

    def adapter(self, name: str) -> Path:
        """The folder of a client's exported adapter."""
        return self.folder / "devices" / name / "adapter"

    def reap(self) -> None:
        """Nothing that was started is left."""
        for program in self.programs:
            if not program.over():
                program.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.reap()


def alone(recipe: Path, out: Path) -> Path:
    """The same recipe in one process; the folder of its adapters."""
    found = recipe_file.read(recipe, [f"out={out}"])
    commands.run(found, assets.Cache(recipe.parent / "no-assets"), [])
    return out / found.name / "adapters"


def same(
    cluster: Cluster, adapters: Path, clients: tuple[str, ...] = CLIENTS, *, within: float = 0.0
) -> None:
    """Every client has the adapter that is in that folder: bit for bit, unless said otherwise."""
    for client in clients:
        one = load_file(adapters / client / "adapter_model.safetensors")
        other = load_file(cluster.adapter(client) / "adapter_model.safetensors")
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert float((value - other[name]).abs().max()) <= within, (client, name)


def _ports(text: str) -> list[int]:
    return [int(port) for port in re.findall(r"listening on [\w.]+:(\d+)", text)]


def until(
    true: Callable[[], Any], what: str, patience: float, said: Callable[[], str] = lambda: ""
) -> Any:
    """Waits for something to become true and returns it."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        if found := true():
            return found
        time.sleep(0.02)
    raise AssertionError(f"waited {patience} s for {what}:\n{said()}")
