"""Targets 5, 6, 9 and 10: recipes, rows, audit logs, and what shows who somebody is."""

from __future__ import annotations

import base64
import functools
import json
import shutil
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

from fuzz.draws import at, scratch

from flexp import recipe_file
from flexp.audit import AuditLog, verify
from flexp.data import sources
from flexp.errors import AuditError, DataError, IdentityError, RecipeError
from flexp.identity import Authority, credentials, open_kit, tokens, who
from flexp.identity.certificates import key_in, key_pem, key_requested, make_request, new_key
from flexp.identity.ledger import Ledger
from flexp.identity.peer import certificate_in

RECIPES = Path(__file__).parents[2] / "recipes"

# ---- 5: recipes


def recipes() -> list[bytes]:
    """The recipes that come with the program, and some overrides."""
    whole = [path.read_bytes() for path in sorted(RECIPES.glob("*.yaml"))]
    plain = recipe_file.make({"clients": {"a": {"label": "x"}}}).plain()
    return [*whole, json.dumps(plain).encode(), b"train: {lr: 1e-4}\nrounds: 3\n"]


def run_config(data: bytes) -> None:
    """RecipeError, or a recipe that says the same when it is written and read again."""
    path = at("recipe.yaml", data)
    tail = data[-40:].decode("latin-1")
    overrides = [tail] if "=" in tail else []
    for asked in ([], overrides):
        try:
            found = recipe_file.read(path, asked)
        except RecipeError as problem:
            assert str(problem)
            continue
        text = json.dumps(found.plain(), allow_nan=False)
        again = recipe_file.make(recipe_file.parse(text, "again"))
        assert again.plain() == found.plain(), "a recipe is another one when it is read again"
        assert again.hash() == found.hash()


# ---- 6: rows

SUFFIXES = (".jsonl", ".csv", ".tsv", ".txt", *((".parquet",) if find_spec("pyarrow") else ()))


def rows() -> list[bytes]:
    """A file of each format, with the number of its format before it."""
    made = [
        b'{"text": "a\\u00e9", "label": 1}\n\n{"text": "b", "score": null, "x": -1.5e3}\r\n',
        b'text,label\r\n"a ""b""\nc",1\nd,2\n',
        b"text\tlabel\na\t1\n",
        b"one\n\ntwo\r\n",
    ]
    if len(SUFFIXES) > len(made):
        made.append(_parquet())
    return [bytes([n]) + seed for n, seed in enumerate(made)]


def _parquet() -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    library: Any = pa
    path = at("seed.parquet", b"")
    table = library.table({"text": ["a", "b"], "label": [1, 2], "score": [0.5, None]})
    parquet.write_table(table, path)  # pyright: ignore[reportUnknownMemberType]
    return path.read_bytes()


def run_rows(data: bytes) -> None:
    """DataError that says where, or flat rows, each with a place of its own."""
    if not data:
        return
    path = at(f"rows{SUFFIXES[data[0] % len(SUFFIXES)]}", data[1:])
    try:
        found = sources.read(path)
    except DataError as problem:
        assert path.name in str(problem)
        return
    assert found
    assert len({row.origin for row in found}) == len(found)
    for row in found:
        for name, value in row.fields.items():
            assert isinstance(name, str)
            assert value is None or isinstance(value, str | int | float)
            if isinstance(value, str):
                value.encode()


# ---- 9: the audit log


@functools.cache
def logs() -> list[bytes]:
    """Whole logs of several lengths."""
    made: list[bytes] = []
    for records in (0, 1, 3, 8):
        path = scratch() / f"log-{records}"
        path.unlink(missing_ok=True)
        log = AuditLog(path, map(float, count(1)).__next__)
        for n in range(records):
            log.append("refused", who=f"phone-{n}", text="ü" * n)
        log.close()
        made.append(path.read_bytes())
    return made


def run_audit(data: bytes) -> None:
    """AuditError, or a log each of whose records follows from the one before."""
    path = at("audit.jsonl", data)
    try:
        records, _ = verify(path)
    except AuditError:
        records = -1
    if records >= 0:
        _chained(data, records)
    try:
        log = AuditLog(path, lambda: 7.5)
    except AuditError:
        assert records < 0, "a log that verifies is not gone on with"
        assert path.read_bytes() == data
        return
    log.append("more")
    log.close()
    whole = data[: data.rfind(b"\n") + 1]
    assert path.read_bytes().startswith(whole), "what was there was changed"
    if records >= 0:
        assert verify(path, head=log.head) == (records + 1, log.head)


