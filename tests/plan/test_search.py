"""The best plan of a fleet is the one that trying all of them finds."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexp.errors import PlanError
from flexp.plan import (
    Aims,
    BlockCosts,
    Choice,
    Device,
    Limits,
    Server,
    default_goal,
    near_bytes,
    plan,
)
from flexp.plan.options import Option, menu, trunk_bytes
from flexp.plan.planner import ROOM, SCALE, score
from flexp.plan.prices import Item, Shared
from flexp.plan.reasons import Problem
from flexp.plan.search import best
from flexp.plan.work import BlockWork

MB = 10**6


def tried(menus: Sequence[Sequence[Item]], shared: Shared) -> int | None:
    """The best objective by brute force."""
    found: int | None = None
    for picks in itertools.product(*menus):
        if shared.free is not None and sum(p.held for p in picks) > shared.free:
            continue
        seconds = max(*(p.seconds for p in picks), shared.seconds(sum(p.far for p in picks)))
        worth = sum(p.score for p in picks) - shared.cost(seconds)
        found = worth if found is None else max(found, worth)
    return found


def worth_of(menus: Sequence[Sequence[Item]], shared: Shared, chosen: Sequence[int]) -> int:
    picks = [items[n] for items, n in zip(menus, chosen, strict=True)]
    assert shared.free is None or sum(p.held for p in picks) <= shared.free
    seconds = max(*(p.seconds for p in picks), shared.seconds(sum(p.far for p in picks)))
    return sum(p.score for p in picks) - shared.cost(seconds)


@st.composite
def fleets(draw: st.DrawFn) -> tuple[list[list[Item]], Shared]:
    stream = random.Random(draw(st.integers(0, 10**9)))
    small = draw(st.booleans())  # few values: many ties
    top = 4 if small else 1000

    def item(n: int) -> Item:
        return Item(
            float(stream.randint(1, top)),
            stream.randint(0, top),
            stream.randint(0, top),
            stream.randint(-top, top),
            n,
        )

    clients, options = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    menus = [[item(n) for n in range(options)] for _ in range(clients)]
    if draw(st.booleans()):
        menus = [menus[0]] * clients  # everybody alike
    weight = draw(st.sampled_from([0, 1, 3]))
    free = draw(st.none() | st.integers(0, clients * top))
    speed = draw(st.sampled_from([0.3, 1.0, 5.0, 1e9]))
    return menus, Shared(speed, free, weight)


@settings(max_examples=400)
@given(fleets())
def test_no_choice_of_all_is_better(fleet: tuple[list[list[Item]], Shared]) -> None:
    menus, shared = fleet
    chosen = best(menus, shared)
    most = tried(menus, shared)
    if most is None:
        assert chosen is None
        return
    assert chosen is not None
    assert worth_of(menus, shared, chosen) == most


# ---- the whole planner

COSTS = BlockCosts(
    blocks=4,
    width=100,
    embed_bytes=8 * MB,
    block_bytes=(5 * MB,) * 4,
    head_bytes=MB,
    adapter_block_bytes=(MB // 10,) * 4,
    adapter_head_bytes=MB // 100,
    batch=4,
    length=100,
    itemsize=4,
)
WORK = BlockWork(0, (10**9,) * 4, (10**9,) * 4, 10**8, 10**8, 0)
PHONE = Device("phone", 24 * MB, 2e9, MB, 2 * MB, 0.1)
LAPTOP = Device("laptop", 60 * MB, 2e10, 5 * MB, 5 * MB, 0.02)
SERVER = Server(1e11)
POINTS = {0.25: 0.6, 0.5: 0.7, 1.0: 0.75}


def problem(
    devices: Mapping[str, Device], limits: Limits, server: Server, costs: BlockCosts = COSTS
) -> Problem:
    return Problem(costs, devices, limits, WORK, server, menu(costs, WORK, limits))


def objective(whole: Problem, aims: Aims, picks: Mapping[str, Option]) -> int | None:
    """What a plan is worth, written down from its definition; None if it does not fit."""
    slowest = max(whole.seconds(o, d) or 0.0 for d in whole.devices.values() for o in whole.options)
    total, times, far, held = 0, list[float](), 0, 0
    for client, option in picks.items():
        device = whole.devices[client]
        seconds = whole.seconds(option, device)
        assert seconds is not None
        assert option.load is not None
        if option.bytes > device.memory:
            return None
        total += score(whole, aims, option, seconds / slowest, option.bytes / device.memory)
        times.append(seconds)
        far += option.load.far_flops
        held += option.server_bytes
    free = whole.server.memory
    if free is not None and held + trunk_bytes(whole.costs, whole.limits) > free:
        return None
    assert whole.server.flops is not None
    round_ = max(*times, far / whole.server.flops)
    return total - round(SCALE * len(picks) * aims.time / 2 / slowest * round_) * ROOM


def picked(whole: Problem, chosen: Mapping[str, Choice]) -> dict[str, Option]:
    table = {(*o.cut, o.accumulate, o.recompute): o for o in whole.options}
    return {n: table[c.front, c.back, c.accumulate, c.recompute] for n, c in chosen.items()}


def made(whole: Problem, aims: Aims) -> dict[str, Choice]:
    return plan(
        whole.costs,
        whole.devices,
        whole.limits,
        "optimized",
        work=whole.work,
        server=whole.server,
        aims=aims,
    )


@settings(max_examples=25)
@given(
    st.sampled_from([2, 3]),
    st.integers(14, 40),
    st.integers(14, 60),
    st.sampled_from([2e8, 2e9, 5e10]),
    st.sampled_from([1e9, 1e10, 1e12]),
    st.sampled_from([None, 21, 24, 30]),
    st.sampled_from([Aims(), Aims(measured=POINTS), Aims(1, 3, 0, POINTS), Aims(0, 0, 1)]),
)
def test_a_fleets_plan_is_the_best_of_all(
    clients: int,
    small: int,
    large: int,
    flops: float,
    server: float,
    memory: int | None,
    aims: Aims,
) -> None:
    costs = replace(COSTS, batch=2 if clients == 2 else 1)
    limits = Limits(max_depth=3, min_back=1 if clients == 3 else 0)
    devices = {
        f"c{n}": replace(PHONE, flops=flops, memory=(small if n else large) * MB)
        for n in range(clients)
    }
    free = None if memory is None else memory * MB
    whole = problem(devices, limits, Server(server, free), costs)
    every = (
        objective(whole, aims, dict(zip(devices, picks, strict=True)))
        for picks in itertools.product(whole.options, repeat=clients)
    )
    most = max((worth for worth in every if worth is not None), default=None)
    if most is None:
        with pytest.raises(PlanError, match="are missing"):
            made(whole, aims)
        return
    chosen = made(whole, aims)
    assert objective(whole, aims, picked(whole, chosen)) == most


@settings(max_examples=30)
@given(st.integers(14, 60), st.integers(0, 40), st.sampled_from([2e8, 2e9]))
def test_more_memory_never_makes_a_plan_worse(least: int, more: int, flops: float) -> None:
    aims = Aims(measured=POINTS)

    def worth(memory: int) -> int | None:
        devices = {"a": replace(PHONE, memory=memory * MB, flops=flops), "b": LAPTOP}
        whole = problem(devices, Limits(), SERVER)
        try:
            return objective(whole, aims, picked(whole, made(whole, aims)))
        except PlanError:
            return None

    few, many = worth(least), worth(least + more)
    assert few is None or (many is not None and many >= few)


def test_the_order_of_devices_does_not_matter() -> None:
    devices = {"a": PHONE, "b": LAPTOP, "c": PHONE}
    turned = dict(reversed(devices.items()))
    aims = Aims(measured=POINTS)
    one = made(problem(devices, Limits(), SERVER), aims)
    assert made(problem(turned, Limits(), SERVER), aims) == one
    assert list(one) == ["a", "b", "c"]


def test_a_slow_server_sends_blocks_to_the_clients() -> None:
    devices = {"a": LAPTOP, "b": LAPTOP}

    def depths(server: float) -> list[int]:
        chosen = made(problem(devices, Limits(), Server(server)), Aims(memory=0))
        return [c.front + c.back for c in chosen.values()]

    assert depths(1e15) == [1, 1]
    assert depths(1e9) == [4, 4]


def test_a_full_server_is_told_what_is_missing() -> None:
    devices = {"a": replace(PHONE, memory=16 * MB), "b": replace(PHONE, memory=16 * MB)}
    with pytest.raises(PlanError) as caught:
        made(problem(devices, Limits(), Server(1e11, 20 * MB)), Aims())
    message = str(caught.value)
    assert message.startswith("The server has 20 MB (20000000 bytes), but its blocks and 2 clients")
    assert "are missing. Give plan.server more memory" in message


def test_reasons_say_what_limits_a_device() -> None:
    full = Aims(1, 0, 0, {0.0: 0.0, 1.0: 1.0})  # as many blocks as fit
    quick = Aims(0, 1, 0)

    def reason(device: Device, aims: Aims, limits: Limits = Limits()) -> str:  # noqa: B008 frozen
        return made(problem({"a": device}, limits, Server(1e15)), aims)["a"].reason

    assert "memory is the limit, one more needs" in reason(PHONE, full)
    alone = "the whole model, so it learns from others only by a method that uploads"
    assert reason(LAPTOP, full).endswith(f"{alone}; no more are allowed")
    assert alone not in reason(LAPTOP, full, Limits(form="logits"))
    text = reason(replace(LAPTOP, flops=1e8), quick)
    assert text.startswith("1 of 4 blocks, ")
    assert "no fewer are allowed; more would fit, but a step would take " in text
    deeper = reason(replace(LAPTOP, flops=1e8), quick, Limits(min_front=2))
    assert deeper.startswith("2 of 4 blocks, ")
    least = near_bytes(COSTS, 1, 0, accumulate=4)["total"]
    assert "1 of 4 rows at a time" in reason(replace(PHONE, memory=least), quick)


def test_what_is_chosen_has_its_seconds_and_bytes() -> None:
    whole = problem({"a": PHONE, "b": LAPTOP}, Limits(), SERVER)
    chosen = made(whole, Aims(measured=POINTS))
    for client, option in picked(whole, chosen).items():
        assert chosen[client].bytes == option.bytes
        assert chosen[client].seconds == whole.seconds(option, whole.devices[client])
    assert plan(COSTS, {"a": replace(PHONE, flops=None)}, Limits())["a"].seconds is None


@pytest.mark.parametrize(
    ("device", "server", "message"),
    [
        (replace(PHONE, flops=None), SERVER, 'speed of the device "phone" is not known'),
        (replace(PHONE, uplink=None), SERVER, 'speed of the device "phone" is not known'),
        (PHONE, Server(), r"speed of the server is not known\. Declare gflops there"),
    ],
)
def test_a_speed_that_is_missing_is_named(device: Device, server: Server, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        made(problem({"a": device}, Limits(), server), Aims())
    assert default_goal({"a": device}, server) == "memory_only"


def test_the_goal_without_one_asked_for() -> None:
    assert default_goal({"a": PHONE, "b": LAPTOP}, SERVER) == "optimized"
    with pytest.raises(PlanError, match="needs the work of blocks"):
        plan(COSTS, {"a": PHONE}, Limits(), "optimized", server=SERVER)


def test_a_device_that_is_too_small_is_told_for_the_least_that_would_do() -> None:
    for goal in ("optimized", "memory_only", "random"):
        with pytest.raises(PlanError) as caught:
            plan(
                COSTS,
                {"a": replace(PHONE, memory=2 * MB), "b": LAPTOP},
                Limits(),
                goal,
                work=WORK,
                server=SERVER,
            )
        message = str(caught.value)
        assert 'Client "a" on "phone" has 2 MB' in message
        assert "bytes, 1 of 4 rows at a time" in message
        assert 'the smallest that would do is "laptop"' in message


def test_a_batch_is_divided_only_where_nothing_fits_whole() -> None:
    least = {k: near_bytes(COSTS, 1, 0, accumulate=k)["total"] for k in (1, 2)}
    assert least[2] < least[1]
    for parts, size in least.items():
        chosen = plan(COSTS, {"a": replace(PHONE, memory=size)}, Limits())["a"]
        assert (chosen.front, chosen.back, chosen.bytes) == (1, 0, size)
        assert (chosen.accumulate, chosen.recompute) == (parts, 0)
        assert ("2 of 4 rows at a time" in chosen.reason) == (parts == 2)


# ---- aims


def test_accuracy_is_the_least_concave_curve_over_the_points() -> None:
    aims = Aims(measured={0.2: 0.5, 0.4: 0.52, 0.6: 0.7, 1.0: 0.72})
    curve: Callable[[float], float] = aims.accuracy_at
    assert curve(0.2) == curve(0.0) == 0.5
    assert curve(0.4) == pytest.approx(0.6)  # the dent is bridged
    assert curve(0.8) == pytest.approx(0.71)
    assert curve(1.0) == 0.72
    steps = [curve((n + 1) / 20) - curve(n / 20) for n in range(4, 20)]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(steps))
    assert Aims().accuracy_at(0.5) == 0
    assert Aims(measured={0.3: 0.4}).accuracy_at(0.9) == 0.4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Aims(time=-1), r"plan\.weights\.time is -1"),
        (lambda: Aims(memory=float("nan")), r"plan\.weights\.memory is nan"),
        (lambda: Aims(measured={20: 0.5}), r"plan\.accuracy has 20: 0\.5\. Both are fractions"),
        (lambda: Aims(measured={0.2: 61}), r"plan\.accuracy has 0\.2: 61"),
    ],
)
def test_aims_that_make_no_sense_are_refused(make: Callable[[], Aims], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make()
