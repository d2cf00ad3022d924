"""The rows that a recipe names, wherever they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flexp import assets
from flexp.data import sources
from flexp.data.sources import Row
from flexp.errors import DataError
from flexp.recipe import Recipe

Say = Callable[[str], None]


def read_rows(recipe: Recipe, cache: assets.Cache, say: Say) -> list[Row]:
    """The rows of the recipe's data: a packaged set by name, else a path."""
    name = recipe.data.path
    if name in sources.SHIPPED:
        return sources.shipped(name, assets.resolve(name, cache, kind="data", say=say))
    path = Path(name).expanduser()
    if not path.exists() and name in cache.catalogue:
        raise DataError(
            f'data.path: the asset "{name}" cannot be read as rows. Packaged sets that can: '
            f"{', '.join(sources.SHIPPED)}."
        )
    return sources.read(path)
