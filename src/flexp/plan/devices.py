"""Devices, declared or measured, and sizes as people write them."""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from flexp.errors import PlanError
from flexp.model.meter import Meter
from flexp.model.quantize import Quantize, quantizable, quantize_maps
from flexp.model.skeleton import Skeleton, TaskKind, bare
from flexp.plan.calls import calls, state_of

SMALLEST = 1_000_000  # bytes of a device that trains anything
_MAY_BE_LEAST = ("memory", "latency")
_WANTED = {"memory": "of bytes from 1 MB on", "latency": "of at least 0"}
_CGROUPS = Path("/sys/fs/cgroup")

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
        for field in ("memory", "flops", "uplink", "downlink", "latency"):
            value = getattr(self, field)
            least = SMALLEST if field == "memory" else 0
            good = value is None or (
                math.isfinite(value) and (value >= least if field in _MAY_BE_LEAST else value > 0)
            )
            if not good:
                raise PlanError(
                    f'Device "{self.name}" has {field} {value}. Give a number '
                    f"{_WANTED.get(field, 'above 0, or leave it out')}."
                )

    @property
    def timed(self) -> bool:
        """Whether all of its speeds are known."""
        return None not in (self.flops, self.uplink, self.downlink)

    def slowed(self, factor: float) -> Device:
        """A straggler: its own work and its way to the server take so many times as long."""
        flops, up, down = (
            None if value is None else value / factor
            for value in (self.flops, self.uplink, self.downlink)
        )
        return replace(self, flops=flops, uplink=up, downlink=down, latency=self.latency * factor)


@dataclass(frozen=True)
class Server:
    """What runs the trunk for everybody: operations per second, bytes; None is not known."""

    flops: float | None = None
    memory: int | None = None


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


def format_seconds(seconds: float) -> str:
    """A duration for people, to about three digits.

    >>> format_seconds(0.01234), format_seconds(12.34), format_seconds(754), format_seconds(9000)
    ('0.0123 s', '12.3 s', '12.6 min', '2.5 h')
    """
    unit, size = ("s", 1) if seconds < 600 else ("min", 60) if seconds < 7200 else ("h", 3600)
    value = seconds / size
    return f"{value:.3g} {unit}" if value < 999.5 else f"{value:,.0f} {unit}"


def free_memory(groups: Path = _CGROUPS) -> int:
    """Bytes that this process may still take: what is free, within the limits of a container."""
    free = int(psutil.virtual_memory().available)
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            left = int((groups / limit).read_text()) - int((groups / used).read_text())
        except (OSError, ValueError):  # no such group, or "max"
            continue
        free = min(free, max(0, left))
    return free


def measure(name: str = "this machine") -> Device:
    """This machine, with the memory that is free now."""
    return Device(name, max(SMALLEST, free_memory()))


def measure_flops(
    bones: Skeleton,
    task: TaskKind,
    *,
    batch: int,
    length: int,
    dtype: torch.dtype = torch.float32,
    quantize: Quantize | None = None,
    runs: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Operations per second of one block of a model here, forward and backward.

    Its weights are random and nothing is downloaded. The median of a few runs, after a first.
    """
    call = calls(bones, task, length)[0]
    net = bare(bones.config, task, blocks_at=bones.blocks_path).model.eval()
    blocks = cast(nn.ModuleList, net.get_submodule(bones.blocks_path))
    block = _filled(blocks[0], dtype)
    if quantize is not None:
        paths = quantizable(net, bones.blocks_path, quantize.kind)
        first = f"{bones.blocks_path}.0."
        quantize_maps(net, [p for p in paths if p.startswith(first)], quantize.form)
    hidden = torch.randn(batch, *call.hidden.shape[1:]).to(dtype).requires_grad_()
    call = call.on(hidden)

    def here(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.device.type != "meta":
            return value
        kind = dtype if value.is_floating_point() else value.dtype
        return torch.ones(value.shape, dtype=kind)

    args, kwargs = pytree.tree_map(here, (call.args, dict(call.kwargs)))

    def step() -> None:
        out = state_of(block(*args, **kwargs))
        torch.autograd.grad(out, [hidden], torch.ones_like(out))

    with Meter() as meter:
        step()
    return meter.flops / _median(step, runs, clock)


def _filled(block: nn.Module, dtype: torch.dtype) -> nn.Module:
    block = block.to_empty(device="cpu")
    with torch.no_grad():
        for value in (*block.parameters(), *block.buffers()):
            value.zero_()
        for parameter in block.parameters():
            parameter.normal_(std=0.02)
    return block.to(dtype).requires_grad_(False)


def measure_link(
    send: Callable[[int], int],
    *,
    sizes: Sequence[int] = (1_000, 1_000_000),
    runs: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float]:
    """Bytes per second and seconds of latency of a link, from messages of two sizes.

    ``send`` carries so many bytes, waits for the answer, and returns how many came with it.
    PlanError if the large message is not slower than the small one.
    """
    times: list[float] = []
    carried: list[int] = []
    for size in sizes:
        carried.append(size + send(size))
        times.append(_median(lambda n=size: send(n), runs, clock))
    small, large = times
    if large <= small:
        raise PlanError(
            f"{sizes[1]} bytes took no longer than {sizes[0]}, so the link has no rate to measure. "
            "Send more."
        )
    rate = (carried[1] - carried[0]) / (large - small)
    return rate, max(0.0, small - carried[0] / rate)


def _median(work: Callable[[], object], runs: int, clock: Callable[[], float]) -> float:
    times: list[float] = []
    for _ in range(runs):
        began = clock()
        work()
        times.append(clock() - began)
    return max(statistics.median(times), 1e-9)
