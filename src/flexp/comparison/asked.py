"""Which methods are compared: a list of names, a file of variants, or what lies beside a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from flexp import recipe_file
from flexp.errors import RecipeError
from flexp.plan.devices import parse_bytes
from flexp.recipe import Recipe
from flexp.strategies import methods

ALL = "all"


def asked(recipe: Recipe, path: Path, text: str | None) -> dict[str, Mapping[str, Any]]:
    """Labels with what each changes in the recipe.

    ``text`` is a list like "local,fedavg", "all", or a YAML file that maps labels to changes;
    without it the file NAME.methods.yaml beside NAME.yaml, or else base, local, fedavg and the
    recipe's own. A listed method takes its changes (its tuned rate) from that file, if it is there.
    """
    beside = path.with_suffix(".methods.yaml")
    held = variants(beside) if beside.is_file() else {}
    if text is None:
        names = held or dict.fromkeys(("base", "local", "fedavg", recipe.strategy.name))
        return {name: held.get(name, {}) for name in names}
    if text == ALL:
        return {**{name: held.get(name, {}) for name in methods()}, **held}
    if Path(text).suffix in (".yaml", ".yml"):
        return variants(Path(text))
    names = dict.fromkeys(name.strip() for name in text.split(",") if name.strip())
    return {name: held.get(name, {}) for name in names}


def variants(path: Path) -> dict[str, Mapping[str, Any]]:
    """The labels of a file, each a mapping of dotted keys to values; RecipeError if it is none."""
    found = recipe_file.load(path)
    for label, changes in found.items():
        if not isinstance(changes, dict):
            raise RecipeError(
                f"{path}: {label} is no mapping. Write what it changes, as "
                "{train.lr: 1e-4}, or {} for nothing."
            )
    return cast("dict[str, Mapping[str, Any]]", found)


def seeds_of(text: str) -> tuple[int, ...]:
    """Seeds from a list like "0,1,2"; RecipeError if it is none."""
    try:
        found = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        found = ()
    if not found or min(found) < 0:
        raise RecipeError(f'--seeds: "{text}" is no list of seeds. Write them as 0,1,2.')
    return found


def bytes_of(text: str | None) -> int | None:
    """A memory budget in bytes; PlanError if it is none."""
    return None if text is None else parse_bytes(text)
