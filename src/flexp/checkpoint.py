"""Saves and resumes a run: the strategy's state, every client's memory, every tenancy.

One folder per checkpoint, written beside and renamed, with a digest of every file; the newest one
whose digests hold is resumed. Randomness needs no saving: every stream is named by its round.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote

import torch
from torch import Tensor

from flexp.client.memory import Memory
from flexp.engine.host import CHECKPOINTS, Host
from flexp.errors import CheckpointError, ParcelError
from flexp.model.cut import Cut, Seat
from flexp.model.slots import Slots
from flexp.parcel import JSON, Parcel, file_name, load, save, sync, write_atomic
from flexp.recipe import Recipe
from flexp.strategies.base import Strategy
from flexp.tensors import Tensors

VERSION = 1
# What reading a file of another shape than ours can raise.
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


def write(folder: Path, round: int, recipe: Recipe, state: Any, engine: Host) -> Path:
    """Writes the checkpoint after a round and drops all but the newest ones."""
    final = folder / f"{round:06d}"
    work = folder / f".{round:06d}.tmp"
    shutil.rmtree(work, ignore_errors=True)
    (work / "clients").mkdir(parents=True)
    (work / "tenants").mkdir()
    save(work / "state.parcel", encode_state(state))
    for client, memory in engine.memories.items():
        memory.save(work / "clients" / f"{file_name(client)}.parcel")
    for client, home in engine.tenants.homes.items():
        facts = {"seat": _seat(home.seat), "turns": home.turns}
        save(
            work / "tenants" / f"{file_name(client)}.parcel", Parcel(home.slots.values, facts=facts)
        )
    save(work / "shared.parcel", Parcel(engine.tenants.shared.values))
    digests = {p.relative_to(work).as_posix(): _digest(p) for p in _files(work)}
    note = {
        "version": VERSION,
        "round": round,
        "recipe": recipe.plain(),
        "torch": torch.__version__,
        "files": digests,
    }
    write_atomic(work / "checkpoint.json", json.dumps(note, indent=1, sort_keys=True).encode())
    shutil.rmtree(final, ignore_errors=True)
    sync(work)
    work.rename(final)
    sync(folder)
    for old in sorted(_complete(folder))[:-CHECKPOINTS]:
        shutil.rmtree(old)
    return final


def newest(folder: Path, recipe: Recipe) -> tuple[int, Path] | None:
    """The newest checkpoint that is whole, or None if there is none at all.

    Raises CheckpointError if the recipe differs from the one that the run began with, or if
    checkpoints exist but all of them are damaged.
    """
    found = _newest(folder)
    if found is None:
        return None
    note, path = found
    changed = recipe.changed(note["recipe"])
    if changed:
        raise CheckpointError(
            f"{path} was written by another recipe: {', '.join(changed[:5])} "
            f"{'differs' if len(changed) == 1 else 'differ'}. Resume with the recipe that the "
            "run began with (recipe.yaml beside it), or start anew with another out."
        )
    return int(note["round"]), path


def done(folder: Path) -> int:
    """How many rounds the newest whole checkpoint has; 0 if there is none."""
    found = _newest(folder)
    return 0 if found is None else int(found[0]["round"])


def damaged(folder: Path) -> dict[Path, str]:
    """What is wrong with each checkpoint that cannot be used; those that can are left out."""
    return {path: problem for path, _, problem in _inspected(folder) if problem}


def whole(folder: Path) -> list[int]:
    """After which rounds there is a checkpoint that can be used, the newest first."""
    return [int(note["round"]) for _, note, problem in _inspected(folder) if not problem]


def _newest(folder: Path) -> tuple[dict[str, Any], Path] | None:
    """What the newest whole checkpoint says of itself, and its folder."""
    problems: list[str] = []
    for path, note, problem in _inspected(folder):
        if not problem:
            return note, path
        problems.append(f"{path}: {problem}")
    if problems:
        raise CheckpointError("No checkpoint can be used:\n" + "\n".join(problems))
    return None


def _inspected(folder: Path) -> Iterator[tuple[Path, dict[str, Any], str]]:
    """Checkpoints, the newest first: what each says of itself, or what is wrong with it."""
    for path in sorted(_complete(folder), reverse=True):
        try:
            note = json.loads((path / "checkpoint.json").read_bytes())
            if note["version"] != VERSION:
                raise CheckpointError(f"format {note['version']} is not {VERSION}")
            if type(note["round"]) is not int or not isinstance(note["recipe"], dict):
                raise CheckpointError("its round or its recipe is none")
            for name, digest in note["files"].items():
                if _digest(path / name) != digest:
                    raise CheckpointError(f"{name} was changed or is damaged")
        except (*_DAMAGE, CheckpointError) as problem:
            yield path, {}, f"{type(problem).__name__}: {problem}"
        else:
            yield path, note, ""


def read(path: Path, strategy: Strategy[Any], engine: Host) -> Any:
    """Puts memories and tenancies back into an engine and returns the strategy's state."""
    try:
        # Of what else lies there no digest is known.
        listed = sorted(json.loads((path / "checkpoint.json").read_bytes())["files"])
        for file in (path / name for name in listed if name.startswith("clients/")):
            engine.memories[unquote(file.stem)] = Memory.load(file)
        for file in (path / name for name in listed if name.startswith("tenants/")):
            client, parcel = unquote(file.stem), load(file)
            facts = cast("dict[str, Any]", parcel.facts)
            a, b, labels, rank, *how = facts["seat"]
            recompute, accumulate, model = cast("Any", (*how, *(0, 1, "")[len(how) :]))
            seat = Seat(Cut(a, b), labels, model, rank, recompute, accumulate)
            engine.tenants.join(client, seat, {})
            _restore(engine.tenants[client].slots, parcel)
            engine.tenants.commit(client)
            engine.tenants[client].turns = int(facts.get("turns", 0))
        _restore(engine.tenants.shared, load(path / "shared.parcel"))
        return decode_state(load(path / "state.parcel"), strategy)
    except (*_DAMAGE, ParcelError) as problem:
        raise CheckpointError(f"{path} cannot be resumed: {problem}") from problem


