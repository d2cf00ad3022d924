"""``flexp new-strategy NAME``: a small package with one method, which is FedAvg until edited."""

from __future__ import annotations

import builtins
import importlib.util
import keyword
import re
import shlex
import tempfile
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from flexp.errors import StrategyError
from flexp.strategies import BUILT_IN, GROUP

METHOD = '''\
"""{title} (who, when, arXiv number): what is new, in a line.

Round: w_i <- E local epochs from w;  w <- sum_i p_i w_i.  That is FedAvg, until it is edited: the
method's own equations belong here, and what of them is a reading of the paper and not its text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from flexp.client.desk import Desk
from flexp.model.ops import SlotSpec
from flexp.parcel import Parcel
from flexp.privacy.egress import Leave
from flexp.selection import NONE, Where
from flexp.strategies.base import ClientId, MethodKind, Scene, Strategy, Turn
from flexp.tensors import Tensors, mean


@dataclass(frozen=True)
class {title}(Strategy[Tensors]):
    """One shared adapter, as in FedAvg; `flexp methods` shows this line."""

    # Options are fields with a default, as `rate: float = 0.1`; a recipe sets strategy.rate.

    name: ClassVar[str] = "{name}"
    paper: ClassVar[str] = "McMahan et al. 2017, arXiv 1602.05629"
    kind: ClassVar[MethodKind] = "federated"
    # The part of what a client is served that may differ between clients: ALL, NEAR, HEAD, ...
    own: ClassVar[Where] = NONE
    # What a client holds. SlotSpec(lasts="run", moments="keep") stays with it between turns.
    slots: ClassVar[Mapping[str, SlotSpec]] = {{"personal": SlotSpec()}}
    # What leaves a client, and why. Anything else is refused.
    leaves: ClassVar[tuple[Leave, ...]] = (Leave("personal", why="to be averaged"),)

    def start(self, scene: Scene) -> Tensors:
        """The server's state before the first round: tensors, mappings, frozen dataclasses."""
        return scene.initial(self.slots["personal"])

    def offer(self, state: Tensors, client: ClientId, turn: Turn) -> Parcel:
        """What a client finds in its slots when its turn begins."""
        return Parcel({{"personal": state}})

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        """What a client does, where its data lives, and what it gives back."""
        facts = desk.fit()
        return desk.reply("personal", facts=facts)

    def merge(self, state: Tensors, replies: Mapping[ClientId, Parcel], turn: Turn) -> Tensors:
        """The server's state after a wave; whoever failed is not among the replies."""
        trained = [reply.adapters["personal"] for reply in replies.values()]
        return mean(trained, turn.weights(list(replies))) if trained else state
'''

TEST = '''\
"""What {title} must do, and what it must equal."""

from __future__ import annotations

from flexp.laws import alike, check
from flexp.strategies.fedavg import FedAvg

from {name} import {title}


def test_it_keeps_the_laws_of_methods() -> None:
    check({title}())


def test_it_is_fedavg_until_it_is_edited() -> None:
    """Then say here with which options it equals which method."""
    assert alike({title}(), FedAvg())
'''

PROJECT = """\
[build-system]
requires = ["hatchling>=1.27"]
build-backend = "hatchling.build"

[project]
name = "flexp-method-{dashed}"
version = "0.1.0"
description = "A method for FlexP-SFL."
requires-python = ">=3.11"
dependencies = ["flexp-sfl"]

[project.entry-points."flexp.strategies"]
{name} = "{name}:{title}"

[tool.hatch.build.targets.wheel]
only-include = ["{name}.py"]
"""

LONGEST = 40


def new_strategy(name: str, folder: Path) -> dict[str, Any]:
    """Writes the package; the document has its method, its files and what to call next."""
    files = write(name, folder)
    home = shlex.quote(str(folder / name))
    return {
        "method": name,
        "files": [str(path) for path in files],
        "next": [
            f"python -m pip install -e {home}",
            f"python -m pytest {home}",
            f"flexp run RECIPE strategy.name={name}",
        ],
    }


def write(name: str, folder: Path) -> list[Path]:
    """Writes a new folder of that name: the method, its test, its project file.

    StrategyError, and nothing written, if the name or the folder cannot be taken.
    """
    refuse(name, folder)
    texts = {f"{name}.py": METHOD, f"test_{name}.py": TEST, "pyproject.toml": PROJECT}
    dashed, title = name.replace("_", "-"), class_of(name)
    home = folder / name
    try:
        with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=folder) as beside:
            made = Path(beside, name)
            made.mkdir()
            for file, text in texts.items():
                said = text.format(name=name, title=title, dashed=dashed)
                (made / file).write_text(said, encoding="utf-8", newline="\n")
            made.rename(home)
    except OSError as problem:
        raise StrategyError(
            f"{home} cannot be written: {problem.strerror}. Choose another folder with --folder."
        ) from problem
    return [home / file for file in texts]


def refuse(name: str, folder: Path) -> None:
    """Raises StrategyError if no method of that name can be put into that folder."""
    plain = re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name)
    if not plain or keyword.iskeyword(name) or len(name) > LONGEST:
        raise StrategyError(
            f'"{name}" cannot name a method. Take small letters, digits and single underscores, '
            f"a letter first and {LONGEST} at most, as in my_method."
        )
    if name in {m.name for m in BUILT_IN} | {point.name for point in entry_points(group=GROUP)}:
        raise StrategyError(
            f'There is a method "{name}" already; see `flexp methods`. Take another name.'
        )
    if not folder.is_dir():
        raise StrategyError(f"{folder} is no folder. Make it, or choose another with --folder.")
    if (folder / name).exists():
        raise StrategyError(
            f"{folder / name} is there already. Take another name or another folder."
        )
    if importlib.util.find_spec(name) is not None:
        raise StrategyError(f'"{name}" is a module of Python or of a package. Take another name.')


def class_of(name: str) -> str:
    """The name of the method's class, which is none that its file needs for something else.

    >>> class_of("my_method"), class_of("turn"), class_of("none")
    ('MyMethod', 'TurnMethod', 'NoneMethod')
    """
    title = "".join(word.capitalize() for word in name.split("_"))
    taken = re.search(rf"\b{title}\b", METHOD + TEST) or hasattr(builtins, title)
    return f"{title}Method" if taken or keyword.iskeyword(title) else title
