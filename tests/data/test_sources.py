"""Sources: every format and folder shape, and a clear refusal of what is broken."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexp.data import formats
from flexp.data.sources import Row, read, shipped
from flexp.errors import AssetError, DataError


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def fields(rows: list[Row]) -> list[dict[str, object]]:
    return [dict(row.fields) for row in rows]


# jsonl


def test_jsonl_tolerates_mark_line_ends_and_empty_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mine" / "a.jsonl",
        b'\xef\xbb\xbf{"text": "caf\xc3\xa9", "label": 1}\r\n\r\n \n'
        b'{"x": null, "y": true, "z": -1.5e1, "u": "\\u00e9\xe2\x80\xa8"}',
    )
    rows = read(path)
    assert fields(rows) == [
        {"text": "café", "label": 1},
        {"x": None, "y": True, "z": -15.0, "u": "é\u2028"},
    ]
    assert [row.origin for row in rows] == [f"{path.as_posix()}:1", f"{path.as_posix()}:4"]


@pytest.mark.parametrize(
    ("line", "byte", "reason"),
    [
        ('{"text": "a" "label": 1}', 14, "comma"),
        ('{"é": 1, "b"}', 14, "colon"),  # é is two bytes
        ('{"text": "a", }', 15, "field name"),
        ("{}", 2, "field name"),
        ('{"text": "a"', 13, "comma or a closing brace"),
        ('{"text": "a}', 10, "Unterminated string"),
        ('{"text": nope}', 10, "Expecting value"),
        ('{"text": }', 10, "Expecting value"),
        ('{"n": NaN}', 7, "NaN is not JSON"),
        ('{"n": -Infinity}', 7, "-Infinity is not JSON"),
        ('{"n": 1e999}', 7, "too large"),
        ('{"n": ' + "9" * 5000 + "}", 7, "integer"),
        ('{"a": 1, "b": 2, "a": 3}', 18, "this field name is there twice"),
        ('{"a": 1, "\\u0061": 3}', 10, "this field name is there twice"),
        ('{"a": {"b": 1}}', 7, "nested"),
        ('{"a": ' + "[" * 5000, 7, "nested"),
        ('  ["a"]', 3, "not an object"),
        ('"a"', 1, "not an object"),
        ('{"a": 1} {"a": 2}', 10, "more text"),
        ('{"a": "\\ud800"}', 7, "surrogate"),
        ('{"a": "b\tc"}', 9, "Invalid control character"),
    ],
)
def test_broken_json_line_names_file_line_and_byte(
    tmp_path: Path, line: str, byte: int, reason: str
) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(DataError) as refused:
        read(path)
    at = f"line 3, byte {byte} (the line starts at offset 18): "
    assert str(refused.value).startswith(f"{path.as_posix()}, {at}")
    assert reason in str(refused.value)


def test_byte_counts_the_byte_order_mark(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b"\xef\xbb\xbf[1]")
    with pytest.raises(DataError, match=r"line 1, byte 4 \(.* offset 0\): not an object"):
        read(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".txt"])
def test_invalid_utf8_names_line_and_byte(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", b'{"text": "fine"}\n{"text": "\xe9"}\n')
    with pytest.raises(DataError, match=rf"a{suffix}, line 2, byte 11 \(.* 17\): not UTF-8"):
        read(path)


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"))
)
objects = st.dictionaries(st.text(st.characters(codec="utf-8")), scalars, min_size=1)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(objects, min_size=1, max_size=4), plain=st.booleans(), crlf=st.booleans())
def test_jsonl_reads_what_json_writes(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], plain: bool, crlf: bool
) -> None:
    lines = [json.dumps(row, ensure_ascii=plain) for row in rows]
    path = write(
        tmp_path_factory.mktemp("json") / "a.jsonl", ("\r\n" if crlf else "\n").join(lines)
    )
    assert fields(read(path)) == rows


@settings(max_examples=300, deadline=None)
@given(
    line=st.text('{}[]:,"\\ab01.-+eE tfnNu\x00é', max_size=16).map(lambda text: '{"a"' + text + "}")
)
def test_jsonl_accepts_only_json(tmp_path_factory: pytest.TempPathFactory, line: str) -> None:
    path = write(tmp_path_factory.mktemp("json") / "a.jsonl", line)
    try:
        rows = read(path)
    except DataError:
        return
    assert fields(rows) == [json.loads(line)]


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=60), suffix=st.sampled_from(sorted(formats.READERS)))
def test_any_bytes_are_rows_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str
) -> None:
    path = write(tmp_path_factory.mktemp("bytes") / f"a{suffix}", content)
    try:
        rows, refused = read(path), path.name
    except DataError as error:
        rows, refused = [], str(error)
    assert rows or path.name in refused


# tables and text


def test_csv_keeps_text_and_counts_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.csv", '\ufefftext,label\r\n\r\n"two\nlines, ""quoted""",007\r\nlast,\r\n'
    )
    rows = read(path)
    assert fields(rows) == [
        {"text": 'two\nlines, "quoted"', "label": "007"},
        {"text": "last", "label": ""},
    ]
    assert [row.origin.rpartition(":")[2] for row in rows] == ["3", "5"]


