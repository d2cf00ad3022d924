"""The documentation says what is: its commands, recipes, programs, links and generated pages."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
import toys
from typer.main import get_command

from flexp import answers, assets, cli, commands, laws, recipe_file, strategies
from flexp.model.cut import Cut, Seat
from flexp.strategies.base import MethodKind, Strategy
from flexp.strategies.fedavg import FedAvg

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
CUT = Seat(Cut(1, 1))

Recipe = Callable[..., Path]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in a language."""
    return [text for kind, text in FENCE.findall(page.read_text("utf-8")) if kind == language]


def loaded(name: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A file as a module of that name, until the test ends."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def ids(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# ---- generated pages


def test_the_reference_is_what_the_code_says(monkeypatch: pytest.MonkeyPatch) -> None:
    made = loaded("docs_generate", DOCS / "generate.py", monkeypatch).pages()
    assert set(made) == {p.name for p in (DOCS / "reference").glob("*.md")} - {"index.md"}
    for name, text in made.items():
        held = (DOCS / "reference" / name).read_text("utf-8")
        assert held == text, f"{name} is old: run `.venv/bin/python docs/generate.py`"


def test_the_picture_names_every_module_in_order() -> None:
    text = (DOCS / "explanation" / "architecture.md").read_text("utf-8")
    rows = re.findall(r"^\| (`[a-z_]+(?:\.py|/)`(?:, `[a-z_]+\.py`)*) \| (.*) \|$", text, re.M)
    named = [n for heads, _ in rows for n in re.findall(r"`([a-z_]+)", heads)]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    layers = project["tool"]["importlinter"]["contracts"][0]["layers"]
    lowest_first = [m.strip(" ()") for layer in reversed(layers) for m in layer.split("|")]
    source = ROOT / "src" / "flexp"
    there = [m for m in lowest_first if (source / m).is_dir() or (source / f"{m}.py").is_file()]
    assert named == there
    for heads, what in rows:
        if heads.endswith("/`"):
            inside = {p.name for p in (source / heads.strip("`/")).glob("[!_]*.py")}
            if heads == "`strategies/`":  # methods have a generated page of their own
                inside -= {f"{m.__module__.rpartition('.')[2]}.py" for m in strategies.BUILT_IN}
            assert set(re.findall(r"`([a-z0-9_]+\.py)`", what)) == inside, heads


# ---- commands and recipes


def lines(page: Path) -> Iterator[str]:
    """Command lines of a page: in shell blocks, and between backticks."""
    text = page.read_text("utf-8")
    for block in blocks(page, "sh"):
        yield from (line.strip() for line in block.splitlines())
    yield from re.findall(r"`((?:make|flexp) [^`]+)`", FENCE.sub("", text))


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_commands_exist_with_these_options(page: Path) -> None:
    group: Any = get_command(cli.app)
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text("utf-8"), re.M)
    for line in lines(page):
        program, *words = shlex.split(line, comments=True)
        program = program.removeprefix(".venv/bin/")
        if program == "make":
            assert all(w in targets or re.match("[A-Z]+=", w) for w in words), line
        elif program == "flexp" and words[0] not in ("--help", "COMMAND"):
            command = group
            # `flexp ca init` is a command of a group; `flexp ca` alone names the group.
            while hasattr(command, "commands") and words:
                assert words[0] in command.commands, line
                command = command.commands[words.pop(0)]
            known = {o for p in command.params for o in p.opts} | {"--help"}
            assert {w for w in words if w.startswith("--")} <= known, line
            pairs = [w for w in words if re.match(r"[a-z_.]+=", w)]
            recipe_file.make(recipe_file.override({}, pairs), line)


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_recipes_are_valid(page: Path) -> None:
    for block in blocks(page, "yaml"):
        recipe_file.make(recipe_file.parse(block, ids(page)), ids(page))


# ---- links


