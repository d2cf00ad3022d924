"""Targets 7 and 8: plans of cuts, and what is made of many clients' adapters."""

from __future__ import annotations

import math

import torch
from fuzz.draws import Draws

from flexp.errors import AdapterError, CutError, PlanError
from flexp.plan import Aims, BlockCosts, Device, Goal, Limits, Server, plan
from flexp.plan.costs import near_bytes
from flexp.plan.options import fitting, menu, trunk_bytes
from flexp.plan.work import BlockWork
from flexp.products import lora_pairs, stack
from flexp.selection import Place
from flexp.strategies.splitfed_v2 import Fronts, SplitFedV2
from flexp.tensors import Tensors, Term, agreed_mean, finite, lerp, mean, mean_by_name, mixed

MB = 10**6
GOALS: tuple[Goal, ...] = ("optimized", "memory_only", "static", "random")

# ---- 7: plans


def run_planner(data: bytes) -> None:
    """Each block once, within limits and memory; refused only where there is no plan."""
    draws = Draws(data)
    depth = draws.whole(1, 6)
    costs = BlockCosts(
        blocks=depth,
        width=draws.whole(1, 64),
        embed_bytes=draws.whole(0, 50) * MB,
        block_bytes=tuple(draws.whole(0, 60) * MB for _ in range(depth)),
        head_bytes=draws.whole(0, 50) * MB,
        adapter_block_bytes=tuple(draws.whole(0, 3) * MB for _ in range(depth)),
        adapter_head_bytes=draws.whole(0, 1) * MB,
        batch=draws.choose((1, 2, 3, 4, 8)),
        length=draws.whole(1, 9),
        itemsize=draws.choose((2, 4)),
    )
    limits = Limits(
        min_front=draws.whole(-1, 4),
        max_depth=draws.choose((None, 0, 1, 2, 4, 6, 9)),
        min_back=draws.whole(-1, 3),
        static=(draws.whole(0, 4), draws.whole(0, 3)),
        form=draws.choose(("u", "logits", "loss")),
    )
    devices = {f"c{n}": _device(draws, n) for n in range(draws.whole(1, 4))}
    work = BlockWork(
        draws.whole(0, 9) * MB,
        tuple(draws.whole(0, 9) * MB for _ in range(depth)),
        tuple(draws.whole(0, 9) * MB for _ in range(depth)),
        *(MB, MB, draws.whole(-1, depth)),
    )
    server = Server(
        memory=draws.choose((None, 20 * MB, 500 * MB)), flops=draws.choose((None, 1e9, 1e30))
    )
    goal = draws.choose(GOALS)
    stream = torch.Generator().manual_seed(draws.whole(0, 255))
    known = work if draws.whole(0, 3) else None
    aims = Aims(draws.choose((0.0, 1.0)), draws.choose((0.0, 1.0, 1e12)), draws.choose((0.0, 0.1)))
    try:
        made = plan(costs, devices, limits, goal, stream, work=known, server=server, aims=aims)
    except (PlanError, CutError) as problem:
        assert str(problem)
        if goal == "memory_only":
            assert not _possible(costs, devices, limits), f"there is a plan, but: {problem}"
        return
    assert list(made) == list(devices)
    whole = set(range(depth))
    for client, choice in made.items():
        front, back = range(choice.front), range(depth - choice.back, depth)
        trunk = range(choice.front, depth - choice.back)
        assert sorted([*front, *trunk, *back]) == sorted(whole), "a block twice, or not at all"
        assert choice.front >= limits.min_front
        assert choice.back >= limits.min_back
        assert choice.front + choice.back <= limits.deepest(depth)
        assert limits.head_near or not choice.back
        assert goal != "static" or (choice.front, choice.back) == limits.static
        assert costs.batch % choice.accumulate == 0
        held = near_bytes(
            costs,
            *(choice.front, choice.back),
            head_near=limits.head_near,
            recompute=choice.recompute,
            accumulate=choice.accumulate,
        )
        assert choice.bytes == held["total"] <= devices[client].memory
        assert choice.seconds is None or math.isfinite(choice.seconds)
        assert choice.reason
    if goal == "optimized" and server.memory is not None:
        far = sum(
            o.server_bytes
            for c in made.values()
            for o in menu(costs, work, limits)
            if (o.cut, o.accumulate, o.recompute) == ((c.front, c.back), c.accumulate, c.recompute)
        )
        assert far + trunk_bytes(costs, limits) <= server.memory


def _device(draws: Draws, n: int) -> Device:
    speeds = (None, 1e-3, 1e6, 1e12)
    return Device(
        f"d{n}",
        draws.whole(1, 500) * MB,
        draws.choose(speeds),
        draws.choose(speeds),
        draws.choose(speeds),
        draws.choose((0.0, 0.1, 1e9)),
    )


def _possible(costs: BlockCosts, devices: dict[str, Device], limits: Limits) -> bool:
    try:
        options = menu(costs, None, limits)
    except PlanError:
        return False
    return all(fitting(options, device.memory) for device in devices.values())


# ---- 8: what is made of many

VALUES = (0.0, -0.0, 1.0, -1.0, 1e38, -1e38, 1e-45, -1e-45, 1e-38)
WEIGHTS = (0.0, 1.0, 3.0, 5e-324, 1e-310, 1e308, 1.7e308, 1e300)
REFUSED = (math.nan, math.inf, -1.0, -0.5)


