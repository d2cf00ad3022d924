"""The one door through which a model or a data set is named: asset, folder or hub id."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from flexp import headers
from flexp.assets.asset import Kind
from flexp.assets.cache import Cache, Say, fetch
from flexp.assets.registries import file_sha256
from flexp.errors import AssetError, ParcelError, nearest

if TYPE_CHECKING:
    from huggingface_hub.utils import tqdm

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DRAWN = Path(__file__).parent / "drawn"
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Never *.bin, *.pt or *.py: they run code when they are opened.
_WANTED: dict[Kind, list[str]] = {
    "model": ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"],
    "data": ["*.parquet", "*.csv", "*.json", "*.jsonl", "*.txt"],
}
# Second copies of the weights in other layouts.
_UNWANTED: dict[Kind, list[str]] = {"model": ["*/*", "consolidated*"], "data": []}


def resolve(
    source: str,
    cache: Cache,
    *,
    kind: Kind = "model",
    revision: str | None = None,
    endpoint: str | None = None,
    hub_cache: Path | None = None,
    say: Say | None = None,
) -> Path:
    """The local folder behind ``source``, fetched first where it must be.

    Tried in this order: the name of an asset or of a model that is drawn, a local path, a hub id
    (``org/name``) at ``revision``. ``endpoint`` and ``hub_cache`` default to the hub library's own.
    A hub file is compared with the digest under which the hub announced it, once.

    Raises:
        AssetError: none of the three, a missing revision or file, a wrong digest, no connection,
            or a model without safetensors weights.
    """
    if source in cache.catalogue:
        _pinned(source, revision)
        if (found := cache.catalogue[source].kind) != kind:
            raise AssetError(f'"{source}" is a {_NOUN[found]}, where a {_NOUN[kind]} is needed.')
        return fetch(source, cache, say=say)
    if kind == "model" and source in (models := drawn_models()):
        _pinned(source, revision)
        return models[source]
    path = Path(source).expanduser()
    if source and path.exists():
        _pinned(source, revision)
        if kind == "model":
            _check_model(path, source)
        return path
    if source.startswith((".", "/", "~")) or "\\" in source or path.is_absolute():
        raise AssetError(f'There is no folder "{source}". Check the path.')
    if not _HUB_ID.fullmatch(source):
        names = [name for name, asset in cache.catalogue.items() if asset.kind == kind]
        names += drawn_models() if kind == "model" else []
        raise AssetError(
            f'"{source}" is neither an asset nor a folder. {nearest(source, names)} '
            "A model of the hub is written as org/name."
        )
    if say is not None:
        say(f"Looking up {source} on the hub, revision {revision or 'main'}.")
    folder = _download(source, kind, revision, endpoint=endpoint, hub_cache=hub_cache)
    _check_digests(folder, source, cache, say)
    if kind == "model":
        _check_model(folder, source)
    return folder


def drawn_models() -> dict[str, Path]:
    """Folders, by name, of models that are a config alone: a run draws their weights."""
    return {path.parent.name: path.parent for path in sorted(_DRAWN.glob("*/config.json"))}


_NOUN: dict[Kind, str] = {"model": "model", "data": "data set"}


def _pinned(source: str, revision: str | None) -> None:
    if revision is not None:
        raise AssetError(
            f'"{source}" is not a hub id, so it has no revision "{revision}". Drop the revision.'
        )


def _download(
    source: str,
    kind: Kind,
    revision: str | None,
    *,
    endpoint: str | None,
    hub_cache: Path | None,
) -> Path:
    from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]

    with _plain_errors(source, revision or "main"):
        folder = snapshot_download(
            source,
            repo_type="model" if kind == "model" else "dataset",
            revision=revision,
            endpoint=endpoint,
            cache_dir=hub_cache,
            allow_patterns=_WANTED[kind],
            ignore_patterns=_UNWANTED[kind],
            tqdm_class=_quiet(),
        )
    return Path(folder)


@contextmanager
def _plain_errors(source: str, revision: str) -> Generator[None]:
    from huggingface_hub import errors

    # The HTTP library's own error, which huggingface_hub lets through when it gives up.
    http_error = cast("type[Exception]", errors.HfHubHTTPError.__bases__[0])
    try:
        yield
    except errors.GatedRepoError as error:
        raise AssetError(
            f"{source} wants its terms accepted. Accept them on the hub, then log in: hf auth login"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise AssetError(
            f"The hub has no {source}, or it is private. Check the name, or log in: hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise AssetError(
            f'{source} has no revision "{revision}". Name a branch, a tag or a commit of it.'
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise AssetError(
            f"{source} is not on this machine and the hub does not give it: {_in_short(error)} "
            "Check the connection, HF_ENDPOINT and HF_HUB_OFFLINE; without a network use an asset "
            "or a local folder."
        ) from error
    except errors.EntryNotFoundError as error:
        raise AssetError(
            f"A file of {source} is missing on the hub, though it lists it: {_in_short(error)}"
        ) from error
    except (http_error, OSError, ValueError) as error:
        raise AssetError(
            f"{source} could not be downloaded: {_in_short(error)} Try again; files that are "
            "complete are kept."
        ) from error


def _in_short(error: Exception) -> str:
    """An error of the hub library in one line, without its request id."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = re.sub(r" \(Request ID: [^)]*\)", "", " ".join(lines)) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} …"