def anchors(page: Path) -> set[str]:
    """What headings of a page are called in links."""
    heads = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text("utf-8")), re.M)
    plain = [re.sub(r"[^\w\s-]", "", head).strip().lower() for head in heads]
    return {re.sub(r"[-\s]+", "-", head) for head in plain}


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_to_a_heading(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text("utf-8"))):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


# ---- programs

METHOD = DOCS / "how-to" / "add-a-method.md"
EXAMPLE = ROOT / "examples" / "fedavgm"


@pytest.fixture
def fedavgm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example as the file that the page shows."""
    path = tmp_path / "fedavgm.py"
    path.write_text(blocks(METHOD, "python")[0], encoding="utf-8")
    return loaded("fedavgm", path, monkeypatch)


def test_the_page_shows_the_example_package() -> None:
    shown = [*blocks(METHOD, "python"), *blocks(METHOD, "toml")]
    files = ("fedavgm.py", "test_fedavgm.py", "pyproject.toml")
    assert shown == [(EXAMPLE / file).read_text("utf-8") for file in files]
    assert {p.name for p in EXAMPLE.iterdir() if p.is_file()} == set(files)


def test_the_page_has_every_law_and_class_variable() -> None:
    text = METHOD.read_text("utf-8")
    rows = re.findall(r"^\| (.+?) \| .+ \|$", text, re.M)
    assert [row for row in rows if row in laws.LAWS] == list(laws.LAWS)
    told = {row.strip("`") for row in rows if row.startswith("`")}
    assert told == set(inspect.get_annotations(Strategy))
    assert all(f"`{kind}`" in text for kind in get_args(MethodKind))


def test_the_example_method_without_momentum_is_fedavg(fedavgm: ModuleType) -> None:
    """Bit for bit, by the order of its sums."""
    mine = toys.play(fedavgm.FedAvgM(beta=0.0), CUT)
    fedavg = toys.play(FedAvg(), CUT)
    assert toys.same(mine.state.adapter, fedavg.state)
    assert all(toys.same(mine.adapters[c], fedavg.adapters[c]) for c in fedavg.adapters)


def test_the_example_method_does_not_see_the_cut(fedavgm: ModuleType) -> None:
    method = fedavgm.FedAvgM(beta=0.9)
    cut, whole = toys.play(method, CUT), toys.play(method, toys.whole())
    assert toys.same(cut.state.adapter, whole.state.adapter)
    assert not toys.same(cut.state.adapter, toys.play(FedAvg(), CUT).state)


def test_the_recipe_of_the_page_builds_the_example(
    fedavgm: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    (text,) = blocks(METHOD, "toml")
    ((group, points),) = tomllib.loads(text)["project"]["entry-points"].items()
    made = [importlib.metadata.EntryPoint(name, at, group) for name, at in points.items()]

    def entry_points(group: str) -> list[importlib.metadata.EntryPoint]:
        return [point for point in made if point.group == group]

    monkeypatch.setattr(strategies, "entry_points", entry_points)
    (snippet,) = blocks(METHOD, "yaml")
    asked = recipe_file.make(recipe_file.parse(snippet, "page")).strategy
    assert strategies.build(asked.name, asked.options) == fedavgm.FedAvgM(beta=0.5)
    assert "fedavgm" in {row["method"] for row in commands.listing()}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_the_tutorial_opens_an_adapter_with_plain_peft(
    recipe_of: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cache = assets.Cache(tmp_path / "no-assets")
    commands.run(recipe_file.read(recipe_of(rounds=1)), cache, [])
    monkeypatch.chdir(tmp_path)
    (program,) = blocks(DOCS / "tutorial" / "own-data.md", "python")
    capsys.readouterr()
    exec(program, {})
    said = answers.predict(Path("runs/mine/adapters/anna"), ["such a lovely day"], cache)
    assert capsys.readouterr().out.strip() == said["predictions"][0]["label"]
