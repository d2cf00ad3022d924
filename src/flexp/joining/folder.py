"""Whose folder it is that a client keeps its things in."""

from __future__ import annotations

from pathlib import Path

from flexp.errors import LinkError
from flexp.parcel import sweep, write_atomic

OWNER = "client"  # the file that says it


def owner_of(folder: Path) -> str:
    """The client whose folder it is; nothing if nobody's."""
    note = folder / OWNER
    return note.read_text("utf-8", errors="replace") if note.is_file() else ""


def take(folder: Path, name: str) -> None:
    """LinkError if a folder holds what another client keeps; from now on it is this one's."""
    owner = owner_of(folder)
    if owner and owner != name:
        raise LinkError(
            f'{folder} is the folder of "{owner}", and this is "{name}". Give each client a folder '
            "of its own with --folder."
        )
    for place in (folder, folder / "model", folder / "adapter"):
        sweep(place)
    if not owner:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / OWNER, name.encode())
