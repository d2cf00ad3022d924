"""500 hostile files: taken or refused alike however they are read, with the place, and discreetly.

Fault rows F41 to F43 and goal G16 of the reliability table.
"""

from __future__ import annotations

import io
import os
import re
import socket
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import hostile
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from flexp import recipe_file
from flexp.data import formats, lines, sources
from flexp.errors import DataError, RecipeError
from flexp.recipe import Recipe

CHUNKS = (1, 2, 3, 7, 64, 4096, lines.CHUNK)
MIB = 1 << 20
PLACE = re.compile(r", line (\d+)(?:, byte (\d+))? \(the line starts at offset (\d+)\): ")
FILES = hostile.files()
DATA = [f for f in FILES if f.suffix != ".yaml"]
RECIPES = [f for f in FILES if f.suffix == ".yaml"]


def outcome(path: Path, chunk: int) -> tuple[list[formats.Record], str]:
    """Rows, or the error; any error of another type fails the test."""
    try:
        return list(formats.records(path, chunk=chunk)), ""
    except DataError as refused:
        return [], str(refused)


def asked(content: bytes) -> tuple[Recipe | None, str]:
    """The recipe, or the error; any error of another type fails the test."""
    try:
        return hostile.recipe_of(content), ""
    except RecipeError as refused:
        return None, str(refused)


def check_place(error: str, content: bytes) -> None:
    """The place is there, and the file has that line at that offset."""
    found = PLACE.search(error)
    assert found, error
    number, byte, offset = int(found[1]), int(found[2] or 1), int(found[3])
    assert content[:offset].count(b"\n") == number - 1
    assert not offset or content[offset - 1 : offset] == b"\n"
    line = content[offset:].partition(b"\n")[0]
    assert 1 <= byte <= len(line) + 1


def test_there_are_as_many_as_promised() -> None:
    assert len(FILES) == hostile.COUNT
    assert len(DATA) > 250
    assert len(RECIPES) > 80
    assert hostile.files() == FILES


def test_hostile_data_is_taken_or_refused_alike_and_nothing_is_told(tmp_path: Path) -> None:
    taken = 0
    for number, file in enumerate(DATA):
        path = tmp_path / f"{number}{file.suffix}"
        path.write_bytes(file.content)
        # A byte at a time is slow, and a large file has the same borders as a small one.
        chunks = CHUNKS if len(file.content) < 10_000 else CHUNKS[-2:]
        rows, error = outcome(path, chunks[0])
        for chunk in chunks[1:]:
            assert outcome(path, chunk) == (rows, error), (file.name, chunk)
        taken += not error
        if error:
            assert error.startswith(path.as_posix()), file.name
            check_place(error, file.content)
            assert not hostile.told(error), (file.name, error)
            assert len(error) < len(str(path)) + 300
    assert 20 < taken < len(DATA) - 100  # both happen


def test_hostile_recipes_are_taken_or_refused_with_one_kind_of_error() -> None:
    taken = 0
    for file in RECIPES:
        recipe, error = asked(file.content)
        if recipe is None:
            assert error.startswith("recipe"), file.name
            assert len(error) < 10_000, file.name
        else:
            taken += 1
            assert "/" not in recipe.name
            again = yaml.safe_dump(recipe.plain(), sort_keys=False)
            assert asked(again.encode()) == (recipe, "")
    assert 2 < taken < len(RECIPES) / 2


@pytest.mark.parametrize("name", ["separators", "marked", "just-fits"])
def test_odd_but_sound_files_are_taken(tmp_path: Path, name: str) -> None:
    (file,) = (f for f in DATA if (f.name, f.suffix) == (name, ".jsonl"))
    path = tmp_path / "a.jsonl"
    path.write_bytes(file.content)
    assert not outcome(path, lines.CHUNK)[1]


# ---- memory


