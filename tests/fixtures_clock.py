"""A clock that a test winds."""

from __future__ import annotations

import pytest


class Clock:
    """Seconds since whatever a test likes."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()
