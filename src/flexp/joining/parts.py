"""The model on a device: a folder or hub id where it has one, else its blocks from the server.

What comes from the server is one file per tensor, begun again where it broke off, and counts only
if its digest is that of the server's list.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

from flexp.errors import LinkError, ModelError, RecipeError
from flexp.link.control import Data, Read, Welcome
from flexp.link.dial import GrpcLink
from flexp.model.files import (
    Manifest,
    Piece,
    check_config,
    file_of,
    head_of,
    manifest,
    wanted,
    write_index,
)
from flexp.model.skeleton import Skeleton, bare, read_config
from flexp.parcel import write_atomic
from flexp.plan.devices import format_bytes
from flexp.recipe import Recipe
from flexp.recipe_file import make

STEP = 1 << 19

Say = Callable[[str], None]


def manifest_of(link: GrpcLink, digest: str) -> Manifest:
    """The server's list of its model's tensors; LinkError unless it is what was agreed to."""
    text, total = bytearray(), 1
    while len(text) < total:
        piece = cast("Data", link.ask(Read(begin=len(text), size=STEP))).data
        total = int.from_bytes(piece[:8], "little")
        if total > 64 * STEP or len(piece) < 9:
            raise LinkError("The server's list of its model's tensors is damaged.")
        text += piece[8:]
    found = Manifest.from_json(text.decode())
    if found.digest != digest:
        raise LinkError("The server's model is not the one that it said it had.")
    return found


def check_local(folder: Path, theirs: Manifest) -> None:
    """ModelError unless a folder of this device holds the server's model."""
    mine = manifest(folder)
    if mine.config != theirs.config:
        raise ModelError(
            f"{folder} is another model than the server's: their configs differ. Leave --model "
            "out to fetch the blocks from the server."
        )
    for name, piece in theirs.pieces.items():
        if name not in mine.pieces or not piece.same(mine.pieces[name]):
            raise ModelError(
                f'{folder} is another model than the server\'s: its tensor "{name}" differs. Leave '
                "--model out to fetch the blocks from the server."
            )


def recipe_of(welcome: Welcome) -> Recipe:
    """The server's recipe; RecipeError if it is none, or not the one that its hash says."""
    try:
        plain = json.loads(welcome.recipe)
    except (ValueError, RecursionError) as problem:
        raise RecipeError(f"The server's recipe is none: {problem!s:.100}.") from problem
    recipe = make(plain, "the server's recipe")
    if recipe.hash() != welcome.hash:
        raise RecipeError("The server's recipe has not the hash that it says. Do not join it.")
    return recipe


def bones_of(recipe: Recipe, welcome: Welcome, folder: Path) -> Skeleton:
    """The model's skeleton, from the config that came with the welcome."""
    place = folder / "model"
    place.mkdir(parents=True, exist_ok=True)
    check_config(welcome.config)
    path, config = place / "config.json", welcome.config.encode()
    if not path.is_file() or path.read_bytes() != config:
        write_atomic(path, config)
    read = read_config(place, recipe.task.kind, 2, None)
    return bare(read, recipe.task.kind, blocks_at=recipe.model.blocks_at)


def fetch_small(link: GrpcLink, theirs: Manifest, folder: Path) -> None:
    """Config and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (size, sha) in theirs.small.items():
        path = folder / name
        if path.is_file() and _sha256(path.read_bytes()) == sha:
            continue
        data = b"".join(_read(link, name, 0, size))
        if _sha256(data) != sha:
            raise LinkError(f'"{name}" has not the digest that the server announced. Try again.')
        if name == "config.json":
            check_config(data.decode())
        write_atomic(path, data)


def fetch_part(
    link: GrpcLink, theirs: Manifest, folder: Path, absent: Sequence[str], say: Say
) -> None:
    """The tensors that are not in absent modules; those that are there already stay.

    What is there may be another model's, which has tensors of the same names.
    """
    names = wanted(theirs.pieces, absent)
    lacking = [n for n in names if not _whole(folder / file_of(n), n, theirs.pieces[n])]
    if lacking:
        size = sum(p.end - p.begin for p in (theirs.pieces[n] for n in lacking))
        every = sum(p.end - p.begin for p in theirs.pieces.values())
        say(
            f"fetching {len(lacking)} tensors of the model from the server: {format_bytes(size)} "
            f"of {format_bytes(every)}"
        )
    for name in lacking:
        _fetch(link, name, theirs.pieces[name], folder / file_of(name))
    held = [n for n in theirs.pieces if (folder / file_of(n)).is_file()]
    write_index(folder, held)


def _fetch(link: GrpcLink, name: str, piece: Piece, path: Path) -> None:
    """One tensor, from where an earlier attempt broke off."""
    part, head = path.with_suffix(".part"), head_of(name, piece)
    size = piece.end - piece.begin
    have = part.stat().st_size - len(head) if part.is_file() else -1
    if not 0 <= have <= size:
        part.write_bytes(head)
        have = 0
    with part.open("ab") as file:
        for data in _read(link, piece.file, piece.begin + have, size - have):
            file.write(data)
    if not _whole(part, name, piece):
        part.unlink()
        raise LinkError(
            f'The tensor "{name}" has not the digest that the server announced. It was deleted; '
            "join again to fetch it anew."
        )
    part.replace(path)


def _whole(path: Path, name: str, piece: Piece) -> bool:
    """Whether a file is there and holds this very tensor."""
    if not path.is_file():
        return False
    head, sha = head_of(name, piece), hashlib.sha256()
    with path.open("rb") as file:
        if file.read(len(head)) != head:
            return False
        while data := file.read(STEP):
            sha.update(data)
    return sha.hexdigest() == piece.sha256


def _read(link: GrpcLink, path: str, begin: int, size: int) -> Iterator[bytes]:
    """So many bytes of a file as they come, with two questions under way at a time."""
    ats = range(begin, begin + size, STEP)
    under_way = [link.post(Read(path, at, min(STEP, begin + size - at))) for at in ats[:2]]
    for n, at in enumerate(ats):
        answer = under_way[n].result()
        if n + 2 < len(ats):
            more = ats[n + 2]
            under_way.append(link.post(Read(path, more, min(STEP, begin + size - more))))
        if not isinstance(answer, Data) or len(answer.data) != min(STEP, begin + size - at):
            raise LinkError(f'The server did not give all of "{path}".')
        yield answer.data


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