# ---- state of a strategy as data


def encode_state(state: Any) -> Parcel:
    """Dataclasses, mappings, sequences, tensors and JSON values as one parcel."""
    tensors: Tensors = {}

    def plain(value: Any) -> JSON:
        if isinstance(value, Tensor):
            tensors[str(len(tensors))] = value
            return {"$tensor": str(len(tensors) - 1)}
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            held = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
            return {"$class": type(value).__name__, "fields": held}
        if isinstance(value, Mapping):
            rows = cast("Mapping[Any, Any]", value)
            return {"$map": [[plain(k), plain(v)] for k, v in rows.items()]}
        if isinstance(value, tuple | list):
            rows = cast("list[Any]", value)
            mark = "$tuple" if isinstance(value, tuple) else "$list"
            return {mark: [plain(v) for v in rows]}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise CheckpointError(
            f"A strategy's state holds a {type(value).__name__}. State is data: dataclasses, "
            "mappings, sequences, tensors and plain values."
        )

    skeleton = plain(state)
    return Parcel(tensors=tensors, facts={"state": skeleton})


def decode_state(parcel: Parcel, strategy: Strategy[Any]) -> Any:
    """The state that ``encode_state`` wrote; its classes come from the modules of the strategy."""
    modules = [vars(sys.modules[kind.__module__]) for kind in type(strategy).__mro__]

    def full(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        held = cast("Mapping[str, Any]", value)
        if "$tensor" in held:
            return parcel.tensors[held["$tensor"]]
        if "$map" in held:
            return {full(k): full(v) for k, v in held["$map"]}
        if "$tuple" in held:
            return tuple(full(v) for v in held["$tuple"])
        if "$list" in held:
            return [full(v) for v in held["$list"]]
        made = next((m[held["$class"]] for m in modules if held["$class"] in m), None)
        if not dataclasses.is_dataclass(made):
            raise CheckpointError(f'The method has no state class "{held["$class"]}".')
        return cast("Any", made)(**{k: full(v) for k, v in held["fields"].items()})

    return full(parcel.facts["state"])


# ---- inside


def _seat(seat: Seat) -> JSON:
    how = [seat.recompute, seat.accumulate, seat.model]
    return [seat.cut.front, seat.cut.back, seat.labels, seat.rank, *how]


def _restore(slots: Slots, parcel: Parcel) -> None:
    slots.values = {slot: dict(held) for slot, held in parcel.adapters.items()}


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _complete(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [p for p in folder.iterdir() if p.is_dir() and p.name.isdigit()]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
