"""Hostile data and recipe files: 500 of them, by structure and by mutation, always the same ones.

Rows carry a canary: text that no error, log or event may repeat. The functions at the end take the
bytes of a file and give what a reader makes of them, for any test that has bytes.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass

from flexp import recipe_file
from flexp.data import formats
from flexp.data.formats import Record
from flexp.data.lines import LONGEST, Source
from flexp.recipe import Recipe

COUNT = 500
CANARY = "qVx7-zW3k-Jp9h"  # nothing that a message would say by itself
ALIASES = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
).encode()  # 387 million leaves


@dataclass(frozen=True)
class Hostile:
    """A file that somebody made; ``suffix`` tells its reader, ".yaml" is a recipe."""

    name: str
    suffix: str
    content: bytes


def told(text: str) -> str:
    """The part of the canary that a text repeats: four letters or more, or nothing."""
    parts = (CANARY[n : n + 4] for n in range(len(CANARY) - 3))
    return next((part for part in parts if part in text), "")


def files(count: int = COUNT) -> list[Hostile]:
    """All files: those that are made by hand, then mutations of sound and of hostile ones."""
    made = [*_json_lines(), *_tables(), *_texts(), *_recipes()]
    stream = random.Random(20)
    seeds = [*_sound(), *(f for f in made if len(f.content) < 4096)]
    while len(made) < count:
        parent = stream.choice(seeds)
        made.append(Hostile(f"mutant-{len(made)}", parent.suffix, mutated(parent.content, stream)))
    return made


def mutated(content: bytes, stream: random.Random) -> bytes:
    """The content with a few of its bytes flipped, cut, doubled, moved or put in."""
    data = bytearray(content)
    for _ in range(stream.randint(1, 4)):
        at = stream.randrange(len(data) + 1)
        to = min(len(data), at + stream.randint(1, 12))
        match stream.randrange(6):
            case 0:
                data[at:to] = bytes(b ^ (1 << stream.randrange(8)) for b in data[at:to])
            case 1:
                del data[at:to]
            case 2:
                data[at:at] = data[at:to] * stream.randint(1, 3)
            case 3:
                data[at:at] = stream.choice(_ODD)
            case 4:
                data[at:to] = stream.choice(_ODD)
            case _:
                del data[at:]
    return bytes(data)


_ODD = (
    b"\0", b"\n", b"\r", b"\r\n", b"\xff", b"\xc3", b"\xef\xbb\xbf", "\u2028".encode(), b"\x85",
    "\u0085".encode(), b'"', b'""', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"\t", b": ", b"NaN",
    b"\\ud800", b"\xed\xa0\x80", b"9" * 40, b"1e999", b"null", b"\x1f\x8b", b"*a", b"&a ",
    b"!!set ", b"- ", b"<<: ", b"? ", b"| ", b"%TAG ! x\n", b"---\n", CANARY.encode(),
)  # fmt: skip


def _row(text: str = CANARY, **more: object) -> bytes:
    return json.dumps({"text": f"a {text} b", "label": text, **more}, ensure_ascii=False).encode()


def _sound() -> Iterator[Hostile]:
    rows = b"\n".join(_row(number=n, true=True, none=None) for n in range(3))
    yield Hostile("sound", ".jsonl", rows + b"\n")
    table = f'text,label\r\n"a ""{CANARY}"", b",1\r\n"two\nlines {CANARY}",2\r\n'
    yield Hostile("sound", ".csv", table.encode())
    yield Hostile("sound", ".tsv", f"text\tlabel\na {CANARY}\t1\n".encode())
    yield Hostile("sound", ".txt", f"one {CANARY}\n\ntwo\u2028{CANARY}\n".encode())
    yield Hostile(
        "sound",
        ".yaml",
        b"name: mine\nrounds: 3\ntrain: {lr: 1e-3, steps: 2}\nplan:\n  cut: [1, 1]\n"
        b"clients:\n  anna: {task: {labels: [a, b]}}\nstrategy: {name: flexp, align: 0.5}\n",
    )


def _json_lines() -> Iterator[Hostile]:
    bad = CANARY.encode()
    last = {
        "utf8": b'{"text": "' + bad + b'\xe9"}',
        "overlong": b'{"text": "' + bad + b'\xc0\xaf"}',
        "encoded-surrogate": b'{"text": "' + bad + b'\xed\xa0\x80"}',
        "surrogate": b'{"text": "' + bad + b'\\ud83d"}',
        "surrogate-in-name": b'{"' + bad + b'\\udc00": 1}',
        "nul": b'{"text": "' + bad + b'\0"}',
        "nul-outside": b"\0" + _row(),
        "nan": b'{"text": "' + bad + b'", "x": NaN}',
        "infinity": b'{"text": "' + bad + b'", "x": -Infinity}',
        "huge-float": b'{"text": "' + bad + b'", "x": 1e999}',
        "huge-integer": b'{"text": "' + bad + b'", "x": ' + b"9" * 5000 + b"}",
        "twice": b'{"' + bad + b'": 1, "' + bad + b'": 2}',
        "twice-escaped": b'{"' + bad + b'": 1, "\\u0071' + bad[1:] + b'": 2}',
        "nested": b'{"text": {"' + bad + b'": 1}}',
        "deep-list": b'{"text": ' + b"[" * 100_000,
        "deep-object": b'{"a":' * 20_000 + bad,
        "list": b'["' + bad + b'"]',
        "bare": bad,
        "two": _row() + _row(),
        "comma": b'{"text": "' + bad + b'",}',
        "single-quotes": b"{'text': '" + bad + b"'}",
        "unterminated": b'{"text": "' + bad,
        "control": b'{"text": "' + bad + b'\x01"}',
        "escape": b'{"text": "' + bad + b'\\x"}',
        "tab": b'{"text": "' + bad + b'\t"}',
        "carriage-return": _row() + b"\r" + _row(),
        "mark-inside": b"\xef\xbb\xbf" + _row(),
        "comment": b"// " + bad,
        "longest": b'{"text": "' + b"a" * LONGEST + b'"}',
        "utf16": _row().decode().encode("utf-16"),
    }
    for name, line in last.items():
        yield Hostile(name, ".jsonl", _row() + b"\n\n" + line + b"\n")
        yield Hostile(f"{name}-first", ".jsonl", line)
        yield Hostile(f"{name}-marked", ".jsonl", b"\xef\xbb\xbf" + line + b"\r\n" + _row())
    yield Hostile("empty", ".jsonl", b"")
    yield Hostile("mark-alone", ".jsonl", b"\xef\xbb\xbf")
    yield Hostile("line-feeds", ".jsonl", b"\n\r\n \n")
    yield Hostile("gzip", ".jsonl", b"\x1f\x8b\x08\x00" + bad)
    yield Hostile("zip", ".jsonl", b"PK\x03\x04" + bad)
    yield Hostile("zstd", ".csv", b"\x28\xb5\x2f\xfd" + bad)
    yield Hostile("separators", ".jsonl", _row(f"{CANARY}\u2028\u0085"))
    yield Hostile("marked", ".jsonl", b"\xef\xbb\xbf" + _row() + b"\r\n" + _row())
    yield Hostile("just-fits", ".jsonl", b'{"text": "' + b"a" * (LONGEST - 13) + b'"}\n')


def _tables() -> Iterator[Hostile]:
    bad = CANARY
    for name, text in {
        "short": f"text,label\n{bad},1\n{bad}\n",
        "long": f"text,label\n{bad},1,2\n",
        "no-header": f"{bad},{bad}\na,b\n",
        "no-name": f"text,,{bad}\na,b,c\n",
        "quote": f'text,label\n"{bad},1\n{bad},2\n',
        "after-quote": f'text,label\n"{bad}"x,1\n',
        "bare-return": f"text,label\n{bad}\rb,1\n",
        "return-ends": f"text,label\r{bad},1\r",
        "nul": f"text,label\n{bad}\0,1\n",
        "field": f"text,label\n{bad * 20_000},1\n",
        "record": 'text,label\n"' + f"{bad}\n" * 9_000 + '",' + '"\n' * 400_000,
        "commas": "," * 100_000,
        "names": ",".join(f"c{n}" for n in range(50_000)) + f"\n{bad}\n",
        "header-only": "text,label\n",
        "blank": "\n\r\n\n",
        "mark-inside": f"text,label\n\ufeff{bad},1\n",
    }.items():
        yield Hostile(name, ".csv", text.encode())
        yield Hostile(f"{name}-marked", ".csv", b"\xef\xbb\xbf" + text.encode())
        yield Hostile(name, ".tsv", text.replace(",", "\t").encode())
    yield Hostile("latin", ".csv", f"text,label\n{bad}\xe9,1\n".encode("latin-1"))


def _texts() -> Iterator[Hostile]:
    line = f"a {CANARY} b"
    for name, data in {
        "latin": f"{line}\n{line}\xe9".encode("latin-1"),
        "utf16": line.encode("utf-16"),
        "utf32": line.encode("utf-32"),
        "nul": f"{line}\n{line}\0".encode(),
        "returns": f"{line}\r{line}\r\n{line}\r".encode(),
        "separators": f"{line}\u2028{line}\u0085{line}\x1c\x0b\x0c{line}\n".encode(),
        "longest": line.encode() + b"a" * LONGEST,
        "blank": b" \n\t\n\r\n",
        "cut": f"{line}é".encode()[:-1],
    }.items():
        yield Hostile(name, ".txt", data)


def _recipes() -> Iterator[Hostile]:
    for name, data in {
        "unknown": b"sead: 1\ntrain: {stepz: 2}\nplan: {cuts: {a: [1]}}",
        "types": b"rounds: many\nseed: [1]\ntrain: 3\ndata: {split: 1}\nname: {}\nclients: []",
        "twice": b"rounds: 1\nrounds: 2",
        "twice-quoted": b'rounds: 1\n"rounds": 2',
        "twice-inside": b"train: {lr: 1, lr: 2}",
        "aliases": ALIASES,
        "alias-of-itself": b"a: &a [*a]",
        "merge": b"a: &a {lr: 1}\ntrain: {<<: *a}",
        "merge-inline": b"train: {<<: {lr: 1}}",
        "deep-flow": b"a: " + b"[" * 50_000,
        "deep-mapping": b"{a: " * 50_000,
        "deep-block": b"\n".join(b" " * n + b"a:" for n in range(400)),
        "deep-list": b"- " * 10_000,
        "traversal": b"name: ../../etc/cron.d/x",
        "traversal-backwards": b"name: '..\\..\\x'",
        "dots": b"name: ..",
        "empty-name": b"name: ''",
        "long-name": b"name: " + b"a" * 5000,
        "line-in-name": b'name: "a\\nb"',
        "nul-in-name": b'name: "a\\0b"',
        "surrogate": b'name: "\\ud800"',
        "cut": b"plan: {cut: [-1, 2.5]}",
        "cut-shape": b"plan: {cut: [1, 2, 3]}",
        "no-clients": b"data: {clients: 0}",
        "tab": b"train:\n\tlr: 1",
        "huge": b"#" * (1 << 20) + b"\nrounds: 1",
        "many": b"a: [" + b"x," * 100_000 + b"]",
        "utf8": b"name: \xe9",
        "utf16": "name: a".encode("utf-16"),
        "nul": b"name: a\0",
        "control": b"name: a\x07",
        "list-as-name": b"? [a, b]\n: 1",
        "mapping-as-name": b"{{a: b}: c}",
        "number-as-name": b"1: 2\n1.0: 3\nnull: 4\ntrue: 5",
        "python": b"a: !!python/object/apply:os.system [id]",
        "python-name": b"!!python/name:os.system x: 1",
        "binary": b"name: !!binary AAAA",
        "set": b"clients: !!set {a, b}",
        "timestamp": b"name: 2026-13-45",
        "timestamp-tag": b"name: !!timestamp x",
        "integer": b"rounds: " + b"9" * 5000,
        "integer-bits": b"rounds: 0b_",
        "float": b"train: {lr: .inf}",
        "nan": b"train: {lr: .nan}",
        "documents": b"rounds: 1\n---\nrounds: 2",
        "scalar": b"rounds",
        "list": b"[1, 2]",
        "nothing": b"",
        "percent": b"%YAML 9.9\n---\nrounds: 1",
        "unclosed": b"train: {lr: 1",
        "quote": b"name: 'a",
        "problems": b"\n".join(b"k%d: 1" % n for n in range(20_000)),
    }.items():
        yield Hostile(name, ".yaml", data)


def rows_of(data: bytes, suffix: str = ".jsonl") -> list[Record]:
    """The records of a JSONL file, or of another format; DataError and nothing else."""
    return list(formats.READERS[suffix](Source(io.BytesIO(data), "given", len(data))))


def table_of(data: bytes) -> list[Record]:
    """The records of a csv file; DataError and nothing else."""
    return rows_of(data, ".csv")


def recipe_of(data: bytes) -> Recipe:
    """The recipe in a YAML file; RecipeError and nothing else."""
    return recipe_file.make(recipe_file.parse_bytes(data))
