"""Data that is sound but odd: it trains, or is refused before anything starts, and stays private.

Fault rows F39 and F40, and goal G16, of the reliability table.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile import CANARY, told

from flexp import events
from flexp.data.tasks import Classification

Flexp = Callable[..., tuple[int, str, str]]
Recipe = Callable[..., Path]


def strict(text: str) -> Any:
    """The JSON of a text that holds no NaN and no infinity."""
    return json.loads(text, parse_constant=pytest.fail)


def rows(path: Path, *texts: str, label: str | float | None = None) -> None:
    """A client's file; labels take turns unless one is given."""
    names = ("negative", "positive")
    lines = [
        json.dumps({"text": text, "label": names[n % 2] if label is None else label})
        for n, text in enumerate(texts)
    ]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def emptied(folder: Path) -> Path:
    for file in folder.iterdir():
        file.unlink()
    return folder


def trained(flexp: Flexp, recipe: Path) -> tuple[Any, Path]:
    """The document of a run that ends well, and its folder; every line of JSON is strict."""
    code, out, err = flexp("run", str(recipe), "--json")
    assert code == 0, err
    document, folder = strict(out), recipe.parent / "runs" / "mine"
    assert strict((folder / "result.json").read_text()) == document
    for line in (folder / "events.jsonl").read_text().splitlines():
        strict(line)
    return document, folder


def refused(flexp: Flexp, recipe: Path) -> str:
    code, out, err = flexp("run", str(recipe), "--json")
    assert (code, out) == (2, ""), err
    assert err.startswith("DataError: ")
    assert "Traceback" not in err
    assert not list((recipe.parent / "runs").glob("*")), "nothing was started"
    return err


# ---- nothing there


def no_files(mine: Path) -> None:
    emptied(mine)


def no_rows(mine: Path) -> None:
    for file in mine.iterdir():
        file.write_bytes(b"\n \r\n")


def a_folder_without_files(mine: Path) -> None:
    (emptied(mine) / "anna").mkdir()


def blank_texts(mine: Path) -> None:
    for file in mine.iterdir():
        rows(file, " ", "\t", "\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_files, "mine: an empty folder"),
        (no_rows, "anna.jsonl: no rows"),
        (a_folder_without_files, "anna: an empty folder"),
        (blank_texts, 'column "text" is empty'),
    ],
)
def test_data_without_rows_is_refused(
    flexp: Flexp, recipe_of: Recipe, mine: Path, change: Callable[[Path], None], message: str
) -> None:
    recipe = recipe_of()
    change(mine)
    assert message in refused(flexp, recipe)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__split": [0, 0.5, 0.5]}, "has no training rows"),
        ({"data__partition": "iid", "data__clients": 61}, "60 rows cannot give 61 clients"),
        ({"data__partition": "dirichlet", "data__minimum": 61}, "60 rows cannot give"),
        ({"data__rows": 2}, "2 rows cannot be split into 3 parts"),
        (
            {"data__partition": "label-skew", "data__group": "label", "data__rows": 40},
            "Group 1 of 2",
        ),
    ],
)
def test_clients_without_rows_are_refused(
    flexp: Flexp, recipe_of: Recipe, changes: dict[str, Any], message: str
) -> None:
    assert message in refused(flexp, recipe_of(**changes))


# ---- little there


def test_one_row_a_client_trains_in_a_batch_larger_than_all(
    flexp: Flexp, recipe_of: Recipe, mine: Path
) -> None:
    for file in mine.iterdir():
        rows(file, "happy day")
    few = {"data__split": [1, 0, 0], "data__one_class": "allow", "train__batch": 64}
    recipe = recipe_of(rounds=1, task__labels=["negative", "positive"], **few)
    document, folder = trained(flexp, recipe)
    assert document["rows"] == []  # nothing could be measured, so nothing is 0
    assert document["adapters"]
    ended = [e for e in events.read(folder / "events.jsonl") if isinstance(e, events.TurnEnded)]
    assert len(ended) == 3
    assert all(e.steps == 2 and math.isfinite(e.loss) for e in ended)
    assert flexp("report", str(folder), "--out", str(folder / "r.html"), "--json")[0] == 0


def test_a_batch_larger_than_the_data_is_all_of_it(flexp: Flexp, recipe_of: Recipe) -> None:
    document, _ = trained(flexp, recipe_of(rounds=1, train__batch=10_000))
    assert {row["client"] for row in document["rows"]} >= {"anna", "ben", "carl dee", "all"}