def _quiet() -> type[tqdm]:
    from huggingface_hub.utils import tqdm

    class Quiet(tqdm):
        """A library has no screen: no bars."""

        def __init__(self, *args: object, **options: object) -> None:
            options["disable"] = True
            super().__init__(*args, **options)  # pyright: ignore[reportUnknownMemberType]

    return Quiet


def _check_model(folder: Path, source: str) -> None:
    """Whether a folder holds a config and all safetensors files that it lists, each readable."""
    if not (folder / "config.json").is_file():
        raise AssetError(f"{source} has no config.json, so it is not a model that can be opened.")
    try:
        files = headers.shards(folder)
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            raise AssetError(f"{source} lacks {missing[0]}, which {headers.INDEX} lists.")
        headers.of_model(folder)
    except ParcelError as problem:
        raise AssetError(f"{source}: {problem}") from problem
    if not files and not _is_drawn(folder):
        raise AssetError(
            f"{source} has no safetensors weights. Pickled weights (*.bin, *.pt) can run code and "
            "are refused; convert them, or choose another model."
        )


def _is_drawn(folder: Path) -> bool:
    """Whether a config says that there is nothing to read."""
    try:
        told = headers.strict_json((folder / "config.json").read_text("utf-8"))
        return isinstance(told, dict) and bool(cast("dict[str, Any]", told).get("drawn"))
    except (OSError, ValueError, ParcelError):
        return False


def _check_digests(folder: Path, source: str, cache: Cache, say: Say | None) -> None:
    """Compare downloaded files with the hub's digests, which the hub library does not do.

    The library names each blob by its digest and links to it, so nothing is asked of the network.
    """
    unknown: list[str] = []
    for link in sorted(folder.rglob("*")):
        if link.is_dir():
            continue
        # One step only: a blob may itself be a link into a store with other names.
        blob = link.parent / link.readlink() if link.is_symlink() else link
        mark = cache.root / ".checked" / _fingerprint(blob)
        if mark.exists():
            continue
        right = _matches(blob, blob.name)
        if right is None:
            unknown.append(link.name)
        elif not right:
            blob.unlink()
            link.unlink()
            raise AssetError(
                f"{source}: {link.name} has another digest than the hub announced. It was "
                "deleted; try again, and if it happens twice, do not trust that server."
            )
        else:
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
    if unknown and say is not None:
        say(f"The hub announced no digest to check for {', '.join(unknown)}.")


def _fingerprint(blob: Path) -> str:
    facts = blob.stat()
    text = f"{blob.absolute()}|{facts.st_size}|{facts.st_mtime_ns}"
    return hashlib.sha256(text.encode()).hexdigest()


def _matches(blob: Path, digest: str) -> bool | None:
    """Whether a file has that digest; None if the text is none."""
    if len(digest) == 64:
        return file_sha256(blob) == digest
    if not _COMMIT.fullmatch(digest):
        return None
    # Small files are named as git names them; some mirrors use the plain SHA-1.
    content = blob.read_bytes()
    heads = (f"blob {len(content)}\0".encode(), b"")
    return digest in {
        hashlib.sha1(head + content, usedforsecurity=False).hexdigest() for head in heads
    }
