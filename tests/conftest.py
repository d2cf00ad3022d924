"""What every test starts from: no network, one thread, the packaged models and data sets."""

from __future__ import annotations

import importlib.metadata
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
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

pytest_plugins = [
    "fixtures_assets",
    "fixtures_clock",
    "fixtures_command",
    "fixtures_images",
    "fixtures_models",
    "suites",
]

# A slow or busy machine is no failure; a run of continuous integration repeats exactly.
settings.register_profile(
    "flexp",
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("flexp")

LOOPBACK = ("127.", "::1", "localhost")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums are equal bit for bit only where their order is fixed; commands set what they like."""
    torch.set_num_threads(1)
    yield
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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test with many cases, those that are not for every day are slow."""
    cases: dict[str, set[str]] = {}
    for item in items:
        for mark in item.iter_markers("daily"):
            case = item.name.partition("[")[2].removesuffix("]")
            cases.setdefault(item.nodeid.partition("[")[0], {*mark.args}).discard(case)
            if case not in mark.args:
                item.add_marker("slow")
    if len(items) > 1000 and (left := {test: ids for test, ids in cases.items() if ids}):
        raise pytest.UsageError(f"These daily cases do not exist: {left}")  # all were collected


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--result", help="write what passed and failed to this JSON file")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Heavy suites leave their last result in the repository."""
    path = config.getoption("--result")
    if not path:
        return
    stats = {
        kind: sorted(report.nodeid for report in terminalreporter.stats.get(kind, ()))
        for kind in ("passed", "failed", "error")
    }
    names = ("torch", "transformers", "peft")
    versions = {name: importlib.metadata.version(name) for name in names}
    reports = [r for found in terminalreporter.stats.values() for r in found]
    noted = [pair for r in reports for pair in getattr(r, "user_properties", ())]
    for name, value in noted:
        terminalreporter.write_line(f"{name}: {value}")
    document = {"versions": versions, "noted": noted, **stats}
    Path(path).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
