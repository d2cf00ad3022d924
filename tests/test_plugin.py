"""A method of another package: the example is built, found through its entry point, and run."""

from __future__ import annotations

import importlib
import json
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hatchling.build import build_wheel

from flexp.errors import StrategyError
from flexp.parcel import Parcel
from flexp.strategies import BUILT_IN, GROUP, build, methods
from flexp.strategies.base import Turn
from flexp.tensors import Tensors

EXAMPLE = Path(__file__).parents[1] / "examples" / "fedavgm"
Flexp = Callable[..., tuple[int, str, str]]
Recipe = Callable[..., Path]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example as pip would install it; Python imports from a wheel as it is."""
    folder = tmp_path_factory.mktemp("wheel")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(EXAMPLE)
        return folder / build_wheel(str(folder))


@pytest.fixture
def installed(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The example where Python looks for packages, until the test ends."""
    monkeypatch.syspath_prepend(wheel)
    yield
    sys.modules.pop("fedavgm", None)


def beside(folder: Path, entry: str) -> Path:
    """A package that has nothing but an entry point."""
    about = folder / "theirs-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[{GROUP}]\n{entry}\n")
    return folder


@pytest.mark.usefixtures("installed")
def test_the_example_is_listed(flexp: Flexp, wheel: Path) -> None:
    code, out, err = flexp("methods", "--json")
    assert code == 0, err
    listed = [row["method"] for row in json.loads(out)]
    assert listed == [method.name for method in BUILT_IN] + ["fedavgm"]
    file = sys.modules[methods()["fedavgm"].__module__].__file__
    assert file == str(wheel / "fedavgm.py")


def test_it_is_not_there_without_its_package() -> None:
    assert "fedavgm" not in methods()
    with pytest.raises(StrategyError, match='there is no method "fedavgm"'):
        build("fedavgm", {})


@pytest.mark.usefixtures("installed")
def test_the_example_runs_by_name(flexp: Flexp, recipe_of: Recipe) -> None:
    recipe = str(recipe_of())
    losses: dict[str, list[float]] = {}
    for name, options in (
        ("fedavg", ["strategy.name=fedavg"]),
        ("still", ["strategy.name=fedavgm", "strategy.beta=0.0"]),
        ("moving", ["strategy.name=fedavgm", "strategy.beta=0.9"]),
    ):
        code, out, err = flexp("run", recipe, f"name={name}", *options, "--json")
        assert code == 0, err
        document = json.loads(out)
        assert document["method"] == options[0].partition("=")[2]
        losses[name] = [row["value"] for row in document["rows"] if row["metric"] == "loss"]
        assert len(document["adapters"]) == 3
    assert losses["still"] == losses["fedavg"]
    assert losses["moving"] != losses["fedavg"]


@pytest.mark.usefixtures("installed")
def test_options_are_checked_like_any_others(flexp: Flexp, recipe_of: Recipe) -> None:
    recipe = str(recipe_of())
    for option, why in (("strategy.rate=1", "has no such option"), ("strategy.beta=much", "beta")):
        code, _, err = flexp("run", recipe, "strategy.name=fedavgm", option)
        assert code == 2
        assert why in err


@pytest.mark.usefixtures("installed")
def test_a_run_of_the_example_is_resumed(flexp: Flexp, recipe_of: Recipe, tmp_path: Path) -> None:
    """Its state has a class of its own, which only its package knows."""
    recipe = str(recipe_of(strategy={"name": "fedavgm"}))
    code, out, err = flexp("run", recipe, "--json")
    assert code == 0, err
    shutil.rmtree(tmp_path / "runs" / "mine" / "checkpoint" / "000003")
    code, again, err = flexp("run", recipe, "--resume", "--json")
    assert code == 0, err
    assert "resuming after round 2 of 3" in err
    assert json.loads(again)["rows"] == json.loads(out)["rows"]


@pytest.mark.usefixtures("installed")
def test_the_example_passes_its_own_tests() -> None:
    """Which check the laws, and that without momentum it is FedAvg."""
    tests = runpy.run_path(str(EXAMPLE / "test_fedavgm.py"))
    names = [name for name in tests if name.startswith("test_")]
    assert len(names) == 2
    for name in names:
        tests[name]()


@pytest.mark.usefixtures("installed")
def test_momentum_by_hand() -> None:
    """From 10, clients at 12 and 16 with equal rows: the mean is 14, a move of 4. Then they stay
    where they are given 14, so v = 4/2 and w = 16; and again, v = 1 and w = 17."""
    module = importlib.import_module("fedavgm")
    method = module.FedAvgM(beta=0.5)
    state = module.Moving(number(10.0), number(0.0))
    turn = Turn(0, 3, 0, True, {}, {}, lambda name: 0, 1)
    for clients, w, v in (
        ((12.0, 16.0), 14.0, 4.0),
        ((14.0, 14.0), 16.0, 2.0),
        ((16.0,), 17.0, 1.0),
    ):
        replies = {f"c{n}": Parcel({"personal": number(x)}) for n, x in enumerate(clients)}
        state = method.merge(state, replies, turn)
        assert torch.equal(state.adapter["w"], number(w)["w"])
        assert torch.equal(state.velocity["w"], number(v)["w"])
    assert method.merge(state, {}, turn) is state  # nobody came back


def number(x: float) -> Tensors:
    return {"w": torch.tensor([x])}


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ("theirs = nowhere_at_all:Theirs", r"cannot be loaded: ModuleNotFoundError"),
        ("theirs = flexp.dice:Dice", r"is no strategy: it has no name"),
        ("theirs = flexp.strategies.fedavg:FedAvg", r'is no strategy: it calls itself "fedavg"'),
    ],
)
def test_a_package_that_brings_no_method_is_named(
    entry: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(beside(tmp_path, entry))
    with pytest.raises(StrategyError, match=why):
        methods()


def test_a_package_cannot_replace_a_method_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(beside(tmp_path, "fedavg = flexp.strategies.local:Local"))
    assert methods() == {method.name: method for method in BUILT_IN}
