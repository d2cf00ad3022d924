"""Light processes for the storms; whatever a test has started is gone when it ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from network.cluster import Cluster, Nursery


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
