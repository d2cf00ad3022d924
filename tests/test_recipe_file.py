"""Recipe files: whatever they hold, they are a recipe or one kind of error, and nothing starts."""

from __future__ import annotations

import builtins
import io
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from flexp import recipe_file
from flexp.errors import RecipeError
from flexp.recipe import Recipe

Flexp = Callable[..., tuple[int, str, str]]
REFUSED = [f for f in hostile.files() if f.suffix == ".yaml" and len(f.content) < 2000]


def refusal(text: str) -> str:
    with pytest.raises(RecipeError) as refused:
        recipe_file.make(recipe_file.parse_bytes(text.encode(), "mine.yaml"), "mine.yaml")
    return str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nrounds: 1\nrounds: 2", 'line 3: "rounds" is given twice'),
        ("rounds: 1\n'rounds': 2", 'line 2: "rounds" is given twice'),
        (hostile.ALIASES.decode(), "line 2: aliases (*name) are not allowed"),
        ("train: {<<: {lr: 1}}", 'unknown key "train.<<"'),
        ("a: " + "[" * 50_000, "line 1: more than 16 values within each other"),
        ("a:\n" + "- x\n" * 20_000, "line 19999: more than 20000 names and values"),
        ("a: !!python/object/apply:os.system [id]", "line 1: tags (!name) are not allowed"),
        ("!x a: 1", "line 1: tags (!name) are not allowed"),
        ("? [a]\n: 1", "line 1: a name must be text"),
        ("rounds: " + "9" * 5000, "line 1: not a value that can be read"),
        ("train:\n\tlr: 1", "line 2: found character '\\t'"),
        ("name: a\nseed: \0", "line 2: a character (number 0) that YAML does not take"),
        ("#" * (1 << 20) + "\n", "a recipe has at most 1048576 bytes"),
        ("- 1", "a recipe is a mapping"),
        ("name: ../x", "name: a folder is named after the run: no slashes"),
        ("name: a\\b", "name: a folder is named after the run: no slashes"),
        ("name: ' . '", "name: a folder is named after the run: write 1 to 100"),
        ("name: " + "é" * 51, "name: a folder is named after the run: write 1 to 100"),
        ('name: "a\\nb"', "name: a folder is named after the run: write 1 to 100"),
        ("data: {clients: 0}", "data.clients: Input should be greater than or equal to 1"),
        ("plan: {cut: [1, 2, 3]}", "plan.cut: Tuple should have at most 2 items"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str) -> None:
    told = refusal(text)
    assert told.startswith("mine.yaml")
    assert message in told
    assert len(told) < 500


def test_not_utf8_names_line_and_byte(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"seed: 1\nname: \xe9")
    with pytest.raises(RecipeError, match=r"a\.yaml, line 2: not UTF-8 at byte 14 of the file"):
        recipe_file.read(tmp_path / "a.yaml")


def test_all_problems_are_told_but_no_more_than_fit() -> None:
    told = refusal("rounds: 0\ntrain: {lr: -1, stepz: 2}\ndata: {clients: 0}\nname: a/b\nsead: 1")
    for name in ("rounds", "train.lr", "train.stepz", "data.clients", "name", "sead"):
        assert name in told
    told = refusal("\n".join(f"k{n}: 1" for n in range(500)))
    assert told.count("\n") == recipe_file.MAX_TOLD
    assert "and 480 more problems" in told


def test_a_long_value_is_cut() -> None:
    assert len(refusal("rounds: " + "x" * 100_000)) < 300
    assert len(refusal("x" * 900 + ": 1")) < 500


def test_names_are_text_as_written() -> None:
    plain = recipe_file.parse("{no: 1, 007: 2, 1.0: 3, 2026-01-02: 4, null: 5, =: 6}", "here")
    assert plain == {"no": 1, "007": 2, "1.0": 3, "2026-01-02": 4, "null": 5, "=": 6}
    assert recipe_file.parse("name: 2026-11-26", "here") == {"name": "2026-11-26"}


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("rounds", "is not an override"),
        ("=1", "is not an override"),
        ("train..lr=1", "is not an override"),
        (".".join("a" * 17) + "=1", "is not an override"),
        ("seed.x=1", '"seed" holds a value'),
        ("seed=1\nrounds: 2", "more than one value"),
        ("seed=[", "expected the node content"),
        ("seed=*x", "aliases"),
        ("seed=!!int 1", "tags"),
        ("train=" + "[" * 99, "more than 16 values"),
    ],
)
def test_overrides_that_are_refused(pair: str, message: str) -> None:
    with pytest.raises(RecipeError) as refused:
        recipe_file.override({"seed": 1}, [pair])
    assert message in str(refused.value)


