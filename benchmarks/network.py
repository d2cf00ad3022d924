"""Training between processes: what the network adds to a step, and what the clock says of it.

    make bench-network

Real `flexp serve` and `flexp join` processes on this machine (started by stopwatch.py), links
emulated by a proxy in a process of its own (tests/network/proxy.py). What is compared runs in turn
(A B A B), the first round of every run is left out, and medians are taken over the rest; "fastest"
is the turn or round that other work on the machine disturbed least. Writes results/network.json;
tables.py renders the tables of docs/explanation/network.md from it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
import yaml
from transformers.utils import logging

HERE = Path(__file__).parent
TESTS = HERE.parent / "tests" / "network"
sys.path.insert(0, str(TESTS))

from cluster import Cluster, Nursery  # noqa: E402

from flexp import assets, commands, recipe_file  # noqa: E402
from flexp import run as running  # noqa: E402
from flexp.comparison.table import work_of  # noqa: E402
from flexp.events import Event, Merged, RoundStarted, Stream, TurnEnded, read_timed  # noqa: E402
from flexp.identity import credentials  # noqa: E402
from flexp.identity.authority import Authority  # noqa: E402
from flexp.identity.credentials import Credentials  # noqa: E402
from flexp.link.wire import Wire  # noqa: E402
from flexp.plan.clock import Load, Work, run_seconds, seconds_of  # noqa: E402
from flexp.plan.devices import Device  # noqa: E402
from flexp.stage import opened, survey  # noqa: E402

WORDS = "the a of to and in that it was for on with as his they at be this from have or by one had"
ROWS = 80
Pick = Callable[[Sequence[float]], float]


@dataclass(frozen=True)
class Road:
    """A link: megabits per second up and down, and milliseconds there and back."""

    up: float
    down: float
    trip: float

    def seconds(self, sent: float, received: float, messages: float) -> float:
        """For messages of so many bytes that nothing overlaps with."""
        return (sent / self.up + received / self.down) * 8e-6 + messages * self.trip / 1e3

    def device(self, flops: float) -> Device:
        """A device of that speed on this link."""
        return Device("here", 1 << 34, flops, self.up * 125e3, self.down * 125e3, self.trip / 1e3)


LAN, CABLE, PHONE = Road(1000, 1000, 2), Road(100, 100, 40), Road(10, 20, 30)


@dataclass(frozen=True)
class Case:
    """What is trained: a model, its batch, the cuts of the clients, and rounds of some steps."""

    model: str
    batch: int
    length: int
    cuts: Mapping[str, tuple[int, int]]
    steps: int
    rounds: int
    kind: str = "classification"
    link: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def recipe(self, folder: Path) -> Path:
        """The recipe and everybody's rows in a folder; every row is longer than a batch's."""
        words, mine = WORDS.split(), folder / "mine"
        mine.mkdir()
        for n, client in enumerate(self.cuts):
            rows = [
                {
                    "text": " ".join(
                        words[(n + at * i) % len(words)] for i in range(2 * self.length)
                    ),
                    "label": ("no", "yes")[at % 2],
                }
                for at in range(ROWS)
            ]
            lines = "\n".join(json.dumps(row) for row in rows) + "\n"
            (mine / f"{client}.jsonl").write_text(lines, encoding="utf-8")
        plain: dict[str, Any] = {
            "name": "bench",
            "rounds": self.rounds,
            "data": {"path": str(mine), "split": [0.9, 0.05, 0.05]},
            "task": {"kind": self.kind, "max_length": self.length},
            "model": {"source": self.model},
            "train": {"steps": self.steps, "batch": self.batch},
            "plan": {"cuts": {c: list(cut) for c, cut in self.cuts.items()}},
            "strategy": {"name": "fedavg"},
            "evaluate": {"global_rows": 1},
            "link": dict(self.link),
            "out": str(folder / "runs"),
        }
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(plain), encoding="utf-8")
        return path


ONE = {"anna": (2, 1)}
MINILM = Case("minilm", 8, 32, ONE, 8, 6)
SMOLLM = Case("smollm2-135m", 2, 32, {"anna": (2, 2)}, 3, 5, "causal-lm")
ONES = MINILM, SMOLLM
FLEETS: dict[str, tuple[Case, dict[str, Road]]] = {
    "one on a local network": (Case("minilm", 8, 32, {"anna": (2, 1)}, 6, 4), {"anna": LAN}),
    "two on a local network": (
        Case("minilm", 8, 32, {"anna": (1, 1), "ben": (3, 1)}, 6, 4),
        {"anna": LAN, "ben": LAN},
    ),
    "two at home": (
        Case("minilm", 8, 32, {"anna": (1, 1), "ben": (3, 1)}, 6, 4),
        {"anna": CABLE, "ben": CABLE},
    ),
    "a phone and one at home": (
        Case(
            "minilm", 8, 32, {"anna": (1, 1), "ben": (3, 1)}, 6, 3, link={"wires": {"anna": "int8"}}
        ),
        {"anna": PHONE, "ben": CABLE},
    ),
}


@dataclass(frozen=True)
class Turn:
    """One client's turn, or one round, as it was timed."""

    client: str
    round: int
    seconds: float
    sent: int
    received: int
    messages: int
    far: float = 0.0  # of the seconds, those in which a server computed

    @property
    def near(self) -> float:
        """All other seconds: the client's own, and what crossing takes."""
        return self.seconds - self.far