def test_a_score_that_is_no_number_is_null(
    flexp: Flexp, recipe_of: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = {"accuracy": math.nan, "loss": math.inf}
    monkeypatch.setattr(Classification, "finish", lambda self, sums: odd)
    document, folder = trained(flexp, recipe_of(rounds=1))
    assert {row["metric"] for row in document["rows"]} == set(odd)
    assert all(row["value"] is None for row in document["rows"])
    scores = [e for e in events.read(folder / "events.jsonl") if isinstance(e, events.Scored)]
    assert all(math.isnan(s.value) == (s.metric == "accuracy") for s in scores)
    code, out, err = flexp("report", str(folder), "--out", str(folder / "r.html"), "--json")
    assert code == 0, err
    strict(out)
    assert flexp("run", str(recipe_of(rounds=1)), "out=" + str(folder / "shown"))[0] == 0


def test_a_model_that_diverges_is_stopped_with_a_typed_error(
    flexp: Flexp, recipe_of: Recipe
) -> None:
    wild = {"train__optimizer": "sgd", "train__lr": 1e38, "train__steps": 4}
    code, out, err = flexp("run", str(recipe_of(rounds=2, **wild)), "--json")
    assert (code, out) == (2, "")
    assert " has NaN or infinity. It was refused" in err
    for line in (recipe_of().parent / "runs" / "mine" / "events.jsonl").read_text().splitlines():
        strict(line)


# ---- nobody repeats what a row holds


def test_a_run_keeps_no_text_of_a_row(flexp: Flexp, recipe_of: Recipe, mine: Path) -> None:
    for file in mine.iterdir():
        rows(file, *(f"{word} {CANARY} day" for word in ("happy", "sad") * 5))
    recipe = recipe_of(rounds=1, task__labels=["negative", "positive"])
    code, out, err = flexp("run", str(recipe), "--json")
    assert code == 0, err
    assert not told(out + err)
    files = [path for path in (recipe.parent / "runs").rglob("*") if path.is_file()]
    assert {"events.jsonl", "result.json", "recipe.yaml"} <= {path.name for path in files}
    for path in files:
        assert not told(path.read_bytes().decode("latin-1")), path.name


def surrogate(mine: Path) -> None:
    text = json.dumps({"text": f"{CANARY}\ud83d", "label": 1})  # as it was split by a program
    (mine / "anna.jsonl").write_text(text)


def broken(mine: Path) -> None:
    (mine / "anna.jsonl").write_text('{"' + CANARY + '": "' + CANARY + '"')


def without_header(mine: Path) -> None:
    (emptied(mine) / "anna.csv").write_text(f"{CANARY} day,{CANARY}\nhappy,positive\n")


def same_names(mine: Path) -> None:
    (emptied(mine) / "anna.csv").write_text(f"{CANARY},{CANARY}\nhappy,positive\n")


def as_label(mine: Path) -> None:
    rows(mine / "anna.jsonl", "happy", "sad", "day", label=CANARY)


def one_label(mine: Path) -> None:
    for file in mine.iterdir():
        rows(file, "happy", "sad", "day", label=CANARY)


def one_label_each(mine: Path) -> None:
    for n, file in enumerate(mine.iterdir()):
        rows(file, "happy", "sad", "day", label=f"{CANARY}{n}")


def a_number(mine: Path) -> None:
    (mine / "anna.jsonl").write_text('{"text": 7212, "label": "positive"}\n' * 3)


def in_every_row(mine: Path) -> None:
    for file in mine.iterdir():
        rows(file, *(f"{CANARY} day " * 30 for _ in range(4)))


NAMED = {"task__labels": ["negative", "positive"]}
DOORS: list[tuple[Callable[[Path], None], dict[str, Any], str]] = [
    (surrogate, {}, "surrogate"),
    (broken, {}, "comma or a closing brace"),
    (without_header, {}, 'no column "label". There are'),
    (same_names, {}, "columns 1 and 2 have the same name"),
    (as_label, NAMED, "does not hold one of the 2 labels"),
    (one_label, {}, "1 labels, 1 of them different"),
    (one_label_each, {}, "one class only"),
    (a_number, {}, "holds a number"),
    (in_every_row, {**NAMED, "data__label": "text"}, "does not hold one of the 2 labels"),
    (in_every_row, {"data__client": "text"}, "holds what no client can be called"),
    (in_every_row, {"data__text": "body"}, 'no column "body"'),
    (in_every_row, {"data__client": "who"}, 'no column "who"'),
    (
        in_every_row,
        {"data__partition": "label-skew", "data__group": "text", "data__rows": 9},
        "Group 1 of 1",
    ),
]


@pytest.mark.parametrize(
    ("change", "changes", "message"), DOORS, ids=lambda v: getattr(v, "__name__", "")
)
@pytest.mark.parametrize("command", ["run", "doctor", "plan"])
def test_no_refusal_tells_what_a_row_holds(
    flexp: Flexp,
    recipe_of: Recipe,
    mine: Path,
    command: str,
    change: Callable[[Path], None],
    changes: dict[str, Any],
    message: str,
) -> None:
    recipe = recipe_of(**changes)
    change(mine)
    code, out, err = flexp(command, str(recipe))
    assert (code, out) == (2, "")
    assert message in err
    assert not told(err), err
    assert "7212" not in err


def test_what_is_odd_about_a_client_is_noted_without_its_label(
    flexp: Flexp, recipe_of: Recipe, mine: Path
) -> None:
    one_label_each(mine)
    recipe = recipe_of(rounds=1, data__one_class="allow")
    code, _, err = flexp("run", str(recipe))
    assert code == 0, err
    log = (recipe.parent / "runs" / "mine" / "events.jsonl").read_text()
    assert "one class only" in log
    assert not told(log + err)