def run_aggregation(data: bytes) -> None:
    """Finite, between the least and the most, whatever the order; odd weights are refused."""
    draws = Draws(data)
    shapes = {"a": (2,), "b": (1, 2), "c": ()}
    count = draws.whole(1, 4)
    items = [{k: _tensor(draws, s) for k, s in shapes.items()} for _ in range(count)]
    odd = draws.whole(0, 9) == 9
    weights = [
        draws.choose(REFUSED) if odd and not n else draws.number(WEIGHTS) for n in range(count)
    ]
    try:
        found = mean(items, weights)
    except AdapterError:
        bad = any(not (math.isfinite(w) and w >= 0) for w in weights) or not any(weights)
        assert bad, f"refused weights {weights}"
        return
    assert all(math.isfinite(w) and w >= 0 for w in weights), f"took weights {weights}"
    _between(found, items, weights)
    turned = draws.whole(0, count - 1)
    again = mean(items[turned:] + items[:turned], weights[turned:] + weights[:turned])
    _close(found, again, items)
    _close(found, mean_by_name(items, weights), items)
    fronts = Fronts(items[0], arrived={str(n): v for n, v in enumerate(items)},
        rows={str(n): w for n, w in enumerate(weights)})  # fmt: skip
    _close(found, SplitFedV2().averaged(fronts).common, items)
    _some_names(draws, items, weights)
    _agreed(draws, items, weights, {k: _tensor(draws, s) for k, s in shapes.items()})
    share = draws.choose((0.0, 0.25, 0.5, 1.0))
    _between(lerp(items[0], items[-1], share), [items[0], items[-1]], [1.0, 1.0])
    _mix(items, share)
    _stacked(draws)


def _tensor(draws: Draws, shape: tuple[int, ...]) -> torch.Tensor:
    flat = [draws.number(VALUES) for _ in range(math.prod(shape))]
    return torch.tensor(flat, dtype=torch.float32).reshape(shape)


def _between(found: Tensors, items: list[Tensors], weights: list[float]) -> None:
    assert finite(found), "a mean of finite numbers is not finite"
    for name, value in found.items():
        held = torch.stack([i[name] for i, w in zip(items, weights, strict=True) if w]).double()
        slack = 1e-5 * held.abs().amax(0) + 1e-44
        assert bool((value >= held.amin(0) - slack).all()), f"{name} is below all"
        assert bool((value <= held.amax(0) + slack).all()), f"{name} is above all"


def _close(one: Tensors, other: Tensors, items: list[Tensors]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        most = torch.stack([i[name] for i in items]).double().abs().amax(0)
        gap = (value.double() - other[name].double()).abs()
        assert bool((gap <= 1e-5 * most + 1e-44).all()), f"{name} depends on the order"


def _some_names(draws: Draws, items: list[Tensors], weights: list[float]) -> None:
    """Each client has only some tensors, as with cuts of several depths."""
    held = [{k: v for k, v in item.items() if draws.whole(0, 1)} for item in items]
    found = mean_by_name(held, weights)
    pairs = list(zip(held, weights, strict=True))
    wanted = {k for item, w in pairs if w for k in item}
    assert found.keys() == wanted, "a tensor that nobody with rows has"
    for name in wanted:
        mine = [({name: i[name]}, w) for i, w in pairs if name in i]
        _between({name: found[name]}, [i for i, _ in mine], [w for _, w in mine])


def _agreed(draws: Draws, items: list[Tensors], weights: list[float], base: Tensors) -> None:
    some = {k: v for k, v in base.items() if draws.whole(0, 2)}
    small = [{k: v.clamp(-1e37, 1e37) for k, v in item.items()} for item in items]
    merged = agreed_mean(small, weights, {k: v.clamp(-1e37, 1e37) for k, v in some.items()})
    assert merged.keys() == small[0].keys()
    assert finite(merged), "a merge without conflicts of finite numbers is not finite"
    same = agreed_mean([small[0], small[0]], [1.0, 1.0], {})
    _close(same, small[0], small)


def _mix(items: list[Tensors], share: float) -> None:
    slots = {"x": items[0], "y": items[-1]}
    place = Place("far", "trunk", 0, 1)
    found = mixed((Term("x", 1 - share), Term("y", share)), slots, lambda name: place)
    _between(found, [items[0], items[-1]], [1.0, 1.0])


def _stacked(draws: Draws) -> None:
    pairs = [
        (torch.tensor([[draws.number((0.0, 1.0), below=1e3)] * 3]), torch.ones(2, 1))
        for _ in range(2)
    ]
    a, b = stack(pairs, [0.25, 0.75])
    wanted = 0.25 * pairs[0][1] @ pairs[0][0] + 0.75 * pairs[1][1] @ pairs[1][0]
    assert torch.allclose(b @ a, wanted, rtol=1e-4, atol=1e-4)
    assert lora_pairs(["x.lora_A.w", "x.lora_B.w", "y.lora_A.w"]) == {
        "x": ("x.lora_A.w", "x.lora_B.w")
    }


def cases() -> list[bytes]:
    """Something to begin with: any bytes are a case."""
    found = [bytes((n * k) % 256 for k in range(90)) for n in (1, 3, 7, 31, 101)]
    return [*found, b"", bytes(120), b"\xff" * 120]
