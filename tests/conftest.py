"""What every test starts from: no network, one thread, the packaged models and data sets."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

# Read when a library is imported, so set before any is.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
)

import pytest
import torch
from hypothesis import HealthCheck, settings

pytest_plugins = ["fixtures_assets", "fixtures_models"]

# A slow or busy machine is no failure; a run of continuous integration repeats exactly.
settings.register_profile(
    "flexp",
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("flexp")

LOOPBACK = ("127.", "::1", "localhost")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Sums are equal bit for bit only where their order is fixed."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def loopback_only() -> Iterator[None]:
    """A test that would reach another machine fails, instead of passing only where it can."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        far = self.family in (socket.AF_INET, socket.AF_INET6)
        if far and not str(address[0]).startswith(LOOPBACK):
            raise ConnectionRefusedError(f"A test tried to reach {address[0]!r}.")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        yield
