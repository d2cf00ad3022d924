"""Fuzzes every target for a while, guided by which lines of the program an input reaches.

.venv/bin/python tests/fuzz/run.py --for 10m            (make fuzz FOR=10m)
.venv/bin/python tests/fuzz/run.py --repeat frame build/fuzz/frame-crash-0123

Each target has a process of its own, one after another, and an equal share of the time. What it
finds is kept under build/fuzz, and what was reached under build/fuzz/corpus, to begin with the next
time. The counts go to benchmarks/results/suite-fuzz.json.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import random
import re
import subprocess
import sys
import traceback
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "fuzz"
RESULT = ROOT / "benchmarks" / "results" / "suite-fuzz.json"
PACKAGES = ("atheris", "torch", "safetensors", "msgspec", "cryptography", "pyyaml")
UNITS = {"s": 1, "m": 60, "h": 3600}
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")


def seconds(text: str) -> float:
    """10m, 60s, 1h or a number of seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text} is no duration. Give one like 90s, 10m or 2h.")
    return float(match[1]) * UNITS[match[2] or "s"]


# ---- the process of one target


def load() -> Any:
    """The fuzzer and the targets, with the program's lines counted."""
    import atheris

    fuzzer: Any = atheris
    with fuzzer.instrument_imports(include=["flexp"]):
        from fuzz.targets import TARGETS
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    return fuzzer, TARGETS


def fuzz(fuzzer: Any, target: Any, corpus: Path, options: list[str]) -> None:
    """Never returns: the fuzzer ends the process, with a code that is not 0 for a finding."""
    corpus.mkdir(parents=True, exist_ok=True)
    for n, seed in enumerate(target.seeds()):
        (corpus / f"seed-{n}").write_bytes(seed)

    def changed(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.3:  # the fuzzer's own, which knows what comparisons looked for
            return fuzzer.Mutate(data, most)
        return target.mutator(bytes(data), rng)[:most]

    fuzzer.Setup([sys.argv[0], *options, str(corpus)], target.run, custom_mutator=changed)
    fuzzer.Fuzz()


def repeat(name: str, path: Path) -> None:
    """Runs one input again, and lets its error through."""
    from fuzz.targets import TARGETS

    TARGETS[name].run(path.read_bytes())
    print(f"{path}: nothing is found")


# ---- all of them


def fuzzed(fuzzer: Any, name: str, target: Any, share: float) -> dict[str, Any]:
    """One target for so many seconds, in a process of its own: counts, and what was found."""
    before = set(BUILD.glob(f"{name}-*"))
    options = [
        f"-max_total_time={max(1, round(share))}", f"-artifact_prefix={BUILD}/{name}-",
        "-timeout=20", "-rss_limit_mb=4096", "-max_len=65536", "-print_final_stats=1",
    ]  # fmt: skip
    log = BUILD / f"{name}.log"
    sys.stdout.flush()
    child = os.fork()  # what was imported is there at once
    if not child:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        try:
            fuzz(fuzzer, target, BUILD / "corpus" / name, options)
        except Exception:  # it did not even begin; a finding leaves with SystemExit
            traceback.print_exc()
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = log.read_text("utf-8", errors="replace")
    found = sorted(set(BUILD.glob(f"{name}-*")) - before)
    if code:
        here = Path(__file__).relative_to(ROOT)
        again = [f"Again: {sys.executable} {here} --repeat {name} {path}" for path in found]
        print("\n".join([said[-3000:], *again]), file=sys.stderr)
    stat = re.search(r"stat::number_of_executed_units:\s*(\d+)", said)
    inputs, reached = int(stat[1]) if stat else 0, re.findall(r"cov: (\d+) ft: ", said)
    return {
        "inputs": inputs,
        "per_second": round(inputs / max(share, 1), 1),
        "edges": int(reached[-1]) if reached else 0,
        "findings": max(len(found), int(code != 0)),
        "seconds": round(share, 1),
    }


def git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def suite(total: float, names: list[str]) -> int:
    """All targets, the result file, and how many findings there are."""
    fuzzer, targets = load()
    from fuzz.draws import scratch

    BUILD.mkdir(parents=True, exist_ok=True)
    scratch()  # made here, so that it is cleared away here
    chosen = names or list(targets)
    busy = os.getloadavg()
    made: dict[str, Any] = {}
    for name in chosen:
        target = targets[name]
        made[name] = {
            "promise": target.promise,
            **fuzzed(fuzzer, name, target, total / len(chosen)),
        }
        print(f"{name}: {json.dumps(made[name])}", flush=True)
    document: dict[str, Any] = {
        "commit": git("rev-parse", "HEAD"),
        "changed": bool(git("status", "--porcelain", "--untracked-files=no", "src")),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "load": {"before": busy, "after": os.getloadavg(), "processors": os.cpu_count()},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
        "total": {
            key: round(sum(row[key] for row in made.values()), 1)
            for key in ("inputs", "findings", "seconds")
        },
        "targets": made,
    }  # fmt: skip
    if not names:
        RESULT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return int(document["total"]["findings"])


def main() -> int:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--for", dest="total", type=seconds, default=seconds("10m"))
    parser.add_argument("--only", nargs="*", default=[], help="these targets; no result is written")
    parser.add_argument("--repeat", nargs=2, metavar=("TARGET", "FILE"))
    asked = parser.parse_args()
    if asked.repeat:
        repeat(asked.repeat[0], Path(asked.repeat[1]))
        return 0
    return int(suite(asked.total, asked.only) > 0)


if __name__ == "__main__":
    sys.exit(main())
