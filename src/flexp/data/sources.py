"""Sources: where rows come from; every row remembers its file and line."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from flexp.data import formats, images
from flexp.data.formats import Value
from flexp.data.mail import read_mail
from flexp.errors import AssetError, DataError, nearest

SPLITS = ("train", "validation", "test")
SHIPPED = ("vader", "shakespeare", "spam", "fashion-mnist", "cifar10")

_DOMAINS = ("tweets", "movies", "amazon", "nyt")
_ROLE = re.compile(r"\*\*(.+)\*\*\s*")
# A direction is _..._ or *...* (over lines, not paragraphs), here and there [...]_ or __\[...]_.
_STAGE = re.compile(r"[_*]*\\?\[[^\]_*]*\][_*]+|[_*]+[^_*\n]*(?:\n[^_*\n]+)*[_*]+(?:\\\[[^_\n]*_)?")
_ESCAPE = re.compile(r"\\(?=[^\w\s])")
_SMALL = frozenset({"and", "as", "for", "in", "of", "the", "to"})


@dataclass(frozen=True)
class Row:
    """One example as it was found; ``origin`` is like ``mine/a.jsonl:3`` and unique in a source.

    Relative paths in it begin in ``base``.
    """

    fields: Mapping[str, Value]
    origin: str
    base: str = ""


def read(path: Path) -> list[Row]:
    """Rows of a file, of a saved Hugging Face data set, or of a folder of clients.

    A folder's files are one client each (adds the field ``client``); in a folder of folders every
    folder is one client and its files are named by split (adds ``client`` and ``split``); a folder
    of nothing but train.*, validation.* and test.* is one data set (adds ``split``). Images in a
    folder per class (adds ``image`` and ``label``) may lie in folders per split, client, or both.
    """
    try:
        return _read(path)
    except OSError as problem:  # of a folder or a name; what is within a file says more
        reason = problem.strerror or str(problem)
        raise DataError(f"{path.as_posix()}: {reason}. Check data.path.") from problem


def _read(path: Path) -> list[Row]:
    if path.is_dir() and not formats.is_saved(path) and images.holds_images(path):
        return [Row(fields, origin) for fields, origin in images.listed(path, SPLITS)]
    if path.is_dir():
        return _saved(path, {}) if formats.is_saved(path) else _folder(path)
    if path.exists():
        return _file(path, {})
    folder = path.parent
    beside = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    hint = nearest(path.name, beside) if beside else "Its folder does not exist either."
    raise DataError(f"{path.as_posix()}: no such file or folder. {hint} Check data.path.")


def shipped(name: str, folder: Path) -> list[Row]:
    """Rows of a packaged data set whose files are in this folder.

    ``vader``: text, label (negative below -0.5, positive above 0.5, else neutral), domain.
    ``shakespeare``: text (one speech), role (with its play), play, cue (the speech before it in
    the scene and the name of who speaks now, laid out as in a play).
    ``spam``: text (subject and beginning of an e-mail), label (ham or spam), list (the mailing
    list by which it came, or direct). ``fashion-mnist``, ``cifar10``: image, label.
    """
    if name == "vader":
        return [row for domain in _DOMAINS for row in _ratings(folder, domain)]
    if name == "shakespeare":
        plays = sorted((folder / "plays").glob("*.md"))
        if not plays:
            raise AssetError(f"shakespeare: no plays in {folder}. Fetch the asset again.")
        return [row for play in plays for row in _speeches(play)]
    if name == "spam":
        mails = sorted((folder / "mail").glob("*/*.txt"))
        if not mails:
            raise AssetError(f"spam: no mail in {folder}. Fetch the asset again.")
        return [row for mail in mails for row in _mail(mail)]
    if name in ("fashion-mnist", "cifar10"):
        found = images.fashion(folder) if name == "fashion-mnist" else images.cifar10(folder)
        return [Row(fields, origin) for fields, origin in found]
    raise DataError(f'"{name}" is not a packaged data set. {nearest(name, SHIPPED)}')


def _file(path: Path, more: Mapping[str, Value]) -> list[Row]:
    found = formats.records(path)
    base = path.parent.as_posix()
    rows = [_row(fields, f"{path.as_posix()}:{at}", more, base) for at, fields in found]
    return _some(rows, path)


def _saved(folder: Path, more: Mapping[str, Value]) -> list[Row]:
    rows: list[Row] = []
    for split, (number, fields) in formats.saved(folder):
        where = folder.as_posix() if split is None else f"{folder.as_posix()}/{split}"
        added = more if split is None else {**more, "split": split}
        rows.append(_row(fields, f"{where}:{number}", added))
    return _some(rows, folder)


def _folder(folder: Path) -> list[Row]:
    entries = _visible(folder)
    folders = [entry for entry in entries if entry.is_dir()]
    if folders and len(folders) < len(entries):
        stray = next(entry for entry in entries if not entry.is_dir())
        raise DataError(
            f"{folder.as_posix()}: files beside folders ({stray.name} beside {folders[0].name}). "
            "Give every client a file, or give every client a folder."
        )
    if folders:
        return [row for client in folders for row in _client(client)]
    if all(entry.stem in SPLITS for entry in entries):
        return _splits(folder, {})
    _distinct_stems(folder, entries)
    return [row for entry in entries for row in _file(entry, {"client": entry.stem})]


def _client(folder: Path) -> list[Row]:
    more: dict[str, Value] = {"client": folder.name}
    return _saved(folder, more) if formats.is_saved(folder) else _splits(folder, more)


def _splits(folder: Path, more: Mapping[str, Value]) -> list[Row]:
    entries = _visible(folder)
    for entry in entries:
        if entry.stem not in SPLITS or not entry.is_file():
            raise DataError(
                f'{entry.as_posix()}: "{entry.stem}" is not a split. {nearest(entry.stem, SPLITS)} '
                f"Name the files of {folder.name} train.*, validation.* and test.*."
            )
    _distinct_stems(folder, entries)
    return [row for entry in entries for row in _file(entry, {**more, "split": entry.stem})]


def _visible(folder: Path) -> list[Path]:
    """Entries in name order, without hidden ones; a folder without any is an empty client."""
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    if not entries:
        raise DataError(f"{folder.as_posix()}: an empty folder. Put data there, or remove it.")
    for entry in entries:
        if not entry.name.isprintable():
            raise DataError(
                f"{folder.as_posix()}: the name {entry.name!r} has characters that cannot be "
                "shown. Rename the file or folder."
            )
    return entries


def _distinct_stems(folder: Path, entries: list[Path]) -> None:
    seen: dict[str, Path] = {}
    for entry in entries:
        first = seen.setdefault(entry.stem, entry)
        if first != entry:
            raise DataError(
                f"{folder.as_posix()}: {first.name} and {entry.name} would have the same name, "
                f'"{entry.stem}". Join the two files, or rename one.'
            )


def _row(fields: dict[str, Value], origin: str, more: Mapping[str, Value], base: str = "") -> Row:
    for name in more:
        if name in fields:
            raise DataError(
                f'{origin}: the column "{name}" stands against the {name} that the file or folder '
                "name gives. Rename the column."
            )
    return Row({**fields, **more}, origin, base)


def _some(rows: list[Row], path: Path) -> list[Row]:
    if not rows:
        raise DataError(f"{path.as_posix()}: no rows. Add rows, or remove it.")
    return rows


def _ratings(folder: Path, domain: str) -> Iterator[Row]:
    """Lines of id, mean rating in [-4, 4] and text (Hutto and Gilbert, 2014)."""
    for number, line in enumerate(_asset(folder / f"{domain}.txt").split("\n"), start=1):
        if not line.strip():
            continue
        origin = f"vader/{domain}.txt:{number}"
        try:
            _, mean, text = line.rstrip("\r").split("\t")
            rating = float(mean)
        except ValueError:
            raise AssetError(f"{origin}: not id, rating, text. Fetch the asset again.") from None
        label = "negative" if rating < -0.5 else "positive" if rating > 0.5 else "neutral"
        yield Row({"text": text.strip(), "label": label, "domain": domain}, origin)


def _speeches(path: Path) -> Iterator[Row]:
    """Speeches of one play, without stage directions; a heading ends the speech before it."""
    page = [line.rstrip() for line in _asset(path).split("\n")]
    # One play has no title of its own, only acts.
    title = next((line[2:] for line in page if line.startswith("# ")), _name(path.stem))
    role, start, body, before = "", 0, list[str](), ""
    for number, line in enumerate([*page, "#"], start=1):
        opens = _ROLE.fullmatch(line)
        if not opens and not line.startswith("#"):
            body.append(line)
            continue
        text = _spoken(body)
        if role and text:
            fields: dict[str, Value] = {"text": text, "role": f"{role} ({title})", "play": title}
            fields["cue"] = cue(before, role)
            yield Row(fields, f"shakespeare/{path.name}:{start}")
            before = f"{role}: {text}\n"
        before = before if opens else ""
        role, start, body = _name(opens[1]) if opens else "", number, []


def cue(before: str, role: str) -> str:
    """What stands before a speech: what was said, then who speaks now."""
    return f"{before}{role}: "


def _spoken(body: list[str]) -> str:
    text = _ESCAPE.sub("", _STAGE.sub("", "\n".join(body)))
    return "\n".join(line.strip() for line in text.split("\n") if line.strip())


def _name(raw: str) -> str:
    """``KING HENRY V`` as King Henry V, ``measure-for-measure`` as Measure for Measure."""
    words = string.capwords(raw.strip(": ").replace("-", " ")).split(" ")
    named = [word.upper() if re.fullmatch("[IVXivx]+", word) else word for word in words]
    small = [word.lower() if word.lower() in _SMALL else word for word in named[1:]]
    return " ".join([named[0], *small])


def _mail(path: Path) -> Iterator[Row]:
    """The row of one e-mail; none where it has no text at all."""
    try:
        text, came_by = read_mail(path.read_bytes())
    except OSError as broken:
        raise _damaged(path) from broken
    group = path.parent.name
    label = "spam" if group.startswith("spam") else "ham"
    if text:
        yield Row({"text": text, "label": label, "list": came_by}, f"spam/{group}/{path.name}")


def _asset(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as broken:
        raise _damaged(path) from broken


def _damaged(path: Path) -> AssetError:
    return AssetError(f"{path}: missing or damaged. Fetch the asset again.")