def test_tsv_and_text(tmp_path: Path) -> None:
    tsv = read(write(tmp_path / "a.tsv", "text\tlabel\na, b\tx\n"))
    assert fields(tsv) == [{"text": "a, b", "label": "x"}]
    txt = read(write(tmp_path / "a.TXT", "\ufeffone \r\n\n two\n"))
    assert fields(txt) == [{"text": "one "}, {"text": " two"}]
    assert [row.origin.rpartition(":")[2] for row in txt] == ["1", "3"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\na,b\nc\n", r"line 3 .*: 1 fields, but the header has 2"),
        ("text,label\n\na,b,c\n", r"line 3 .*: 3 fields, but the header has 2"),
        ("text,text\na,b\n", r"line 1 .*: columns 1 and 2 have the same name"),
        ("text,\na,b\n", r"line 1 .*: column 2 has no name"),
        ('text\na\n"b\nc\n', r"line 3 .*: unexpected end of data"),
        ('text\n"a"b\n', r"line 2 .*: .* expected after"),
    ],
)
def test_broken_csv_names_the_line(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / "a.csv", content))


# parquet and saved data sets


def parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    arrow: Any = pytest.importorskip("pyarrow")
    importlib.import_module("pyarrow.parquet").write_table(arrow.table(columns), path)
    return path


def test_parquet(tmp_path: Path) -> None:
    folder = tmp_path / "year=2026"  # not a column
    folder.mkdir()
    rows = read(parquet(folder / "a.parquet", {"text": ["a", None], "label": [1, 0]}))
    assert fields(rows) == [{"text": "a", "label": 1}, {"text": None, "label": 0}]
    assert [row.origin.rpartition("/")[2] for row in rows] == ["a.parquet:1", "a.parquet:2"]


def test_parquet_refuses_nested_columns_and_other_bytes(tmp_path: Path) -> None:
    nested = parquet(tmp_path / "a.parquet", {"text": ["a"], "tags": [["x"]]})
    with pytest.raises(DataError, match=r'a\.parquet, row 1: column "tags" holds a list'):
        read(nested)
    with pytest.raises(DataError, match=r"b\.parquet: not a parquet file"):
        read(write(tmp_path / "b.parquet", b"PAR1 not at all"))


def test_missing_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r'needs pyarrow.*pip install "flexp-sfl\[data\]"'):
        read(write(tmp_path / "a.parquet", b"PAR1"))


@pytest.fixture(scope="module")
def datasets() -> Any:
    return pytest.importorskip("datasets")