@dataclass(frozen=True)
class Run:
    """A run without its first round; ``wire`` are all bytes that passed each client's proxy."""

    turns: list[Turn]
    rounds: list[float]
    wire: dict[str, tuple[int, int]]

    def median(self, what: str = "seconds", client: str = "anna") -> float:
        """Over turns of one client."""
        return statistics.median(getattr(t, what) for t in self.turns if t.client == client)


def timed(
    events: Path,
    wire: Mapping[str, tuple[int, int]] = {},
    far: Mapping[str, Mapping[str, float]] = {},
) -> Run:
    """What a log says of the rounds after the first; ``far`` are a server's seconds of each."""
    turns, rounds, begun = list[Turn](), list[float](), 0.0
    for at, event in read_timed(events):
        if isinstance(event, RoundStarted):
            begun = at
        if isinstance(event, TurnEnded) and event.round:
            count = int(str(event.measured["messages"]))
            sizes = event.sent_bytes, event.received_bytes
            there = far.get(event.client, {}).get(str(event.round), 0.0)
            turns.append(Turn(event.client, event.round, event.seconds, *sizes, count, there))
        if isinstance(event, Merged) and event.round:
            rounds.append(at - begun)
    return Run(turns, rounds, dict(wire))


@dataclass
class Bench:
    """Where processes come from, and a folder for each run."""

    nursery: Nursery
    folder: Path
    count: int = 0

    def place(self) -> Path:
        """A new folder."""
        self.count += 1
        made = self.folder / str(self.count)
        made.mkdir()
        return made

    def local(self, case: Case) -> Run:
        """`flexp run`: all in one process."""
        here = self.place()
        cluster = Cluster(self.nursery, here)
        program = cluster.start("local", "run", str(case.recipe(here)))
        if program.wait(300):
            raise RuntimeError(program.text())
        return timed(here / "runs" / "bench" / "events.jsonl")

    def served(self, case: Case, *, tls: bool, roads: Mapping[str, Road | None] = {}) -> Run:
        """`flexp serve` and a `flexp join` for each client; ``roads`` go through proxies."""
        with ExitStack() as held:
            return self._started(held, case, tls, roads)()

    def apart(self, case: Case) -> Run:
        """Every client with a server of its own and no road, all at a time: nobody waits."""
        alone = [
            replace(case, cuts={c: cut}, link={"wire": case.link.get("wires", {}).get(c, "fp32")})
            for c, cut in case.cuts.items()
        ]
        with ExitStack() as held:
            runs = [wait() for wait in [self._started(held, each, True, {}) for each in alone]]
        return Run([t for run in runs for t in run.turns], [], {})

    def _started(
        self, held: ExitStack, case: Case, tls: bool, roads: Mapping[str, Road | None]
    ) -> Callable[[], Run]:
        here = self.place()
        cluster, clients = Cluster(self.nursery, here), list(case.cuts)
        held.callback(cluster.reap)
        identities = identify(here, clients) if tls else {}
        proof = ("--identity", str(identities[""])) if tls else ()
        recipe, spent = case.recipe(here), here / "spent.json"
        asked = ("--clients", ",".join(clients), *proof)
        server = cluster.serve(recipe, *asked, env={"FLEXP_STOPWATCH": str(spent)})
        programs, passed = [server], dict[str, tuple[int, int]]()
        proxies = held.enter_context(ExitStack())
        for client in clients:
            at = cluster.port
            if client in roads:
                at = proxies.enter_context(proxy(at, roads[client], passed, client))
            who = ("--identity", str(identities[client])) if tls else ("--name", client)
            programs.append(
                cluster.join(
                    client,
                    here / "mine" / f"{client}.jsonl",
                    *("--model", case.model),
                    *who,
                    at=f"127.0.0.1:{at}",
                )
            )

        def wait() -> Run:
            for program in programs:
                if program.wait(300):
                    raise RuntimeError(program.text())
            proxies.close()
            far = json.loads(spent.read_text("utf-8"))
            return timed(here / "runs" / "bench" / "events.jsonl", passed, far)

        return wait

    def loads(self, case: Case) -> dict[str, Load]:
        """What a turn of each client takes, counted in one process."""
        command = [sys.executable, __file__, "--child", str(case.recipe(self.place()))]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=QUIET, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        return {client: Load(**load) for client, load in found.items()}


