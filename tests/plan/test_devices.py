"""Sizes as people write them, and devices that make sense."""

from __future__ import annotations

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexp.errors import PlanError
from flexp.plan import Device, format_bytes, measure, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("600MB", 600_000_000),
        ("600 mb", 600_000_000),
        (" 1.5GiB ", 1_610_612_736),
        ("0.1GB", 100_000_000),  # exactly, although 0.1 is no binary fraction
        ("4KiB", 4096),
        ("1kB", 1000),
        ("2TB", 2 * 10**12),
        ("7B", 7),
        (4096, 4096),
    ],
)
def test_sizes_are_read(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "600", "MB", "-1MB", "1,5GB", "1e3MB", "6iB", "600MBit", "0MB", "0.1B", "nanMB", "٣MB"],
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(PlanError, match="Write it like 600MB"):
        parse_bytes(text)


@pytest.mark.parametrize("size", [0, -5, True])
def test_other_numbers_are_refused(size: int) -> None:
    with pytest.raises(PlanError, match="not a size"):
        parse_bytes(size)


@settings(deadline=None)
@given(st.integers(1, 10**15))
def test_a_shown_size_is_within_half_a_percent(size: int) -> None:
    shown = format_bytes(size)
    assert abs(parse_bytes(shown.replace(" ", "")) - size) <= 0.005 * size
    assert len(shown) <= 7


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (999, "999 B"),
        (1000, "1 kB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (12_345_678, "12.3 MB"),
    ],
)
def test_sizes_are_shown(size: int, shown: str) -> None:
    assert format_bytes(size) == shown


@pytest.mark.parametrize("field", ["memory", "flops", "uplink"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_device_has_more_than_nothing(field: str, value: int) -> None:
    with pytest.raises(PlanError, match=rf'Device "p" has {field} {value}'):
        Device("p", **({"memory": 1, field: value}))


def test_this_machine_is_measured() -> None:
    device = measure()
    assert device.name == "this machine"
    assert 0 < device.memory <= psutil.virtual_memory().total
    assert device.flops is None
