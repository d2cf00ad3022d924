"""Sizes as people write them, and devices that make sense."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import backbone

from flexp.errors import PlanError
from flexp.link.local import LocalLink
from flexp.link.messages import Answer, Message, Put, StepKey
from flexp.model.adapter import Lora
from flexp.model.skeleton import Skeleton
from flexp.plan import (
    PROFILES,
    Device,
    format_bytes,
    measure,
    measure_work,
    parse_bytes,
    profile,
)
from flexp.plan.devices import free_memory, measure_flops, measure_link

MB = 10**6


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


@pytest.mark.parametrize("field", ["memory", "flops", "uplink", "downlink", "latency"])
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
def test_a_device_makes_sense(field: str, value: float) -> None:
    with pytest.raises(PlanError, match=rf'Device "p" has {field} {value}\. Give a number '):
        Device("p", **({"memory": MB} | {field: value}))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("field", ["flops", "uplink", "downlink"])
def test_a_speed_is_above_nothing(field: str) -> None:
    with pytest.raises(PlanError, match=rf'Device "p" has {field} 0\. .* or leave it out'):
        Device("p", MB, **{field: 0})


def test_memory_begins_at_a_megabyte() -> None:
    with pytest.raises(PlanError, match=r'Device "p" has memory 999999\. .* from 1 MB on'):
        Device("p", MB - 1)
    assert Device("p", MB).memory == MB


def test_this_machine_is_measured() -> None:
    device = measure()
    assert device.name == "this machine"
    assert MB <= device.memory <= psutil.virtual_memory().total
    assert device.flops is None


def test_a_containers_limit_is_kept(tmp_path: Path) -> None:
    assert free_memory(tmp_path) > 0  # no groups here
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("2000000\n")
    assert free_memory(tmp_path) == 3_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(tmp_path) > 3_000_000
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("10")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("20")
    assert free_memory(tmp_path) == 0


def ticks(*seconds: float) -> Iterator[float]:
    """A clock that shows, in pairs, how long each thing took."""
    now = 0.0
    for taken in seconds:
        yield now
        now += taken
        yield now


@pytest.mark.parametrize("family", ["bert-cls", "llama", "gpt2", "vit", "modernbert-cls"])
def test_a_block_is_measured_by_its_operations_and_the_clock(family: str) -> None:
    body = backbone(family)
    bones = Skeleton(body.model, body.blocks_path, body.depth, body.config)
    clock = ticks(1.0, 4.0, 2.0)  # the median is 2 s
    found = measure_flops(bones, body.task, batch=2, length=9, runs=3, clock=lambda: next(clock))
    work = measure_work(bones, Lora(rank=1, targets=()), body.task, batch=2, length=9)
    # The same block, without the adapter's few operations.
    assert 2 * found == pytest.approx(work.forward[1] + work.backward[1], rel=0.15)


def test_a_link_is_measured_from_two_sizes() -> None:
    # 0.1 s there and back, 1 MB/s: 2 kB take 0.102 s, 2 MB take 2.1 s.
    clock = ticks(*[0.102] * 5, *[2.1] * 5)
    sent: list[int] = []

    def echo(size: int) -> int:
        sent.append(size)
        return size

    rate, latency = measure_link(echo, clock=lambda: next(clock))
    assert rate == pytest.approx(1_998_000 / 1.998)
    assert latency == pytest.approx(0.1)
    assert sent == [1000] * 6 + [1_000_000] * 6
    clock = ticks(*[1.0] * 10)
    with pytest.raises(PlanError, match="took no longer than 1000"):
        measure_link(echo, clock=lambda: next(clock))


def test_a_link_of_this_process_is_measured() -> None:
    key = StepKey("run", 0, 0, 0, 0, "put")

    def answer(client: str, message: Message) -> Answer:
        return Answer(dict(message.tensors()))

    link = LocalLink("a", answer)

    def echo(size: int) -> int:
        back = link.send(Put(key, "echo", {"x": torch.zeros(size, dtype=torch.uint8)}))
        return sum(v.nbytes for v in back.tensors.values())

    rate, latency = measure_link(echo, sizes=(1000, 20_000_000), runs=3)
    assert rate > 1e6
    assert 0 <= latency < 1


def test_profiles_are_sane() -> None:
    assert list(PROFILES) == [
        "phone-4gb",
        "phone-8gb",
        "raspberry-pi-5",
        "jetson-orin-nano",
        "laptop",
        "workstation",
        "gpu-server",
    ]
    for name, one in PROFILES.items():
        device = one.device()
        assert device.name == name
        assert device.timed
        assert one.built_in / 2 <= one.memory < one.built_in
        assert 0 < one.gflops() <= one.gflops("bfloat16") < 1e6
        assert device.flops == one.peak * one.efficiency * 1e9
        assert len(one.source) > 20
    speeds = [one.gflops() for one in PROFILES.values()]
    assert speeds[:3] == sorted(speeds[:3])
    assert profile("laptop").device("mine", "bfloat16").name == "mine"


def test_an_unknown_profile_is_told_what_was_meant() -> None:
    with pytest.raises(PlanError, match=r'no device profile "phone-4g". Did you mean "phone-4gb"'):
        profile("phone-4g")


def test_the_guide_has_every_profile_as_it_is() -> None:
    guide = Path(__file__).parents[2] / "docs" / "how-to" / "cuts.md"
    lines = {line for line in guide.read_text("utf-8").splitlines() if line.startswith("| `")}
    for one in PROFILES.values():
        fast = f" ({one.gflops('bfloat16'):,.0f})" if one.bfloat16 else ""
        assert (
            f"| `{one.name}` | {format_bytes(one.memory)} of {format_bytes(one.built_in)} "
            f"| {one.gflops():,.0f}{fast} | {one.up_mbit:,.0f} / {one.down_mbit:,.0f} "
            f"| {one.latency_ms:g} ms |"
        ) in lines
