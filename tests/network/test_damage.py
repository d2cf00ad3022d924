"""What a lying client says of itself, and files that were changed between two starts."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from flexp import recipe_file
from flexp.engine.network import NetworkEngine
from flexp.errors import CheckpointError, LinkError, RecipeError
from flexp.joining import parts
from flexp.joining.folder import OWNER, take
from flexp.link.control import Refused, Welcome
from flexp.link.listen import Call
from flexp.link.messages import Fetch, StepKey
from flexp.recipe import Recipe
from flexp.server.thread import ComputeThread
from flexp.serving.floor import LABELS, Floor, labels_of, space_in
from flexp.serving.log import LONGEST, Log, opened
from flexp.serving.reception import Reception
from flexp.serving.roster import Entry, Roster
from flexp.serving.serve import _told

KIND = "classification"


@pytest.fixture
def recipe(recipe_of: Any) -> Recipe:
    return recipe_file.read(recipe_of(), [])


def entry(*labels: str) -> Entry:
    return Entry(1 << 30, None, None, None, 0.0, (8, 2, 2), (KIND, *labels))


def space(recipe: Recipe, tmp_path: Path, *told: str) -> tuple[str, ...]:
    floor = cast("Floor", SimpleNamespace(recipe=recipe, has_own=lambda name: False))
    return space_in(floor, Roster(tmp_path / "roster.json"), "anna", told)


@pytest.mark.parametrize(
    ("labels", "order"),
    [
        (("10", "9", "-1"), ("-1", "9", "10")),
        (("7", "007", "8"), ("007", "7", "8")),  # as in one process, and after every start
        (("--5", "1"), ("--5", "1")),
        (("\u00b2", "1"), ("1", "\u00b2")),
        (("1" * 5000, "1"), ("1", "1" * 5000)),
    ],
)
def test_labels_have_one_order(
    recipe: Recipe, labels: tuple[str, ...], order: tuple[str, ...]
) -> None:
    """Whatever they look like: a server that could not sort them could not begin."""
    assert labels_of(recipe, {"anna": entry(*labels)}) == order
    assert labels_of(recipe, {"anna": entry(labels[0]), "ben": entry(*labels[1:])}) == order


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ((), "kind of task"),
        (("images", "a", "b"), "kind of task"),
        ((KIND, "a", ""), "2 labels"),
        ((KIND, "a" * 501), "1 labels"),
        ((KIND, *map(str, range(LABELS + 1))), "4097 labels"),
        ((KIND, "a", "a"), "twice"),
    ],
)
def test_labels_that_no_rows_have_are_refused(
    recipe: Recipe, tmp_path: Path, told: tuple[str, ...], why: str
) -> None:
    """They would be in the roster, and every server after it would die of them."""
    with pytest.raises(LinkError, match=why):
        space(recipe, tmp_path, *told)
    assert space(recipe, tmp_path, KIND, "a", "b") == (KIND, "a", "b")


@pytest.mark.parametrize(
    "change",
    [
        {"clients": []},
        {"clients": {"anna": 1}},
        {"clients": {"anna": {**asdict(entry("a")), "flops": -5.0}}},
        {"server": "here"},
        {"server": {"gflops": "fast"}},
        {"clients": None},
    ],
)
def test_a_roster_of_another_shape_is_named(
    recipe: Recipe, tmp_path: Path, change: dict[str, Any]
) -> None:
    path = tmp_path / "roster.json"
    roster = Roster(path)
    roster.set("anna", entry("a", "b"))
    roster.write(recipe)
    Roster(path).read(recipe)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"roster\.json cannot be read"):
        Roster(path).read(recipe)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000])
def test_a_result_that_was_damaged_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match="Remove it and start the same command again"):
        _told(path)


def test_a_folder_whose_owner_cannot_be_read_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / OWNER).write_bytes(b"\xff\xfe")
    with pytest.raises(LinkError, match="is the folder of"):
        take(tmp_path, "anna")


def test_what_a_client_says_does_not_move_an_operators_terminal() -> None:
    """Why somebody gives up is a word of its own choice."""
    said: list[str] = []
    log = Log(said.append)
    log.note("anna", "anna gives up: \x1b[2J\r\nben has left")
    log.alert("anna", "x" * 5000)
    assert said[0].isprintable()
    assert len(said[1]) == LONGEST


def test_a_server_that_ends_sends_nobody_away_for_good() -> None:
    """Its thread is closed before its port is: who asks in between goes on with the next server."""
    closed: Any = ComputeThread(cast("Any", None))
    closed.close()
    engine: Any = NetworkEngine.__new__(NetworkEngine)
    engine.trunk = closed
    engine._carry_out = lambda *_: closed.between(lambda: None)
    stage, none = SimpleNamespace(engine=engine), cast("Any", None)
    desk = Reception(none, none, lambda text: None, none, stage=cast("Any", stage))
    said = desk.answer(
        Call(None, "here", name="anna"), Fetch(StepKey("x", 0, 0, 0, 1, "fetch"), "s"), ""
    )
    assert isinstance(said, Refused)
    assert said.again


@pytest.mark.parametrize("told", ["{", "[" * 100_000, "[]", '{"name": 3}'])
def test_a_servers_recipe_that_is_none_is_an_error_of_one_line(told: str) -> None:
    with pytest.raises(RecipeError, match="server's recipe"):
        parts.recipe_of(Welcome("server", recipe=told, hash="0" * 64))


def test_a_log_that_is_lost_is_the_first_line_of_the_next(tmp_path: Path) -> None:
    said: list[str] = []
    for began in (False, True, True):
        log = opened(tmp_path, said.append, began=began)
        assert log.audit is not None
        log.audit.close()
    assert said == []
    (tmp_path / "audit.jsonl").unlink()
    opened(tmp_path, said.append, began=True)
    assert "audit.jsonl was not there, though this run has begun" in said[0]
    assert "was not there" in (tmp_path / "audit.jsonl").read_text("utf-8")
