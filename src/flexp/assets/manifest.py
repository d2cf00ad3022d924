"""``asset.json``: where the files of a fetched asset came from, and the sha256 of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

from flexp.assets.asset import Asset
from flexp.assets.registries import file_sha256

MANIFEST = "asset.json"
Files = dict[str, tuple[int, str]]  # path in the asset's folder to (bytes, sha256)


def write_manifest(asset: Asset, folder: Path) -> None:
    """Record all files that lie in ``folder``."""
    files = {
        path.relative_to(folder).as_posix(): (path.stat().st_size, file_sha256(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    facts = {
        "name": asset.name,
        "package": asset.pin,
        "sha256": asset.sha256,
        "licence": asset.licence,
        "source": asset.source,
        "note": asset.note,
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def read_manifest(asset: Asset, folder: Path) -> Files | None:
    """The recorded files; None if nothing readable is there or it is of another pin."""
    try:
        facts: object = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(facts, dict):
        return None
    known = cast("dict[str, object]", facts)
    files = known.get("files")
    if known.get("sha256") != asset.sha256 or not isinstance(files, dict):
        return None
    try:
        return {
            relative: (int(entry[0]), str(entry[1]))
            for relative, entry in cast("dict[str, list[str]]", files).items()
        }
    except (IndexError, KeyError, TypeError, ValueError, OverflowError):
        return None


def is_whole(asset: Asset, folder: Path) -> bool:
    """Whether all recorded files are there with their sizes; nothing is hashed."""
    files = read_manifest(asset, folder)
    return files is not None and all(
        (folder / relative).is_file() and (folder / relative).stat().st_size == size
        for relative, (size, _) in files.items()
    )