def peak_of(work: Callable[[], object], expected: type[Exception] | None) -> int:
    """The most bytes that were held at once while the work was done or refused."""
    tracemalloc.start()
    try:
        if expected is None:
            work()
        else:
            with pytest.raises(expected):
                work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def drained(path: Path) -> Callable[[], None]:
    def drain() -> None:
        for _ in formats.records(path):
            pass

    return drain


def test_a_line_of_200_mib_is_refused_without_being_held(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "')
    os.truncate(path, 200 * MIB)  # takes no room on the disk
    assert peak_of(drained(path), DataError) < 8 * MIB
    with lines.opened(path) as source:
        with pytest.raises(DataError, match=r"line 1 \(.* offset 0\): longer than 1048576 bytes"):
            list(lines.lines_of(source))
        assert os.lseek(source.file.fileno(), 0, os.SEEK_CUR) <= lines.LONGEST + 2 * lines.CHUNK


ROOM = lines.LONGEST - 100
WORST: dict[str, tuple[str, Callable[[], bytes], type[Exception] | None]] = {
    "wide letters": (".jsonl", lambda: b'{"a": "' + b"a" * ROOM + b'\xf0\x9f\x98\x80"}', None),
    "escapes": (".jsonl", lambda: b'{"a": "' + b"\\n" * (ROOM // 2) + b'\\ud83d"}', DataError),
    "fields": (
        ".jsonl",
        lambda: b"{" + b",".join(b'"%x":0' % n for n in range(ROOM // 10)) + b"}",
        None,
    ),
    "brackets": (".jsonl", lambda: b'{"a": ' + b"[" * ROOM, DataError),
    "commas": (".csv", lambda: b"," * ROOM, DataError),
    "columns": (".csv", lambda: b",".join(b"%x" % n for n in range(ROOM // 7)) + b"\na", DataError),
    "open quote": (".csv", lambda: b'text\n"' + b"a\n" * MIB, DataError),
    "quotes": (".csv", lambda: b'text\n"' + (b"a" * 20 + b'\n","') * (MIB // 8), DataError),
    "values": (".yaml", lambda: b"a: [" + b"x," * (ROOM // 2) + b"]", RecipeError),
    "aliases": (".yaml", lambda: hostile.ALIASES, RecipeError),
}


@pytest.mark.parametrize("name", WORST)
def test_no_file_takes_64_mib_before_it_is_refused(tmp_path: Path, name: str) -> None:
    """Files of which a small piece becomes many objects, or large ones; some are sound."""
    suffix, content, expected = WORST[name]
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content())
    work = drained(path) if suffix != ".yaml" else lambda: recipe_file.read(path)
    assert peak_of(work, expected) < 64 * MIB


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".txt"])
def test_a_nul_is_no_text_in_any_format(suffix: str) -> None:
    for content in (b"text\nab\0\n", b"text\nab\0c\xff\n"):
        with pytest.raises(DataError, match=r"(line 2, byte 3|line 1, byte 1) ") as refused:
            hostile.rows_of(content, suffix)
        assert suffix == ".jsonl" or "offset 5): a NUL byte" in str(refused.value)
    if suffix != ".jsonl":
        with pytest.raises(DataError, match=r"line 2, byte 3 .*: not UTF-8"):
            hostile.rows_of(b"text\nab\xff\0\n", suffix)


def test_a_record_without_end_is_refused_where_it_began() -> None:
    content = b'text\na\n"' + (b"a" * 80 + b'\n","') * (MIB // 40)
    with pytest.raises(DataError, match=r"line 3 \(.* offset 7\): a record of more than 1048576"):
        hostile.rows_of(content, ".csv")


# ---- files that are none, or do not hold still


def test_a_pipe_and_a_device_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    for path in (tmp_path / "a.jsonl", tmp_path):  # by itself, and as the file of a client
        with pytest.raises(DataError, match=r"a\.jsonl: a pipe or a device, not a file"):
            sources.read(path)
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"zero\.txt: a pipe or a device"):
        sources.read(tmp_path / "zero.txt")
    os.mkfifo(tmp_path / "recipe.yaml")
    with pytest.raises(RecipeError, match=r"recipe\.yaml: not a file"):
        recipe_file.read(tmp_path / "recipe.yaml")


def test_a_socket_and_a_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("a.jsonl")
        with pytest.raises(DataError, match=r"a\.jsonl: cannot be read"):
            sources.read(Path("a.jsonl"))
    (tmp_path / "b.jsonl").mkdir()
    with pytest.raises(DataError, match=r"b\.jsonl: cannot be read \(Is a directory\)"):
        list(formats.records(tmp_path / "b.jsonl"))
    with pytest.raises(RecipeError, match=r"b\.jsonl: not a file"):
        recipe_file.read(tmp_path / "b.jsonl")
    with pytest.raises(DataError, match=r"File name too long\. Check data\.path"):
        sources.read(tmp_path / ("a" * 300))


def appended(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b'{"text": "later"}\n')


def rewritten(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"a", b"b"))
    os.utime(path, ns=(1, 1))  # whatever the clock's resolution


@pytest.mark.parametrize("change", [appended, rewritten, lambda path: os.truncate(path, 30)])
@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
@pytest.mark.parametrize("chunk", [1, lines.CHUNK])
def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, change: Callable[[Path], None], suffix: str, chunk: int
) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b'{"text": "a"}\n' * 3)
    reading = formats.records(path, chunk=chunk)
    next(reading)
    change(path)
    with pytest.raises(DataError, match=r"a\.(jsonl|txt)(: changed while it was read|, line 3)"):
        list(reading)


def test_a_file_that_grows_for_ever_is_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"a\n" * 10)
    read = 0

    def follow() -> None:
        nonlocal read
        for _ in formats.records(path, chunk=1):
            read += 1
            with path.open("ab") as file:
                file.write(b"a\na\n")

    with pytest.raises(DataError, match="changed while it was read"):
        follow()
    assert read <= 10


def test_a_disk_that_fails_is_a_typed_error() -> None:
    class Failing:
        def readline(self, limit: int) -> bytes:
            raise OSError(5, "Input/output error")

    source = lines.Source(Failing(), "mine/a.jsonl", 9)  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match=r"mine/a\.jsonl: cannot be read \(Input/output error\)"):
        list(lines.lines_of(source))


# ---- any bytes


@settings(max_examples=150)
@given(
    content=st.lists(
        st.sampled_from([b'{"text": "a"}', b"a,b", b'"', b"\n", b"\r", b"\0", b"\xff", b"\xc3"])
        | st.text(max_size=8).map(lambda text: text.encode("utf-8", "surrogatepass"))
        | st.binary(max_size=6),
        max_size=8,
    ).map(b"".join),
    suffix=st.sampled_from([".jsonl", ".csv", ".tsv", ".txt"]),
    chunk=st.integers(1, 20),
)
def test_any_bytes_in_any_pieces(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str, chunk: int
) -> None:
    path = tmp_path_factory.mktemp("bytes") / f"a{suffix}"
    path.write_bytes(content)
    rows, error = outcome(path, chunk)
    assert (rows, error) == outcome(path, lines.CHUNK)
    if error:
        check_place(error, content)
    else:
        assert rows == hostile.rows_of(content, suffix)


@settings(max_examples=100)
@given(content=st.binary(max_size=200))
def test_lines_are_the_file(content: bytes) -> None:
    content = content.replace(b"\0", b"").decode("utf-8", "ignore").encode()
    if content[:2] in (b"\x1f\x8b", b"PK"):
        return
    source = lines.Source(io.BytesIO(content), "given", len(content))
    found = list(lines.lines_of(source))
    mark = b"\xef\xbb\xbf" if found and found[0].mark else b""
    assert mark + "".join(line.text for line in found).encode() == content
    for line in found:
        assert content[line.offset :].startswith(
            (mark if line.number == 1 else b"") + line.text.encode()
        )
        assert content[: line.offset].count(b"\n") == line.number - 1
