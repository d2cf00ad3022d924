"""Takes named members out of wheels, tarballs and Debian packages, and writes nothing else."""

from __future__ import annotations

import hashlib
import io
import lzma
import re
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import IO

from flexp.assets.asset import Take
from flexp.errors import AssetError

_CHUNK = 1 << 20
_SCAN = 4 << 30  # most bytes that an archive may claim to hold in all, wanted or not
_BROKEN = (
    tarfile.TarError,
    zipfile.BadZipFile,
    lzma.LZMAError,
    zlib.error,
    EOFError,
    OSError,
    RuntimeError,  # an encrypted zip member; NotImplementedError is one too
)

Member = tuple[str, Callable[[], IO[bytes]]]


def extract(archive: Path, takes: Sequence[Take], folder: Path, *, limit: int) -> int:
    """Write the wanted members into ``folder``; returns the bytes written.

    Raises:
        AssetError: a member is missing, has another digest, would land outside the folder, is
            more than ``limit`` bytes together with the others, or the archive cannot be read.
    """
    try:
        return _extract(archive, takes, folder, limit)
    except _BROKEN as error:
        raise AssetError(
            f"{archive.name} cannot be unpacked: {error}. Free some space or fetch it again."
        ) from error


def _extract(archive: Path, takes: Sequence[Take], folder: Path, limit: int) -> int:
    missing = {take.member for take in takes}
    direct = [take for take in takes if "!" not in take.member]
    inner: dict[str, list[Take]] = {}
    for take in takes:
        outer, mark, member = take.member.partition("!")
        if mark:
            inner.setdefault(outer, []).append(replace(take, member=member))
    written = 0
    with closing(members(archive)) as found:  # Windows deletes no file that is open
        for name, opened in found:
            for take in direct:
                if (match := _pattern(take.member).fullmatch(name)) is not None:
                    place = _place(folder, take.to.format(*match.groups()), archive)
                    written += _write(opened(), place, limit - written, take.sha256)
                    missing.discard(take.member)
            if name in inner:
                written += _nested(name, opened(), inner[name], folder, limit - written)
                missing -= {f"{name}!{take.member}" for take in inner[name]}
    if missing:
        raise AssetError(
            f"{archive.name} has no {sorted(missing)[0]}; it is not the package that was pinned."
        )
    return written


def _nested(name: str, stream: IO[bytes], takes: Sequence[Take], folder: Path, limit: int) -> int:
    with tempfile.TemporaryDirectory(prefix=".inner-", dir=folder) as scratch:
        copy = Path(scratch) / PurePosixPath(name).name
        _write(stream, copy, limit, "")
        return _extract(copy, takes, folder, limit)


def members(archive: Path) -> Generator[Member]:
    """Name and opener of each regular file, in the archive's order; links are left out."""
    name = archive.name
    if name.endswith((".whl", ".zip")):
        with zipfile.ZipFile(archive) as bundle:
            for info in bundle.infolist():
                if not info.is_dir():
                    yield info.filename, lambda info=info: bundle.open(info)
    elif name.endswith((".tar.gz", ".tgz", ".tar.xz", ".tar")):
        with archive.open("rb") as stream:
            yield from _tar_members(stream, name)
    elif name.endswith(".deb"):
        with archive.open("rb") as stream:
            yield from _tar_members(_deb_data(stream, name), name)
    else:
        raise AssetError(f"{name} is neither a wheel, a tarball nor a Debian package.")


def _tar_members(stream: IO[bytes], archive: str) -> Generator[Member]:
    claimed = 0
    with tarfile.open(fileobj=stream, mode="r:*") as bundle:
        for info in bundle:
            claimed += info.size
            if claimed > _SCAN:
                raise AssetError(f"{archive} claims more than {_SCAN:,} bytes; it is refused.")
            # isreg(): extractfile() would follow a link to another member.
            if info.isreg():
                yield info.name.removeprefix("./"), lambda info=info: _opened(bundle, info)


def _opened(bundle: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    stream = bundle.extractfile(info)
    if stream is None:
        raise AssetError(f"{info.name} is not a regular file.")
    return stream


def _deb_data(stream: IO[bytes], archive: str) -> IO[bytes]:
    """The tarball of files inside a Debian package, which is an ``ar`` archive."""
    if stream.read(8) != b"!<arch>\n":
        raise AssetError(f"{archive} is not a Debian package.")
    while len(header := stream.read(60)) == 60:
        name, size = header[:16].decode("ascii").strip().rstrip("/"), int(header[48:58])
        if name in {"data.tar", "data.tar.gz", "data.tar.xz"}:
            return io.BytesIO(stream.read(size))
        stream.seek(size + size % 2, io.SEEK_CUR)
    raise AssetError(f"{archive} has no data.tar in a compression that Python can read.")


def _pattern(member: str) -> re.Pattern[str]:
    return re.compile("([^/]*)".join(re.escape(piece) for piece in member.split("*")))


def _place(folder: Path, relative: str, archive: Path) -> Path:
    parts = relative.split("/")
    if any(part in {"", ".", ".."} or set(part) & set('\\:\0<>|"?*') for part in parts):
        raise AssetError(f'{archive.name} would write to "{relative}"; it is refused.')
    place = folder.joinpath(*parts)
    if place.exists():
        raise AssetError(f'{archive.name} would write "{relative}" twice; it is refused.')
    return place


def _write(stream: IO[bytes], place: Path, limit: int, sha256: str) -> int:
    place.parent.mkdir(parents=True, exist_ok=True)
    size, digest = 0, hashlib.sha256()
    with stream, place.open("wb") as out:
        while chunk := stream.read(_CHUNK):
            size += len(chunk)
            # Counted, not believed: sizes in headers are the sender's claim.
            if size > limit:
                raise AssetError(f"{place.name} unpacks to more than {limit:,} bytes; refused.")
            digest.update(chunk)
            out.write(chunk)
    if sha256 and digest.hexdigest() != sha256:
        raise AssetError(f"{place.name} has sha256 {digest.hexdigest()}, but {sha256} is pinned.")
    return size
