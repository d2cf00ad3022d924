"""Freed memory goes back where the C library can be told to."""

from __future__ import annotations

import ctypes
import platform
from types import SimpleNamespace

import pytest

from flexp.client.heap import give_back


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the setting")
def test_glibc_takes_the_setting() -> None:
    assert give_back()


def test_another_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    assert not give_back()
