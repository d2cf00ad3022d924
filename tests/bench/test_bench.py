"""Benchmarks compute what they say, on a tiny job; no timing is looked at."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flexp.bench import book, child, job, machine, memory, plain, start, watch
from flexp.bench.anatomy import WHAT, anatomy
from flexp.bench.clock import Samples, in_turns
from flexp.bench.job import SMALL, STANDARD, TINY, at_work, step
from flexp.bench.machine import Machine
from flexp.bench.overlap import STEPS
from flexp.bench.rows import Gate, Row
from flexp.errors import FlexpError

HERE = Machine("a processor", 2, "2", alike=True, peak={"fp32": 1e11, "bf16": 2e11})
KEYS = {"name", "value", "target", "floor", "ok", "machine"}
Command = Callable[..., tuple[int, str, str]]


def rows_of(name: str) -> dict[str, Row]:
    return {row.name: row for row in book.BOOK[name][1](TINY, HERE)}


def right(rows: dict[str, Row]) -> None:
    for row in rows.values():
        assert row.value is not None
        assert math.isfinite(row.value)
        assert row.gate is None or row.gate.holds, row.gate


# ---- rows


@pytest.mark.parametrize(
    ("value", "better", "most", "ok"),
    [
        (3.0, "higher", 0, True),
        (1.0, "higher", 0, False),
        (1.0, "lower", 0, True),
        (3.0, "lower", 0, False),
        (3.0, "higher", 1, False),
        (math.nan, "higher", 0, False),
    ],
)
def test_a_row_is_ok_on_the_right_side_of_its_target_if_it_is_right(
    value: float, better: Any, most: float, ok: bool
) -> None:
    row = Row("x", value, "×", "", target=2.0, better=better, gate=Gate("off", most, 0.0))
    assert row.plain(HERE)["ok"] is ok


def test_nothing_is_said_without_a_target_or_on_another_machine() -> None:
    row = Row("x", 3.0, "×", "", target=2.0)
    assert row.plain(HERE)["ok"] is True
    assert row.plain(replace(HERE, alike=False))["ok"] is None
    assert replace(row, target=None).plain(HERE)["ok"] is None
    assert row.plain(HERE).keys() >= KEYS


def test_a_gate_that_is_not_a_number_does_not_hold() -> None:
    assert not Gate("off", math.nan, 1.0).holds


def test_ratios_are_medians_over_rounds() -> None:
    a, b = Samples([2.0, 9.0, 4.0], [1.0] * 3), Samples([1.0, 3.0, 4.0], [2.0] * 3)
    assert a.over(b) == 2.0
    assert a.wall_over(b) == 0.5
    assert a.spread(b) == [1.0, 3.0]


def test_works_take_turns_and_warm_up() -> None:
    order: list[str] = []
    took = in_turns({n: lambda n=n: order.append(n) for n in "ab"}, 2)
    assert order == list("ababab")
    assert [len(held.cpu) for held in took.values()] == [2, 2]


# ---- the machine


@pytest.mark.parametrize(
    ("vendor", "family", "flags", "alike"),
    [
        ("AuthenticAMD", 26, "avx2 avx512_bf16", True),
        ("AuthenticAMD", 25, "avx512_bf16", False),
        ("GenuineIntel", 26, "avx512_bf16", False),
        ("AuthenticAMD", 26, "avx2", False),
    ],
)
def test_the_kind_of_processor_that_targets_are_for_is_known(
    vendor: str, family: int, flags: str, alike: bool
) -> None:
    text = (
        f"vendor_id\t: {vendor}\ncpu family\t: {family}\nmodel name\t: X: 9\nflags\t\t: {flags}\n"
    )
    assert machine.told(text * 2) == ("X: 9", alike)


def test_every_way_to_multiply_gives_the_same_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "SHAPES", ((4, 8, 16),))
    made: dict[tuple[str, int], Any] = machine.gemms()
    assert {"fp32", "bf16"} <= {way for way, _ in made}
    for (way, _), work in made.items():
        exact = made["fp32", 0]()
        assert torch.allclose(work().float(), exact, rtol=0.02, atol=0.1), way
    peak = machine.peaks(1)
    known = {k: v for k, v in peak.items() if v is not None}
    assert machine.fastest(peak, "fp32") == max(v for k, v in known.items() if "fp32" in k)
    assert machine.fastest(peak, "bf16") == max(known.values())  # it may be made in float32


# ---- the job


def test_the_standard_job_is_the_one_that_targets_are_for() -> None:
    assert STANDARD.told.startswith("8 blocks of width 512, vocabulary 8192, LoRA rank 8, cut (2")
    assert STANDARD.tokens == 512
    assert 1.2e8 < STANDARD.flops / STANDARD.tokens < 1.3e8


def test_a_model_is_the_same_every_time() -> None:
    a, b = (SMALL.model().state_dict() for _ in range(2))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_clients_at_work_train_each_for_itself() -> None:
    with at_work(SMALL, SMALL.backbone(), 2) as place:
        first, second = place.desks.values()
        losses = [step(first, SMALL.batch()) for _ in range(40)]
        assert losses[-1] < losses[0]
        begun = first.session.fetch("personal", far=True)
        assert any(bool(v.any()) for k, v in begun.items() if "lora_B" in k)
        other = second.session.fetch("personal", far=True)
        assert not any(bool(v.any()) for k, v in other.items() if "lora_B" in k)


# ---- benchmarks


def test_the_roofline_counts_what_a_step_computes() -> None:
    rows = rows_of("roofline")
    right(rows)
    names = [f"roofline.{d}.{size}" for d in ("fp32", "bf16") for size in ("2x8", "1x4")]
    assert list(rows) == names


def test_devices_side_by_side_sleep_for_what_they_do_not_compute() -> None:
    rows = rows_of("overlap")
    right(rows)
    assert list(rows) == ["overlap.bound", "overlap.turns"]
    wall = rows["overlap.bound"].details["wall_seconds"]
    assert wall.keys() == {"one", "turns", "beside"}
    assert min(wall["one"], wall["beside"]) >= STEPS * 0.01
    assert wall["turns"] >= 2 * 0.01


def test_the_parts_of_a_step_are_the_whole_step() -> None:
    found = anatomy(replace(TINY, rounds=3), HERE)
    for name in ("fp32", "bf16"):
        parts = [row for row in found if row.name.split(".")[1] == name]
        assert [row.name.split(".")[2] for row in parts] == list(WHAT)
        assert all(row.value is not None and row.value >= 0 for row in parts)


def test_a_server_holds_no_more_per_client_than_its_adapter_and_moments() -> None:
    found = memory.filled(TINY.job, TINY.tenants)
    state = memory.MOMENTS * found["adapter_bytes"]
    counts = 4 * 2 * (TINY.job.depth - TINY.job.cut)  # steps taken, a number per tensor
    assert found["further_tensor_bytes"] == state + counts
    assert found["shared"] == 0
    rows = {r.name: r for r in memory.memory(TINY, HERE, launch=lambda scale: found)}
    assert rows["memory.copies"].value is not None
    assert list(rows) == ["memory.further_client", "memory.copies", "memory.resident"]


def test_tenants_together_get_the_gradients_of_each_alone() -> None:
    rows = rows_of("tenants")
    right(rows)
    assert list(rows) == ["tenants.16x16", "tenants.mixed"]


def test_a_wire_sends_as_many_bytes_as_it_says() -> None:
    rows = rows_of("wire")
    width = TINY.job.width
    for name, size in {"bf16": 2.0, "int8": 1 + 2 / width}.items():
        told = rows[f"wire.{name}"].details
        mask = 8 * TINY.job.tokens
        assert told["fp32_bytes_per_step"] == 4 * 4 * TINY.job.tokens * width + mask
        assert told["bytes_per_step"] == 4 * size * TINY.job.tokens * width + mask
    assert 0.99 < rows["wire.int8"].details["cosine"] < 1
    frozen = rows["wire.frozen"].details
    assert frozen["fp32_bytes"] > 4 * frozen["int8_bytes"]


def test_a_last_block_has_the_gradients_that_it_has_among_all() -> None:
    rows = rows_of("client")
    right(rows)
    assert rows["client.last_of_3"].gate is not None


def test_blocks_that_run_again_keep_less_and_give_the_same_gradients() -> None:
    rows = rows_of("activations")
    right(rows)
    value = rows["activations.bytes"].value
    half = rows["activations.half.bytes"].value
    assert value is not None
    assert half is not None
    assert value > 4
    assert value > half > 1.5


def test_a_mean_of_adapters_is_right_both_ways() -> None:
    from flexp.bench.merge import by_loop, off

    right(rows_of("merge"))
    items = [{"x": torch.full((2,), float(n))} for n in (1, 4)]
    assert by_loop(items, [2.0, 1.0])["x"].tolist() == [2.0, 2.0]
    assert off(items, [2.0, 1.0]) < 1e-7


def test_whole_rounds_are_mostly_the_model() -> None:
    (row,) = rows_of("simulate").values()
    right({row.name: row})
    assert row.value is not None
    assert 0 < row.value < 100


def test_what_is_inside_counts_once_and_what_is_outside_does_not() -> None:
    now = [0.0]

    def work() -> None:
        now[0] += 1.0

    seen = watch.Watch(clock=lambda: now[0])
    inner, outer = seen.inside(work), seen.outside(work)
    seen.inside(lambda: (work(), inner(), outer()))()
    outer()
    assert seen.seconds == 2.0


def test_what_is_watched_is_put_back() -> None:
    before = torch.autograd.grad
    with watch.watched():
        assert torch.autograd.grad is not before
    assert torch.autograd.grad is before


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_start_is_compared_with_one_that_computes_the_same(tmp_path: Any) -> None:
    def ours(scale: Any, folder: str) -> dict[str, Any]:
        return {**child.first_step(scale.job, Path(folder)), "wall": 1.0}

    def theirs(scale: Any, folder: str) -> dict[str, Any]:
        ids = scale.job.batch().inputs["input_ids"].tolist()
        rank = scale.job.rank
        asked = {"folder": folder, "rank": rank, "alpha": 2.0 * rank, "ids": ids}
        return {**plain.first_step(asked), "wall": 1.0}

    (row,) = start.start(TINY, HERE, launch={"flexp": ours, "peft": theirs})
    right({row.name: row})


def test_a_process_that_fails_is_told() -> None:
    with pytest.raises(FlexpError, match="no_such_module"):
        child.started("flexp.no_such_module", {})


# ---- the command


def test_a_name_that_is_not_there_is_refused_with_those_that_are(flexp: Command) -> None:
    code, _, error = flexp("bench", "rooflin")
    assert code == 2
    assert "roofline" in error
    assert all(name in error for name in book.BOOK)


def test_the_names_are_listed(flexp: Command) -> None:
    code, out, _ = flexp("bench", "--list", "--json")
    assert code == 0
    assert [row["name"] for row in json.loads(out)] == list(book.BOOK)
    assert "roofline" in flexp("bench", "--list")[1]


def test_a_benchmark_is_one_document(flexp: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(book.bench, "__defaults__", (TINY,))
    monkeypatch.setattr(machine, "measured", lambda rounds: HERE)
    code, out, said = flexp("bench", "activations", "--json")
    assert code == 0
    assert "activations: " in said
    rows = json.loads(out)["rows"]
    names = [f"activations.{what}" for what in ("bytes", "time", "half.bytes", "half.time")]
    assert [row["name"] for row in rows] == names
    assert all(row.keys() >= KEYS for row in rows)
    shown = flexp("bench", "activations")[1]
    assert "activations.bytes" in shown
    assert "≥ 16.0 ×" in shown


def test_a_job_is_told_with_what_it_is() -> None:
    assert job.TINY.job.told.endswith("2 x 8 tokens, AdamW")
