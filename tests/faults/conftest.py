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
    made = Nursery(Path(__file__).with_name("light.py"))
    yield made
    made.close()


@pytest.fixture
def cluster(light: Nursery, tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(light, tmp_path)
    yield made
    made.reap()


@pytest.fixture
def whole(nursery: Nursery, tmp_path: Path) -> Iterator[Cluster]:
    """A cluster of the program as people install it."""
    made = Cluster(nursery, tmp_path)
    yield made
    made.reap()
