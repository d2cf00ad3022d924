"""Devices, declared or measured, and sizes as people write them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

import psutil

from flexp.errors import PlanError

_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True)
class Device:
    """What a client runs on; None is not known.

    ``memory`` is in bytes and means what training may use, ``flops`` is per second, ``uplink`` and
    ``downlink`` are in bytes per second, ``latency`` is in seconds, there and back.
    """

    name: str
    memory: int
    flops: float | None = None
    uplink: float | None = None
    downlink: float | None = None
    latency: float = 0.0

    def __post_init__(self) -> None:
        for field in ("memory", "flops", "uplink", "downlink"):
            value = getattr(self, field)
            if value is not None and not value > 0:
                raise PlanError(
                    f'Device "{self.name}" has {field} {value}. Give a number above 0'
                    f"{'' if field == 'memory' else ', or leave it out'}."
                )


def parse_bytes(size: int | str) -> int:
    """A size in bytes: kB, MB, GB and TB count in thousands, KiB, MiB, GiB and TiB in 1024s.

    >>> parse_bytes("600MB"), parse_bytes("1.5 GiB"), parse_bytes(4096)
    (600000000, 1610612736, 4096)
    """
    if isinstance(size, str) and (match := _SIZE.fullmatch(size.strip())):
        number, prefix, binary = match.groups()
        if prefix or not binary:
            found = int(Decimal(number) * (1024 if binary else 1000) ** _POWERS[prefix.lower()])
            if found > 0:
                return found
    elif type(size) is int and size > 0:
        return size
    raise PlanError(
        f"{size!r} is not a size in bytes. Write it like 600MB, 1.5GiB or 4096, above 0."
    )


def format_bytes(size: int) -> str:
    """A size for people, to three digits, in thousands.

    >>> format_bytes(512_400_000), format_bytes(1_610_612_736), format_bytes(999)
    ('512 MB', '1.61 GB', '999 B')
    """
    if size < 1000:
        return f"{size} B"
    value, units = float(size), iter(("kB", "MB", "GB", "TB"))
    unit = "B"
    while value >= 999.5 and unit != "TB":
        value, unit = value / 1000, next(units)
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    text = f"{value:.{digits}f}"
    return f"{text.rstrip('0').rstrip('.') if digits else text} {unit}"


def measure(name: str = "this machine") -> Device:
    """This machine, with the memory that is available now."""
    return Device(name, int(psutil.virtual_memory().available))
