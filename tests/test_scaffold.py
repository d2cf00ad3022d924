"""`flexp new-strategy`: a package that keeps the laws at once, or a reason and nothing written."""

from __future__ import annotations

import importlib.util
import json
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from flexp import scaffold
from flexp.errors import StrategyError
from flexp.strategies import BUILT_IN, GROUP
from flexp.strategies.fedavg import FedAvg

NAMES = ("my_method", "x", "turn", "none", "a1_b2", "sfl", "q" * scaffold.LONGEST)
ROOT = Path(__file__).parents[1]


def test_a_written_package_passes_its_own_test_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which checks that it keeps the laws and is FedAvg."""
    home = tmp_path / "my_method"
    scaffold.write("my_method", tmp_path)
    spec = importlib.util.spec_from_file_location("my_method", home / "my_method.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "my_method", module)
    spec.loader.exec_module(module)
    assert not issubclass(module.MyMethod, FedAvg)
    tests = runpy.run_path(str(home / "test_my_method.py"))
    names = [name for name in tests if name.startswith("test_")]
    assert len(names) == 2
    for name in names:
        tests[name]()


def test_the_document_names_files_and_what_to_call_next(tmp_path: Path) -> None:
    folder = tmp_path / "with space"
    folder.mkdir()
    document = json.loads(json.dumps(scaffold.new_strategy("my_method", folder)))
    assert set(document) == {"method", "files", "next"}
    assert document["method"] == "my_method"
    assert [p.name for p in folder.iterdir()] == ["my_method"]
    found = sorted(str(p) for p in (folder / "my_method").iterdir())
    assert sorted(document["files"]) == found
    assert len(found) == 3
    install, test, run = document["next"]
    assert install == f"python -m pip install -e '{folder / 'my_method'}'"
    assert test == f"python -m pytest '{folder / 'my_method'}'"
    assert run.endswith("strategy.name=my_method")


@pytest.mark.parametrize("name", NAMES)
def test_the_project_file_names_the_class_that_is_there(name: str, tmp_path: Path) -> None:
    scaffold.write(name, tmp_path)
    text = (tmp_path / name / "pyproject.toml").read_text("utf-8")
    document = tomllib.loads(text)
    title = scaffold.class_of(name)
    assert document["project"]["entry-points"] == {GROUP: {name: f"{name}:{title}"}}
    assert document["project"]["dependencies"] == ["flexp-sfl"]
    assert document["project"]["name"] != "flexp-sfl"
    assert document["tool"]["hatch"]["build"]["targets"]["wheel"] == {
        "only-include": [f"{name}.py"]
    }
    source = (tmp_path / name / f"{name}.py").read_text("utf-8")
    assert f"class {title}(Strategy[Tensors]):" in source
    assert f'name: ClassVar[str] = "{name}"' in source
    assert len(source.splitlines()) <= 120


@pytest.mark.parametrize(
    ("name", "title"), [("my_method", "MyMethod"), ("turn", "TurnMethod"), ("none", "NoneMethod")]
)
def test_a_class_takes_no_name_that_its_file_needs(name: str, title: str, tmp_path: Path) -> None:
    assert scaffold.class_of(name) == title
    method = runpy.run_path(str(scaffold.write(name, tmp_path)[0]))[title]
    assert method.name == name
    assert set(method.slots) == {"personal"}


def test_what_is_written_is_formatted_and_clean(tmp_path: Path) -> None:
    """With the project's own rules of form, but as a project of its own."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    rules = project["tool"]["ruff"]["lint"]["select"]
    for name in NAMES:
        scaffold.write(name, tmp_path)
    ruff = [sys.executable, "-m", "ruff"]
    form = ["--isolated", "--no-cache", "--line-length", "100"]
    lint = ["--select", ",".join(rules), "--target-version", "py311"]
    for call in (["format", "--check", *form], ["check", *form, *lint]):
        done = subprocess.run(
            [*ruff, *call], cwd=tmp_path, check=False, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("My", "cannot name a method"),
        ("my-method", "cannot name a method"),
        ("../up", "cannot name a method"),
        ("", "cannot name a method"),
        ("1st", "cannot name a method"),
        ("_mine", "cannot name a method"),
        ("mine_", "cannot name a method"),
        ("überall", "cannot name a method"),
        ("lambda", "cannot name a method"),
        ("mine\n", "cannot name a method"),
        ("q" * (scaffold.LONGEST + 1), "cannot name a method"),
        *((method.name, "already") for method in BUILT_IN),
        ("random", "is a module"),
        ("torch", "is a module"),
    ],
)
def test_a_name_that_cannot_be_taken_is_refused(name: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(StrategyError, match=why) as found:
        scaffold.new_strategy(name, tmp_path)
    assert "Take" in str(found.value)
    assert not list(tmp_path.iterdir())


def test_a_method_of_another_package_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = tmp_path / "site" / "theirs-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[{GROUP}]\ntheirs = not_there:Theirs\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(StrategyError, match=r'"theirs" already'):
        scaffold.write("theirs", tmp_path)


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(StrategyError, match="is there already"):
        scaffold.write("mine", tmp_path)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("made", [False, True], ids=["missing", "a file"])
def test_a_folder_that_is_none_is_refused(made: bool, tmp_path: Path) -> None:
    folder = tmp_path / "place"
    if made:
        folder.write_text("")
    with pytest.raises(StrategyError, match=r"is no folder\. Make it, or"):
        scaffold.write("mine", folder)


def test_nothing_is_left_when_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_text

    def full(self: Path, *args: object, **more: object) -> int:
        if self.name == "pyproject.toml":
            raise OSError(28, "No space left on device")
        return write(self, *args, **more)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(StrategyError, match=r"No space left on device\. .* --folder"):
        scaffold.write("mine", tmp_path)
    assert not list(tmp_path.iterdir())
