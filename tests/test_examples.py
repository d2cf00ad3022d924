"""Every example runs as it is."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_runs(
    path: Path, asset: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("bert-tiny", "vader"):
        asset(name)
    runpy.run_path(str(path), run_name="__main__")
    assert "personal/own/after" in capsys.readouterr().out
    assert len(path.read_text().splitlines()) <= 60


def test_there_are_examples() -> None:
    assert EXAMPLES
