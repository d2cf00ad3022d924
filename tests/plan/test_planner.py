"""A plan is the best one within its limits, and a device that is too small is told so."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexp.errors import PlanError
from flexp.plan import BlockCosts, Choice, Device, Goal, Limits, near_bytes, plan

MB = 10**6
# Without activations to speak of: 200 MB, and 50 MB per block, and 2 bytes.
COSTS = BlockCosts(
    blocks=6,
    width=1,
    embed_bytes=150 * MB,
    block_bytes=(50 * MB,) * 6,
    head_bytes=50 * MB,
    adapter_block_bytes=(0,) * 6,
    adapter_head_bytes=0,
    batch=1,
    length=1,
    itemsize=1,
)


def phone(memory: int, name: str = "phone") -> Device:
    return Device(name, memory)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_as_many_blocks_as_fit_a_third_of_them_behind() -> None:
    devices = {"b": phone(460 * MB), "a": phone(900 * MB), "c": phone(250 * MB + 2)}
    chosen = plan(COSTS, devices, Limits())
    whole = "the whole model, so it learns from others only by a method that uploads"
    assert chosen == {
        "b": Choice(4, 1, 450 * MB + 2, "5 of 6 blocks fit into 460 MB (needs 450 MB)"),
        "a": Choice(4, 2, 500 * MB, f"6 of 6 blocks fit into 900 MB (needs 500 MB); {whole}"),
        "c": Choice(1, 0, 250 * MB + 2, "1 of 6 blocks fit into 250 MB (needs 250 MB)"),
    }
    assert list(chosen) == ["b", "a", "c"]


def test_a_lopsided_model_is_cut_where_the_small_blocks_are() -> None:
    # The third of four blocks is huge, so (3, 1) and (2, 2) would both need it: (2, 1) is best.
    costs = replace(COSTS, blocks=4, block_bytes=(1, 1, 900 * MB, 1), adapter_block_bytes=(0,) * 4)
    chosen = plan(costs, {"a": phone(300 * MB)}, Limits())["a"]
    assert (chosen.front, chosen.back) == (2, 1)
    costs = replace(costs, block_bytes=(1, 900 * MB, 1, 1))
    chosen = plan(costs, {"a": phone(300 * MB)}, Limits())["a"]
    assert (chosen.front, chosen.back) == (1, 2)


@st.composite
def problems(draw: st.DrawFn) -> tuple[BlockCosts, Limits, int]:
    blocks = draw(st.integers(1, 6))
    sizes = st.lists(st.integers(0, 50), min_size=blocks, max_size=blocks).map(tuple)
    costs = BlockCosts(
        blocks=blocks,
        width=2,
        embed_bytes=MB + draw(st.integers(0, 50)),
        block_bytes=draw(sizes),
        head_bytes=draw(st.integers(0, 50)),
        adapter_block_bytes=draw(sizes),
        adapter_head_bytes=draw(st.integers(0, 50)),
        batch=1,
        length=1,
        itemsize=1,
    )
    head_near = draw(st.booleans())
    limits = Limits(
        min_front=draw(st.integers(0, 2)),
        max_depth=draw(st.none() | st.integers(0, blocks)),
        min_back=draw(st.integers(0, 2)) if head_near else 0,
        form="u" if head_near else "logits",
    )
    return costs, limits, MB + draw(st.integers(1, 1000))


def legal(costs: BlockCosts, limits: Limits) -> list[tuple[int, int]]:
    depth = costs.blocks if limits.max_depth is None else limits.max_depth
    return [
        (a, b)
        for a in range(limits.min_front, depth + 1)
        for b in range(limits.min_back, depth - a + 1)
        if limits.head_near or b == 0
    ]


def needed(costs: BlockCosts, limits: Limits, cut: tuple[int, int], *, quarters: int = 0) -> int:
    again = again_of(cut, quarters)
    return near_bytes(costs, *cut, head_near=limits.head_near, recompute=again)["total"]


def again_of(cut: tuple[int, int], quarters: int) -> int:
    return math.ceil(sum(cut) * quarters / 4)


@settings(deadline=None)
@given(problems(), st.sampled_from(["memory_only", "random"]))
def test_a_plan_fits_and_no_deeper_cut_does(
    problem: tuple[BlockCosts, Limits, int], goal: Goal
) -> None:
    costs, limits, memory = problem
    cuts = legal(costs, limits)
    smallest = (limits.min_front, limits.min_back)
    # A batch of one row has no parts, so ways to train differ in what runs twice.
    ways = range(5) if cuts else ()
    how = [q for q in ways if needed(costs, limits, smallest, quarters=q) <= memory]
    try:
        chosen = plan(costs, {"a": phone(memory)}, limits, goal, generator())["a"]
    except PlanError:
        assert not how
        return
    cut = (chosen.front, chosen.back)
    assert chosen.recompute == again_of(cut, how[0])
    assert cut in cuts
    assert chosen.bytes == needed(costs, limits, cut, quarters=how[0]) <= memory
    if goal == "memory_only":
        fitting = [c for c in cuts if needed(costs, limits, c, quarters=how[0]) <= memory]
        assert sum(cut) == max(sum(c) for c in fitting)
        ideal = sum(cut) // 3
        assert all(abs(cut[1] - ideal) <= abs(c[1] - ideal) for c in fitting if sum(c) == sum(cut))


def test_limits_are_kept() -> None:
    devices = {"a": phone(900 * MB)}

    def cut(limits: Limits) -> tuple[int, int]:
        chosen = plan(COSTS, devices, limits)["a"]
        return chosen.front, chosen.back

    assert cut(Limits(max_depth=3)) == (2, 1)
    assert cut(Limits(min_front=5)) == (5, 1)
    assert cut(Limits(min_back=4)) == (2, 4)
    assert cut(Limits(form="logits")) == (6, 0)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(max_depth=9), "plan.max_depth is 9, but the model has 6 blocks. Set it to 6"),
        (Limits(min_front=4, min_back=3), "No cut has a front of at least 4"),
        (Limits(min_front=2, max_depth=1), "at most 1 blocks"),
        (Limits(min_front=-1), "front of at least -1"),
        (Limits(min_back=1, form="loss"), "plan.min_back is 1, but with shared labels"),
    ],
)
def test_limits_that_contradict_are_named(limits: Limits, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan(COSTS, {"a": phone(900 * MB)}, limits)


def test_a_device_that_is_too_small_is_named_with_one_that_would_do() -> None:
    devices = {
        "c0": phone(900 * MB, "laptop"),
        "c1": phone(100 * MB, "old phone"),
        "c2": phone(260 * MB, "tablet"),
    }
    with pytest.raises(PlanError) as caught:
        plan(COSTS, devices, Limits())
    message = str(caught.value)
    assert 'Client "c1" on "old phone" has 100 MB (100000000 bytes)' in message
    assert "need 250 MB (250000002 bytes): 150 MB are missing" in message
    assert 'the smallest that would do is "tablet"' in message
    with pytest.raises(
        PlanError, match=r"150 MB are missing\. A device with 250000002 bytes would do\. Or"
    ):
        plan(COSTS, {"c1": devices["c1"]}, Limits())


def test_a_static_plan_gives_all_the_same_cut_if_all_can_hold_it() -> None:
    devices = {"a": phone(900 * MB), "b": phone(400 * MB)}
    chosen = plan(COSTS, devices, Limits(static=(2, 1)), "static")
    assert {(c.front, c.back) for c in chosen.values()} == {(2, 1)}
    assert chosen["b"].reason == (
        "3 of 6 blocks fit into 400 MB (needs 350 MB); the same cut for every client"
    )
    with pytest.raises(PlanError, match=r'Client "b".*front of 4 and a back of 2'):
        plan(COSTS, devices, Limits(static=(4, 2)), "static")
    with pytest.raises(PlanError, match=r"plan.static is \(5, 2\)"):
        plan(COSTS, devices, Limits(static=(5, 2)), "static")


def test_a_random_plan_is_repeatable_and_takes_every_cut_that_fits() -> None:
    devices = {f"c{i}": phone(360 * MB) for i in range(200)}
    chosen = plan(COSTS, devices, Limits(), "random", generator())
    turned = plan(COSTS, dict(reversed(devices.items())), Limits(), "random", generator())
    assert chosen == turned
    assert chosen != plan(COSTS, devices, Limits(), "random", generator(1))
    cuts = {(c.front, c.back) for c in chosen.values()}
    assert cuts == {(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (3, 0)}
    assert chosen["c0"].reason.endswith("drawn from 6 cuts that fit")
    with pytest.raises(PlanError, match="generator"):
        plan(COSTS, devices, Limits(), "random")