QUIET = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def identify(folder: Path, clients: list[str]) -> dict[str, Path]:
    """Folders of identities by client; the server's under ""."""
    authority = Authority.init(folder / "authority")
    out = {name: folder / f"identity-{name}" for name in ("", *clients)}
    credentials.store(out[""], authority.issue_server(["127.0.0.1"]))
    for name in clients:
        asked = credentials.prepare(out[name])
        certificate = authority.issue_client(asked.csr, name)
        credentials.store(out[name], Credentials(authority.ca, certificate, asked.key))
    return out


@contextmanager
def proxy(
    port: int, road: Road | None, passed: dict[str, tuple[int, int]], client: str
) -> Generator[int]:
    """A proxy's port; ``passed`` has its bytes in the end. Without a road it only counts."""
    rates: list[str] = []
    if road is not None:
        rates = [f"--rate={road.up * 125e3}", f"--down={road.down * 125e3}"]
        rates += [f"--delay={road.trip / 2e3}"]
    process = subprocess.Popen(
        [sys.executable, str(TESTS / "proxy.py"), "--target", f"127.0.0.1:{port}", *rates],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline())
    finally:
        process.stdin.close()
        words = process.stdout.readline().split()
        passed[client] = int(words[0]), int(words[1])
        process.wait(20)


# ---- in a process of its own


def child(recipe: Path) -> None:
    """Prints the load of a turn by client."""
    torch.set_num_threads(1)
    cache = assets.Cache(assets.default_root(os.environ))
    stage = opened(survey(recipe_file.read(recipe, ["rounds=1"]), cache))
    stage.engine.measures = True
    loads: dict[str, dict[str, int]] = {}

    def load(event: Event) -> None:
        if isinstance(event, TurnEnded):
            loads[event.client] = asdict(work_of(event).load)

    stream = Stream()
    stream.subscribe(load)
    running.run(stage, stream)
    stage.engine.close()
    sys.stdout.write(json.dumps(loads) + "\n")


# ---- the four questions


def loopback(bench: Bench, case: Case, repeats: int) -> dict[str, Any]:
    """A step in one process, between two on plain text, and with mutual TLS."""
    runs: dict[str, list[Run]] = {"in process": [], "plain": [], "tls": []}
    for _ in range(repeats):
        runs["in process"].append(bench.local(case))
        runs["plain"].append(bench.served(case, tls=False))
        runs["tls"].append(bench.served(case, tls=True))
    one = runs["tls"][0]
    out: dict[str, Any] = {
        "case": asdict(case),
        "messages_per_step": one.median("messages") / case.steps,
        "each": {way: [run.median() / case.steps for run in held] for way, held in runs.items()},
    }
    for name, pick in PICKS.items():
        steps = {way: over(held, pick=pick) / case.steps for way, held in runs.items()}
        added = {way: steps[way] - steps["in process"] for way in ("plain", "tls")}
        out[name] = {
            "step_seconds": steps,
            "ratio": {way: steps[way] / steps["in process"] for way in added},
            "added_ms_per_message": {
                way: 1e3 * more / out["messages_per_step"] for way, more in added.items()
            },
        }
    return out