def test_overrides_leave_words_and_the_given_data_alone() -> None:
    plain = {"train": {"lr": 1}}
    assert recipe_file.override(plain, ["name=nan", "train.lr=1e-4", "out=inf"]) == {
        "train": {"lr": 1e-4},
        "name": "nan",
        "out": "inf",
    }
    assert plain == {"train": {"lr": 1}}


# ---- nothing is started, nothing is written


@pytest.mark.parametrize("command", ["run", "plan", "compare", "doctor"])
def test_the_command_ends_with_2_and_leaves_nothing(
    flexp: Flexp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = [f for f in REFUSED if not f.name.startswith(("mutant", "nothing", "timestamp"))]
    assert len(asked) > 30
    for file in asked if command == "run" else asked[:6]:
        try:
            hostile.recipe_of(file.content)
        except RecipeError:
            pass
        else:
            continue
        Path("r.yaml").write_bytes(file.content)
        code, out, err = flexp(command, "r.yaml", "--json")
        assert (code, out) == (2, ""), file.name
        assert err.startswith("RecipeError: r.yaml"), file.name
        assert "Traceback" not in err
        assert [p.name for p in tmp_path.iterdir()] == ["r.yaml"], file.name


def test_a_file_of_variants_is_read_as_strictly(
    flexp: Flexp, tmp_path: Path, recipe_of: Callable[..., Path]
) -> None:
    recipe, file = recipe_of(), tmp_path / "methods.yaml"
    for content in (hostile.ALIASES, b"a: {seed: 1}\na: {seed: 2}", b"a: \xff", b"[" * 9999):
        file.write_bytes(content)
        code, out, err = flexp("compare", str(recipe), "--methods", str(file), "--json")
        assert (code, out) == (2, "")
        assert err.startswith(f"RecipeError: {file}")
    os.truncate(file, 2 << 20)
    assert "at most 1048576 bytes" in flexp("compare", str(recipe), "--methods", str(file))[2]
    assert not (tmp_path / "runs").exists()


# ---- any bytes


PARTS = sorted(Recipe.model_fields)
names = st.sampled_from([*PARTS, "kind", "lr", "cut", "labels", "path", "anna"]) | st.text(
    max_size=3
)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["../x", "1e-4", "no", "flexp"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=5,
)
recipes = st.dictionaries(st.sampled_from(PARTS), values, max_size=4).map(
    lambda plain: yaml.safe_dump(plain, allow_unicode=True).encode()
)
pieces = st.lists(
    st.sampled_from([b"rounds", b"name", b": ", b"\n", b"- ", b"{", b"[", b"}", b"]", b"'", b'"'])
    | st.sampled_from(
        [b"&a ", b"*a", b"!!int ", b"<<: ", b"? ", b"| ", b"\t", b"%", b"---\n", b"#"]
    )
    | st.binary(max_size=3),
    max_size=14,
).map(b"".join)


@given(content=recipes | pieces)
def test_any_bytes_are_a_recipe_or_refused(content: bytes) -> None:
    try:
        recipe = hostile.recipe_of(content)
    except RecipeError as refused:
        assert str(refused).startswith("recipe")  # noqa: PT017 - most bytes are not refused alike
        return
    again = yaml.safe_dump(recipe.plain(), sort_keys=False).encode()
    assert hostile.recipe_of(again) == recipe
    assert hostile.recipe_of(again).hash() == recipe.hash()
    folder = Path("/out") / recipe.name
    assert folder.parent == Path("/out")
    assert Path(os.path.normpath(folder)) == folder


def test_only_the_recipe_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever paths and tags it names: they are for later."""
    path = tmp_path / "r.yaml"
    opened: list[Any] = []

    def watched(file: Any, *more: Any, **named: Any) -> Any:
        opened.append(file)
        return io.FileIO(file)

    monkeypatch.setattr(io, "open", watched)  # which pathlib calls
    monkeypatch.setattr(builtins, "open", watched)
    for file in REFUSED:
        path.unlink(missing_ok=True)
        with io.FileIO(path, "w") as made:
            made.write(file.content)
        try:
            recipe_file.read(path, ["data.path=/etc/passwd", "out=/etc"])
        except RecipeError:
            continue
    assert set(opened) == {path}
    assert stat.S_ISREG(path.stat().st_mode)