def test_saved_data_set_with_and_without_splits(tmp_path: Path, datasets: Any) -> None:
    one = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    one.save_to_disk(str(tmp_path / "one"))
    rows = read(tmp_path / "one")
    assert fields(rows) == [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    assert rows[1].origin == f"{(tmp_path / 'one').as_posix()}:2"
    both = datasets.DatasetDict({"train": one, "test": one.select([0])})
    both.save_to_disk(str(tmp_path / "both"))
    rows = read(tmp_path / "both")
    assert [row.fields["split"] for row in rows] == ["train", "train", "test"]
    assert len({row.origin for row in rows}) == 3


def test_saved_data_sets_as_clients(tmp_path: Path, datasets: Any) -> None:
    for client in ("a", "b"):
        datasets.Dataset.from_dict({"text": [client]}).save_to_disk(str(tmp_path / "of" / client))
    assert fields(read(tmp_path / "of")) == [
        {"text": "a", "client": "a"},
        {"text": "b", "client": "b"},
    ]


def test_damaged_data_set_is_refused(tmp_path: Path, datasets: Any) -> None:
    write(tmp_path / "one" / "state.json", "{")
    with pytest.raises(DataError, match="one: not a data set that can be opened"):
        read(tmp_path / "one")


# folders


def test_a_file_per_client_in_mixed_formats(tmp_path: Path) -> None:
    write(tmp_path / "b.csv", "text\nb\n")
    write(tmp_path / "a.jsonl", '{"text": "a"}\n')
    write(tmp_path / "c.txt", "c\n")
    write(tmp_path / ".hidden", "x")
    assert fields(read(tmp_path)) == [{"text": x, "client": x} for x in ("a", "b", "c")]


def test_a_folder_per_client_with_splits(tmp_path: Path) -> None:
    for client in ("a", "b"):
        for split in ("train", "validation", "test"):
            write(tmp_path / client / f"{split}.txt", f"{client} {split}\n")
    rows = read(tmp_path)
    assert len(rows) == 6
    assert all(
        row.fields["text"] == f"{row.fields['client']} {row.fields['split']}" for row in rows
    )


def test_a_folder_of_splits_is_not_three_clients(tmp_path: Path) -> None:
    write(tmp_path / "train.txt", "a\n")
    write(tmp_path / "test.txt", "b\n")
    assert fields(read(tmp_path)) == [
        {"text": "b", "split": "test"},
        {"text": "a", "split": "train"},
    ]


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "reviews.jsonl", "{}")
    with pytest.raises(DataError, match=r'review\.jsonl: no such file.*mean "reviews\.jsonl"'):
        read(tmp_path / "review.jsonl")
    with pytest.raises(DataError, match="folder does not exist either"):
        read(tmp_path / "nowhere" / "a.jsonl")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.json": "{}"}, r'a\.json: "\.json" is not a data format\. .*"\.jsonl"'),
        ({"README": "x"}, r'README: "" is not a data format'),
        ({"a.jsonl": ""}, r"a\.jsonl: no rows"),
        ({"a.csv": "text\n"}, r"a\.csv: no rows"),
        ({"a.txt": "x", "b.txt": "\n \n"}, r"b\.txt: no rows"),
        ({"a.txt": "x", "a.csv": "text\nx"}, r"a\.csv and a\.txt would have the same name"),
        ({"a.txt": "x", "b/train.txt": "x"}, r"a\.txt beside b"),
        ({"a/train.txt": "x", "a/valid.txt": "x"}, r'"valid" is not a split.*"validation"'),
        ({"a/train.txt": "x", "a/train.csv": "text\nx"}, r"train\.csv and train\.txt"),
        ({"a/train.txt": "x", "a/test/x.txt": "x"}, r'"test" is not a split'),
        ({"a/train.txt": "x", "b/.keep": ""}, r"b: an empty folder"),
        ({"a.csv": "text,client\nx,y"}, r'a\.csv:2: the column "client" stands against'),
    ],
)
def test_folders_that_are_refused(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, content in files.items():
        write(tmp_path / "mine" / name, content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "mine")


# the packaged data sets


def test_vader_ratings_become_labels(tmp_path: Path) -> None:
    for domain in ("tweets", "movies", "amazon", "nyt"):
        write(
            tmp_path / f"{domain}.txt", f"1_1\t0.5\t{domain}\r\n1_2\t-0.51\tbad\r\n1_3\t0.6\tgood"
        )
    rows = shipped("vader", tmp_path)
    assert [row.fields["label"] for row in rows] == ["neutral", "negative", "positive"] * 4
    assert rows[0] == Row(
        {"text": "tweets", "label": "neutral", "domain": "tweets"}, "vader/tweets.txt:1"
    )
    assert {row.fields["domain"] for row in rows} == {"tweets", "movies", "amazon", "nyt"}


PLAY = r"""# Henry V

## ACT I

_Enter the KING
and others_

**KING HENRY V**$$
Where is my gracious Lord?$$
Not here__\[Aside]_ in presence,'\--so.
*Drum
within.*
_Burthen _\[dispersedly, within_

_Exit_

Send for him.

**PRINCE OF WALES**$$
_Exit_

**First Lord**
*[Reads.]*
Aye.
[Within]_

## ACT II

Nobody speaks this.
""".replace("$", " ")


def test_shakespeare_speeches_without_directions(tmp_path: Path) -> None:
    write(tmp_path / "plays" / "henry-v.md", PLAY)
    write(tmp_path / "plays" / "measure-for-measure.md", "## ACT I\n\n**DUKE**  \nEscalus.\n")
    king, lord, duke = shipped("shakespeare", tmp_path)
    text = "Where is my gracious Lord?\nNot here in presence,'--so.\nSend for him."
    assert king.fields == {
        "text": text,
        "role": "King Henry V (Henry V)",
        "play": "Henry V",
        "cue": "King Henry V: ",
    }
    # The Prince between them says nothing.
    assert lord.fields["cue"] == f"King Henry V: {text}\nFirst Lord: "
    assert king.origin == "shakespeare/henry-v.md:8"
    assert (lord.fields["text"], lord.fields["role"]) == ("Aye.", "First Lord (Henry V)")
    assert duke.fields["role"] == "Duke (Measure for Measure)"


def test_spam_has_a_row_per_mail_that_says_something(tmp_path: Path) -> None:
    write(tmp_path / "mail" / "spam-1" / "2.txt", "Subject: Win\n\nNow")
    write(tmp_path / "mail" / "hard-ham-1" / "1.txt", "Subject: Hi\nList-Id: <Fork.a.b>\n\nYou")
    write(tmp_path / "mail" / "spam-2" / "3.txt", "To: you\n\n")
    assert shipped("spam", tmp_path) == [
        Row({"text": "Hi\nYou", "label": "ham", "list": "fork"}, "spam/hard-ham-1/1.txt"),
        Row({"text": "Win\nNow", "label": "spam", "list": "direct"}, "spam/spam-1/2.txt"),
    ]


def test_packaged_sets_that_are_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r'"vadr" is not a packaged data set.*"vader"'):
        shipped("vadr", tmp_path)
    with pytest.raises(AssetError, match="no plays"):
        shipped("shakespeare", tmp_path)
    with pytest.raises(AssetError, match="no mail"):
        shipped("spam", tmp_path)
    (tmp_path / "mail" / "spam-1" / "1.txt").mkdir(parents=True)
    with pytest.raises(AssetError, match=r"1\.txt: missing or damaged"):
        shipped("spam", tmp_path)
    with pytest.raises(AssetError, match=r"tweets\.txt: missing"):
        shipped("vader", tmp_path)
    write(tmp_path / "tweets.txt", "1\t0.5\tfine\n2\thigh\ttext\n")
    with pytest.raises(AssetError, match=r"vader/tweets\.txt:2: not id, rating, text"):
        shipped("vader", tmp_path)


def test_parquet_may_hold_nan_where_json_may_not(tmp_path: Path) -> None:
    (row,) = read(parquet(tmp_path / "a.parquet", {"text": ["a"], "score": [math.nan]}))
    assert math.isnan(float(str(row.fields["score"])))
