"""The user's cache of assets: fetch, list, verify, remove.

One folder per asset, ``<root>/<name>/``, holding the kept files and ``asset.json``, which records
where they came from and the sha256 of each. A folder appears by one rename, so it is whole or
absent.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from flexp.assets.archives import extract
from flexp.assets.asset import Asset, Kind, find
from flexp.assets.catalogue import CATALOGUE
from flexp.assets.convert import convert_gguf, require_gguf
from flexp.assets.manifest import MANIFEST, is_whole, read_manifest, write_manifest
from flexp.assets.registries import Run, download, file_sha256, run_command
from flexp.errors import AssetError

Say = Callable[[str], None]


@dataclass(frozen=True)
class Cache:
    """A folder of assets and the catalogue that may fill it."""

    root: Path
    catalogue: Mapping[str, Asset] = field(default_factory=lambda: CATALOGUE)


@dataclass(frozen=True)
class Row:
    """One line of ``flexp assets``; sizes in bytes, ``on_disk`` is 0 while absent."""

    name: str
    kind: Kind
    present: bool
    download: int
    on_disk: int
    licence: str
    source: str
    package: str
    note: str


def default_root(env: Mapping[str, str], platform: str = sys.platform) -> Path:
    """The cache folder by ``FLEXP_CACHE``, else by the habit of the operating system.

    >>> default_root({"FLEXP_CACHE": "/big/disk"}).as_posix()
    '/big/disk'
    >>> default_root({"HOME": "/home/ada"}, "linux").as_posix()
    '/home/ada/.cache/flexp'

    Raises:
        AssetError: the environment names no home.
    """
    if chosen := env.get("FLEXP_CACHE"):
        return Path(chosen)
    if Path(cache := env.get("XDG_CACHE_HOME", "")).is_absolute():
        return Path(cache) / "flexp"
    if platform == "win32":
        if local := env.get("LOCALAPPDATA"):
            return Path(local) / "flexp" / "Cache"
        if home := env.get("USERPROFILE"):
            return Path(home) / "AppData" / "Local" / "flexp" / "Cache"
    elif home := env.get("HOME"):
        middle = ("Library", "Caches") if platform == "darwin" else (".cache",)
        return Path(home, *middle, "flexp")
    raise AssetError("There is no home folder to keep assets in. Set FLEXP_CACHE to a folder.")


def fetch(name: str, cache: Cache, *, say: Say | None = None, run: Run = run_command) -> Path:
    """The asset's folder, downloaded first when it is absent, incomplete or of another pin.

    Raises:
        AssetError: an unknown name, a failed download, a wrong digest. Nothing is left behind.
    """
    asset = find(name, cache.catalogue)
    folder = cache.root / asset.name
    if is_whole(asset, folder):
        return folder
    if say is not None:
        note = f" Note: {asset.note}." if asset.note else ""
        say(
            f"Fetching {asset.name}: {asset.pin}, {asset.download / 1e6:.1f} MB. "
            f"Licence: {asset.licence}. Source: {asset.source}.{note}"
        )
    partial = cache.root / ".partial"
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{asset.name}-", dir=partial) as scratch:
            fresh = _prepare(asset, Path(scratch), say, run)
            _swap(asset, fresh, folder)
    except OSError as error:
        raise AssetError(
            f"{asset.name} cannot be kept in {cache.root}: {error}. Set FLEXP_CACHE to a folder "
            "on a disk with room that you may write to."
        ) from error
    return folder


def _prepare(asset: Asset, scratch: Path, say: Say | None, run: Run) -> Path:
    if asset.gguf:
        require_gguf(asset.name)
    archive = download(asset, scratch, run)
    fresh = scratch / "fresh"
    fresh.mkdir()
    extract(archive, asset.takes, fresh, limit=asset.unpacked)
    archive.unlink()
    if asset.gguf:
        if say is not None:
            say(f"Converting {asset.gguf}, once.")
        convert_gguf(fresh / asset.gguf, fresh)
        (fresh / asset.gguf).unlink()
    write_manifest(asset, fresh)
    return fresh


def _swap(asset: Asset, fresh: Path, folder: Path) -> None:
    if is_whole(asset, folder):
        return  # another process was faster; its copy serves as well as ours
    if folder.exists():
        folder.rename(fresh.with_name("old"))
    try:
        fresh.rename(folder)
    except OSError:
        if not is_whole(asset, folder):
            raise


def verify(name: str, cache: Cache) -> list[str]:
    """What is wrong with a fetched asset, one sentence each; every byte is read.

    Raises:
        AssetError: an unknown name.
    """
    asset = find(name, cache.catalogue)
    folder = cache.root / asset.name
    files = read_manifest(asset, folder)
    if files is None:
        return [f"{name} is not in the cache, or of another pin. Run: flexp assets fetch {name}"]
    problems: list[str] = []
    for relative, (_, sha256) in files.items():
        if not (folder / relative).is_file():
            problems.append(f"{name}/{relative} is missing.")
        elif (found := file_sha256(folder / relative)) != sha256:
            problems.append(f"{name}/{relative} has sha256 {found} instead of {sha256}.")
    known = {*files, MANIFEST}
    problems.extend(
        f"{name}/{relative} does not belong to the asset."
        for path in sorted(folder.rglob("*"))
        if path.is_file() and (relative := path.relative_to(folder).as_posix()) not in known
    )
    # The manifest lies beside the files; whoever changed one could change the other.
    problems.extend(
        f"{name}/{take.to} is not the file that the catalogue pins."
        for take in asset.takes
        if take.sha256 and files.get(take.to, (0, take.sha256))[1] != take.sha256
    )
    return problems


def remove(name: str, cache: Cache) -> int:
    """Delete an asset and leftovers of killed fetches; returns the bytes that were freed.

    Raises:
        AssetError: an unknown name.
    """
    asset = find(name, cache.catalogue)
    freed = 0
    leftovers = (cache.root / ".partial").glob(f"{asset.name}-*")
    for folder in (cache.root / asset.name, *leftovers):
        freed += _size(folder)
        shutil.rmtree(folder, ignore_errors=True)
        if folder.exists():
            raise AssetError(f"{folder} cannot be deleted; close the programs that use it.")
    return freed


def listing(cache: Cache) -> list[Row]:
    """Every asset of the catalogue, with what of it is on disk."""
    return [
        Row(
            name=asset.name,
            kind=asset.kind,
            present=is_whole(asset, cache.root / asset.name),
            download=asset.download,
            on_disk=_size(cache.root / asset.name),
            licence=asset.licence,
            source=asset.source,
            package=f"{asset.registry}: {asset.pin}",
            note=asset.note,
        )
        for asset in cache.catalogue.values()
    ]


def locate(source: str, cache: Cache) -> Path | None:
    """The folder of a fetched asset or of a local path; None where something must be fetched."""
    if source in cache.catalogue:
        folder = cache.root / source
        return folder if is_whole(cache.catalogue[source], folder) else None
    path = Path(source).expanduser()
    return path if path.is_dir() else None


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
