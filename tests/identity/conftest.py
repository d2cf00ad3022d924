"""An authority, and one that nobody knows."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from flexp import identity
from flexp.identity import Authority, Credentials

Client = Callable[..., Credentials]


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.init(tmp_path / "authority")


@pytest.fixture
def foreign(tmp_path: Path) -> Authority:
    return Authority.init(tmp_path / "foreign")


@pytest.fixture
def at(tmp_path: Path) -> Callable[[float], Authority]:
    """The authority as it is some days from now."""

    def open_at(days: float) -> Authority:
        moment = datetime.now(UTC) + timedelta(days=days)
        return Authority.open(tmp_path / "authority", clock=lambda: moment)

    return open_at


@pytest.fixture
def client(authority: Authority) -> Client:
    """A client's credentials, signed by this authority or by the given one."""

    def made(signer: Authority = authority, name: str = "anna", days: float = 30) -> Credentials:
        asked = identity.request()
        return Credentials(authority.ca, signer.issue_client(asked.csr, name, days=days), asked.key)

    return made
