"""The audit log: what was written is found again, and what was changed is found out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexp import audit
from flexp.audit import MAX_LINE, MAX_NAME, MAX_TEXT, AuditLog, verify
from flexp.errors import AuditError


def clock() -> Callable[[], float]:
    return map(float, count(1)).__next__


def filled(path: Path, records: int = 5) -> bytes:
    log = AuditLog(path, clock())
    for n in range(records):
        log.append("refused", who=f"phone-{n}", text="a message under another key")
    log.close()
    return path.read_bytes()


def test_records_are_as_they_are_described(tmp_path: Path) -> None:
    path = tmp_path / "new" / "audit.jsonl"
    log = AuditLog(path, clock())
    assert (log.count, log.head) == (0, "")
    log.append("joined", who="phone", text="from 192.0.2.7")
    log.append("ended")
    log.close()
    one, two = (json.loads(line) for line in path.read_bytes().splitlines())
    assert [one[k] for k in ("n", "at", "what", "who", "text", "before")] == [
        *(1, 1.0, "joined", "phone", "from 192.0.2.7", ""),
    ]
    assert (two["n"], two["before"], two["chain"]) == (2, one["chain"], log.head)
    assert set(one) == {"n", "at", "what", "who", "text", "before", "chain"}
    assert verify(path)[0] == verify(path, head=log.head)[0] == 2
    assert not path.stat().st_mode & 0o077 or os.name != "posix"


def test_a_log_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    filled(path, 3)
    log = AuditLog(path, clock())
    assert log.count == 3
    log.append("again")
    log.close()
    assert verify(path, head=log.head)[0] == 4


def test_a_long_log_is_gone_on_with_from_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "audit.jsonl"
    filled(path, 40)
    monkeypatch.setattr(audit, "TAIL", 1500)
    log = AuditLog(path, clock())
    log.append("again")
    log.close()
    assert verify(path, head=log.head)[0] == 41


@given(st.text(st.characters(), max_size=700), st.text(st.characters(), max_size=200))
@settings(max_examples=60)
def test_any_text_makes_one_short_line_that_verifies(
    tmp_path_factory: pytest.TempPathFactory, text: str, name: str
) -> None:
    path = tmp_path_factory.mktemp("log") / "audit.jsonl"
    log = AuditLog(path, clock())
    log.append(name, who=name, text=text)
    log.close()
    (line,) = path.read_bytes().splitlines()
    found = json.loads(line)
    assert verify(path)[0] == 1
    assert len(line) < MAX_LINE
    assert (found["text"] + found["who"] + found["what"]).isprintable() or not text + name
    assert len(found["text"]) <= MAX_TEXT
    assert len(found["who"]) <= MAX_NAME


def test_the_longest_record_fits_a_line(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path, lambda: -1.7976931348623157e308)
    log.append("\U0001f980" * 999, who='"' * 999, text="\U0001f980" * 9999)
    log.close()
    assert verify(path)[0] == 1


# ---- what was changed


def changed_log(tmp_path: Path, change: Callable[[list[bytes]], list[bytes]]) -> Path:
    path = tmp_path / "audit.jsonl"
    lines = change(filled(path).splitlines(keepends=True))
    path.write_bytes(b"".join(lines))
    return path


def respelt(line: bytes) -> bytes:
    """The same JSON, written otherwise."""
    return json.dumps(json.loads(line)).encode() + b"\n"


def edited(line: bytes, **changes: Any) -> bytes:
    return audit._canonical({**json.loads(line), **changes}) + b"\n"


CHANGES: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "another name": lambda n: [*n[:2], n[2].replace(b"phone-2", b"phone-3"), *n[3:]],
    "another time": lambda n: [edited(n[0], at=7.0), *n[1:]],
    "another number": lambda n: [edited(n[0], n=2), *n[1:]],
    "left out": lambda n: [*n[:2], *n[3:]],
    "the first left out": lambda n: n[1:],
    "swapped": lambda n: [n[1], n[0], *n[2:]],
    "twice": lambda n: [*n, n[-1]],
    "spelt otherwise": lambda n: [*n[:4], respelt(n[4])],
    "a blank line": lambda n: [*n, b"\n"],
    "carriage returns": lambda n: [line[:-1] + b"\r\n" for line in n],
    "no last newline": lambda n: [*n[:-1], n[-1][:-1]],
    "half a line": lambda n: [*n[:-1], n[-1][:40]],
    "text between": lambda n: [*n[:3], b"hello\n", *n[3:]],
    "nested": lambda n: [*n[:3], b"[" * 3000 + b"\n", *n[3:]],
    "a long line": lambda n: [*n[:3], b"x" * 9999 + b"\n", *n[3:]],
    "a field more": lambda n: [*n[:4], edited(n[4], more=1)],
    "a field less": lambda n: [
        *n[:4],
        audit._canonical({k: v for k, v in json.loads(n[4]).items() if k != "who"}) + b"\n",
    ],
    "a number as text": lambda n: [*n[:4], edited(n[4], n="5")],
    "true as a number": lambda n: [edited(n[0], n=True), *n[1:]],
    "NaN": lambda n: [*n[:4], n[4].replace(b'"at":5.0', b'"at":NaN')],
    "infinity": lambda n: [*n[:4], n[4].replace(b'"at":5.0', b'"at":1e999')],
    "half a surrogate": lambda n: [*n[:4], n[4].replace(b"phone-4", b"\\ud800")],
    "not text": lambda n: [*n[:4], n[4].replace(b"phone-4", b"\xff")],
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_found_and_its_line_named(name: str, tmp_path: Path) -> None:
    path = changed_log(tmp_path, CHANGES[name])
    with pytest.raises(AuditError, match=r'audit\.jsonl", line \d'):
        verify(path)


@settings(max_examples=300)
@given(st.data())
def test_any_change_of_any_byte_is_found(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("log") / "audit.jsonl"
    whole = filled(path, 3)
    found = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 2))):
        at = data.draw(st.integers(0, len(found)))
        found[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path.write_bytes(found)
    ends = [0, *(n + 1 for n, byte in enumerate(whole) if byte == 10)]
    if bytes(found) in [whole[:end] for end in ends]:
        assert verify(path)[0] == ends.index(len(found))
    else:
        with pytest.raises(AuditError):
            verify(path)


def test_records_missing_at_the_end_are_found_by_the_head(tmp_path: Path) -> None:
    path = changed_log(tmp_path, lambda lines: lines[:3])
    head = json.loads(path.read_bytes().splitlines()[-1])["chain"]
    assert verify(path)[0] == verify(path, head=head)[0] == 3
    with pytest.raises(AuditError, match="ends after line 3"):
        verify(path, head="0" * 64)
    path.write_bytes(b"")
    assert verify(path)[0] == verify(path, head="")[0] == 0
    with pytest.raises(AuditError, match="ends after line 0, where nothing is written"):
        verify(path, head=head)


# ---- what goes wrong


@pytest.mark.parametrize("kept", [1, 40, 170])
def test_a_record_that_a_kill_cut_short_is_cut_off_and_recorded(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "audit.jsonl"
    whole = filled(path, 3)
    path.write_bytes(whole + whole.splitlines()[0][:kept])
    log = AuditLog(path, clock())
    assert log.count == 4
    log.append("more")
    log.close()
    assert verify(path, head=log.head)[0] == 5
    lines = path.read_bytes().splitlines()
    assert b"".join(line + b"\n" for line in lines[:3]) == whole
    torn = json.loads(lines[3])
    assert (torn["what"], torn["text"]) == ("torn", f"{kept} bytes of a last record were cut off")


@pytest.mark.parametrize("name", ["another name", "left out", "twice", "text between"])
def test_a_log_whose_end_was_changed_is_not_gone_on_with(name: str, tmp_path: Path) -> None:
    path = changed_log(tmp_path, CHANGES[name])
    before = path.read_bytes()
    with pytest.raises(AuditError):
        AuditLog(path, clock())
    assert path.read_bytes() == before


def test_another_file_is_not_cut(tmp_path: Path) -> None:
    path = tmp_path / "letter"
    path.write_bytes(b"x" * (MAX_LINE + 1))
    with pytest.raises(AuditError, match="is no log"):
        AuditLog(path, clock())
    assert path.stat().st_size == MAX_LINE + 1


def test_two_writers_are_found_before_they_break_the_chain(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    one, two = AuditLog(path, clock()), AuditLog(path, clock())
    one.append("first")
    with pytest.raises(AuditError, match="changed by somebody else"):
        two.append("second")
    assert verify(path, head=one.head)[0] == 1


def test_a_record_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "audit.jsonl"
    log, write = AuditLog(path, clock()), os.write
    log.append("first")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda handle, data: write(handle, data[:9]))
        with pytest.raises(AuditError, match="disk is full"):
            log.append("second")
    assert (log.count, verify(path, head=log.head)) == (1, (1, log.head))

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(AuditError, match="No space left"):
            log.append("third")
    log.append("fourth")
    log.close()
    assert verify(path, head=log.head)[0] == 2


def test_files_that_cannot_be_opened_are_named(tmp_path: Path) -> None:
    with pytest.raises(AuditError, match="cannot be read"):
        verify(tmp_path / "none")
    with pytest.raises(AuditError, match="cannot be opened"):
        AuditLog(tmp_path, clock())