PICKS: dict[str, Pick] = {"median": statistics.median, "fastest": min}


def over(
    runs: list[Run], what: str = "seconds", client: str = "anna", pick: Pick = statistics.median
) -> float:
    """The median, or another choice, over the turns of several runs."""
    return pick([getattr(t, what) for run in runs for t in run.turns if t.client == client])


def sizes(bench: Bench) -> dict[str, Any]:
    """Bytes of a step by the ledger and at the proxy, from runs of 1 and 5 steps a round."""
    known = json.loads((HERE / "results" / "wire.json").read_text("utf-8"))["summary"]
    short, long, rounds = 1, 5, 2
    raw = 4 * 4 * MINILM.batch * MINILM.length * 384
    out: dict[str, Any] = {}
    for wire, tls in [*((w, True) for w in get_args(Wire)), ("fp32", False)]:
        found: list[tuple[float, float]] = []
        for steps in (short, long):
            case = Case("minilm", 8, 32, ONE, steps, rounds, link={"wire": wire})
            run = bench.served(case, tls=tls, roads={"anna": None})
            ledger = run.median("sent") + run.median("received")
            found.append((ledger, sum(run.wire["anna"]) / rounds))
        ledger, passed = ((found[1][n] - found[0][n]) / (long - short) for n in (0, 1))
        out[wire if tls else f"{wire}, plain text"] = {
            "ledger_bytes_per_step": ledger,
            "passed_bytes_per_step": passed,
            "framing": passed / ledger - 1,
            "of_raw_fp32": passed / raw,
            "own_minus_fp32": known[wire]["own_minus_fp32"],
            "global_minus_fp32": known[wire]["global_minus_fp32"],
        }
    return {"raw_fp32_bytes_per_step": raw, "wires": out}


def far_away(bench: Bench, case: Case, repeats: int) -> dict[str, Any]:
    """Steps over 100 Mbit/s and 40 ms, one part at a time and two, each also with the next batch's
    front sent ahead, against wire and compute."""
    runs: dict[str, list[Run]] = {}
    cases = {
        f"{window}{', ahead' if ahead else ''}": replace(
            case, link={"window": window, "ahead": ahead}
        )
        for ahead in (False, True)
        for window in (1, 2)
    }
    for _ in range(repeats):
        for window, each in cases.items():
            runs.setdefault(f"near {window}", []).append(bench.served(each, tls=True))
            road = {"anna": CABLE}
            runs.setdefault(f"far {window}", []).append(bench.served(each, tls=True, roads=road))
    out: dict[str, Any] = {"case": asdict(case), "road": asdict(CABLE)}
    out["each"] = {way: [run.median() / case.steps for run in held] for way, held in runs.items()}
    for name, pick in PICKS.items():
        held = {w: _against(runs, w, case.steps, pick) for w in cases}
        one, two = held["1"], held["2"]
        sum_of_one = one["step_seconds"] / one["over_the_sum"]
        out[name] = {
            "window": held,
            "window_2_against_1": two["step_seconds"] / one["step_seconds"],
            "window_2_against_the_sum_of_1": two["step_seconds"] / sum_of_one,
            "ahead_against_not": {
                w: held[f"{w}, ahead"]["step_seconds"] / held[w]["step_seconds"] for w in ("1", "2")
            },
        }
    return out


