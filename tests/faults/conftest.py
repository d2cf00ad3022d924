"""Light processes for the storms, and the whole program; all are gone when a test ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from network.cluster import Cluster, Nursery
from network.conftest import nursery

__all__ = ["nursery"]


@pytest.fixture(scope="session")
def light() -> Iterator[Nursery]:
    with Nursery(Path(__file__).with_name("light.py")) as made:
        yield made


@pytest.fixture
def cluster(light: Nursery, tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(light, tmp_path) as made:
        yield made


@pytest.fixture
def whole(nursery: Nursery, tmp_path: Path) -> Iterator[Cluster]:
    """A cluster of the program as people install it."""
    with Cluster(nursery, tmp_path) as made:
        yield made
