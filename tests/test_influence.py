"""`flexp influence`: what a run says of its clients, and what training without them does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Recipe = Callable[..., Path]
Flexp = Callable[..., tuple[int, str, str]]
WATCHING: dict[str, Any] = {"name": "fed_influence", "of": "fedavg", "mode": "none"}


def test_clients_are_ranked_and_checked(flexp: Flexp, recipe_of: Recipe, tmp_path: Path) -> None:
    # After one round with equal rows e_c is exact, in any mode. It is short, so that the change is
    # the slope but for the second order.
    short = {"train__lr": 3e-4, "train__head_lr": 3e-4}
    recipe = str(recipe_of(rounds=1, strategy=WATCHING, **short))
    folder = str(tmp_path / "runs" / "mine")
    code, _, err = flexp("run", recipe)
    assert code == 0, err
    code, out, err = flexp("influence", folder, "--check", "all", "--json")
    assert code == 0, err
    document = json.loads(out)
    rows = {row["client"]: row for row in document["rows"]}
    assert (document["method"], set(rows)) == ("fedavg", {"anna", "ben", "carl dee"})
    changes = [row["change"] for row in document["rows"]]
    assert changes == sorted(changes, reverse=True)
    for row in rows.values():
        assert row["norm"] == pytest.approx(row["real_norm"], rel=1e-4)
        assert row["norm"] > 0
        assert row["change"] == pytest.approx(row["real_change"], abs=1e-6)
        assert row["slope"] == pytest.approx(row["change"], rel=0.02)
    assert document["pearson"]["norm"] > 0.99
    code, out, err = flexp("influence", folder, "--check", "ben")
    assert code == 0, err
    assert "carl dee" in out
    assert "really" in out


def test_what_cannot_be_ranked_is_said(flexp: Flexp, recipe_of: Recipe, tmp_path: Path) -> None:
    recipe, folder = str(recipe_of(rounds=1)), str(tmp_path / "runs" / "mine")
    assert flexp("run", recipe, "strategy.name=fedavg")[0] == 0
    code, _, err = flexp("influence", folder)
    assert code == 2
    assert "Train it again with strategy.name=fed_influence strategy.of=fedavg" in err
    assert flexp("influence", str(tmp_path / "nothing"))[0] == 2