def _against(
    runs: Mapping[str, list[Run]], window: str, steps: int, pick: Pick
) -> dict[str, float]:
    """A step over the link against the same without it, its bytes at the rate, and its trips."""
    near, far = runs[f"near {window}"], runs[f"far {window}"]
    sent, received, messages = (over(far, what) for what in ("sent", "received", "messages"))
    took, without = over(far, pick=pick), over(near, pick=pick)
    return {
        "step_seconds": took / steps,
        "without_the_link": without / steps,
        "rate_seconds": CABLE.seconds(sent, received, 0) / steps,
        "trip_seconds": CABLE.seconds(0, 0, messages) / steps,
        "messages_per_step": messages / steps,
        "over_the_sum": took / (CABLE.seconds(sent, received, messages) + without),
    }


def clock(bench: Bench, name: str, repeats: int) -> dict[str, Any]:
    """What the simulated clock says of rounds, with speeds measured here, against real ones."""
    case, roads = FLEETS[name]
    loads, alone, runs = bench.loads(case), [bench.apart(case)], list[Run]()
    for _ in range(repeats):
        runs.append(bench.served(case, tls=True, roads=roads))
        alone.append(bench.apart(case))
    out: dict[str, Any] = {
        "case": asdict(case),
        "roads": {c: asdict(road) for c, road in roads.items()},
        "loads": {c: asdict(load) for c, load in loads.items()},
        "alone": [[(t.client, t.near, t.far) for t in run.turns] for run in alone],
        "each": [run.rounds for run in runs],
    }
    for which, pick in PICKS.items():
        said = _said(loads, roads, alone, pick)
        took = pick([seconds for run in runs for seconds in run.rounds])
        turns = {c: over(runs, client=c, pick=pick) for c in case.cuts}
        ratio = took / said["round_said"]
        out[which] = {**said, "round_took": took, "turns_took": turns, "ratio": ratio}
    return out


def _said(
    loads: Mapping[str, Load], roads: Mapping[str, Road], alone: list[Run], pick: Pick
) -> dict[str, Any]:
    """What the clock says of a round, at these speeds."""
    devices: dict[str, Device] = {}
    works: list[Work] = []
    far_seconds = far_flops = 0.0
    for client, load in loads.items():
        near, far = (over(alone, what, client, pick) for what in ("near", "far"))
        devices[client] = roads[client].device(load.near_flops / near)
        works.append(Work(0, 0, client, load))
        far_seconds, far_flops = far_seconds + far, far_flops + load.far_flops
    server = far_flops / far_seconds
    turns = {w.client: seconds_of(w.load, devices[w.client], server) for w in works}
    return {
        "gflops": {c: (d.flops or 0) / 1e9 for c, d in devices.items()} | {"server": server / 1e9},
        "round_said": run_seconds(works, devices, server),
        "round_said_if_nobody_waited": max(v for v in turns.values() if v is not None),
        "turns_said_alone": turns,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", type=Path)
    parser.add_argument(
        "--only",
        choices=["loopback", "bytes", "far", "clock"],
        help="measure this again, and keep the rest of the result",
    )
    parser.add_argument("--out", type=Path, default=HERE / "results" / "network.json")
    parser.add_argument("--repeats", type=int, default=2)
    asked = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if asked.child:
        child(asked.child)
        return
    began = time.monotonic()
    result: dict[str, Any] = {
        "command": "python benchmarks/network.py",
        "facts": commands.facts(),
        "cores": os.cpu_count(),
        "load": {"before": os.getloadavg()},
    }
    if asked.only:
        result = json.loads(asked.out.read_text("utf-8"))
    before = result.get("minutes", 0.0)
    nursery = Nursery(HERE / "stopwatch.py")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(nursery, Path(folder))
        parts: dict[str, Any] = {
            "loopback": lambda: {
                c.model: loopback(bench, c, asked.repeats) for c in (MINILM, SMOLLM)
            },
            "bytes": lambda: sizes(bench),
            "far": lambda: far_away(bench, MINILM, asked.repeats),
            "clock": lambda: {name: clock(bench, name, asked.repeats) for name in FLEETS},
        }
        try:
            for name, part in parts.items():
                if asked.only in (None, name):
                    result[name] = part()
                    result["load"][name] = os.getloadavg()
                    result["minutes"] = round(before + (time.monotonic() - began) / 60, 2)
                    asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        finally:
            nursery.close()


if __name__ == "__main__":
    main()