def _chained(data: bytes, records: int) -> None:
    before, lines = "", data.split(b"\n")
    assert lines.pop() == b""
    assert len(lines) == records
    for n, line in enumerate(lines, 1):
        held = json.loads(line)
        assert (held["n"], held["before"]) == (n, before)
        keys = ("at", "n", "text", "what", "who")
        plain = json.dumps({k: held[k] for k in keys}, separators=(",", ":"), ensure_ascii=False)
        before = sha256((before + plain).encode()).hexdigest()
        assert held["chain"] == before
        whole = {**held, "before": held["before"], "chain": before}
        spelt = json.dumps(dict(sorted(whole.items())), separators=(",", ":"), ensure_ascii=False)
        assert spelt.encode() == line


# ---- 10: identities


@functools.cache
def authority() -> Authority:
    folder = scratch() / "authority"
    shutil.rmtree(folder, ignore_errors=True)
    return Authority.init(folder)


@functools.cache
def identities() -> list[bytes]:
    """What each reader takes, with the reader's number before it."""
    own, key = authority(), new_key()
    csr, kit = make_request(key), own.ticket("phone", host="flexp.example.org:8443")
    made = own.issue_client(csr, "anna ü/b")
    server = own.issue_server(["flexp.example.org", "192.0.2.1"])
    path = scratch() / "kit"
    path.unlink(missing_ok=True)
    tokens.write_kit(path, kit)
    ledger = (scratch() / "authority" / "issued.json").read_bytes()
    both = csr + b"\n--\n" + kit.certificate
    seeds = [made, server.certificate, csr, key_pem(key), path.read_bytes(), ledger, both, made]
    assert len(seeds) == len(READERS)
    return [bytes([n]) + seed for n, seed in enumerate(seeds)]


def read_peer(data: bytes) -> None:
    found = who(data)
    assert found.name.isprintable()
    assert (found.role == "server") != bool(found.name)


def read_certificate(data: bytes) -> None:
    certificate_in(data)
    certificate_in(data.decode("latin-1"))


def read_request(data: bytes) -> None:
    key_requested(data)


def read_key(data: bytes) -> None:
    key_in(data)


def read_kit(data: bytes) -> None:
    path = at("a.kit", data)
    path.chmod(0o600)
    kit = open_kit(path)
    assert kit.credentials().check(datetime.now(UTC)).name == kit.name


def read_ledger(data: bytes) -> None:
    path = at("ledger/issued.json", data)
    for serial, record in Ledger(path).records().items():
        assert serial == record.serial
        assert record.ends.tzinfo


def admit(data: bytes) -> None:
    """Somebody asks with a request and shows a ticket: at most one certificate comes of it."""
    csr, _, shown = data.partition(b"\n--\n")
    own = authority()
    before = own.issued()
    try:
        made = own.admit(csr, shown)
    except IdentityError:
        assert own.issued() == before, "a refusal has left something"
        raise
    assert who(made).role == "client"
    assert own.check(made).name == who(shown).name
    assert len(own.issued()) - len(before) in (0, 1)


def check(data: bytes) -> None:
    own = authority()
    shown = own.check(data)
    assert shown.serial in {record.serial for record in own.issued()}
    found = credentials.Credentials(own.ca, data, key_pem(new_key()))
    try:
        found.check(datetime.now(UTC) + timedelta(days=1))
    except IdentityError:
        return
    raise AssertionError("a certificate was believed beside another key")


READERS = (
    read_peer,
    read_certificate,
    read_request,
    read_key,
    read_kit,
    read_ledger,
    admit,
    check,
)


def run_identity(data: bytes) -> None:
    """Nothing but IdentityError, and an authority that a refusal leaves as it was."""
    if not data:
        return
    try:
        READERS[data[0] % len(READERS)](data[1:])
    except IdentityError as problem:
        assert str(problem)
        text = base64.b64encode(data[1:]).decode()
        assert len(text) < 200 or text not in str(problem)
