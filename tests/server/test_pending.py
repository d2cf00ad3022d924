"""Forwards that wait: their graphs may go, and nothing of what comes of them changes."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator
from dataclasses import replace
from math import nan

import pytest
import torch
from fixtures_clock import Clock
from server.test_trunk import DOUBLE, U, V, Wire, served
from torch import Tensor
from toys import same

from flexp.dice import Dice
from flexp.errors import StepError
from flexp.link.messages import Do, Forward
from flexp.model.cut import Seat
from flexp.model.ops import Grad, SlotSpec
from flexp.server.pending import Waiting
from flexp.server.trunk import Trunk
from flexp.tensors import Tensors, Term


@pytest.fixture
def three(clock: Clock) -> Iterator[tuple[Trunk, list[Wire]]]:
    """Three clients whose graphs are measured; time is the test's."""
    trunk, wires = served(U, U, U)
    trunk.pending.clock, trunk.pending.budget, trunk.pending.patience = clock, 1 << 40, 30.0
    for wire in wires:
        wire.join()
    yield trunk, wires
    trunk.close()


def there(trunk: Trunk) -> list[str]:
    """Whose graphs are in memory."""
    held = trunk.pending.held
    return [c for c, mine in held.items() if any(p.graph is not None for p in mine.values())]


def taught(seat: Seat, *, lost: bool, rate: float) -> tuple[Tensors, Tensors]:
    """What one step gives, with or without its graph in between; slots move meanwhile."""
    trunk, (wire,) = served(seat)
    trunk.compute.dropout = rate
    trunk.tenants.join(wire.client, seat, {"personal": SlotSpec(), "other": SlotSpec()})
    trunk.pending.budget = 0 if lost else None
    try:
        wire.join()
        mix = (Term("personal", nan), Term("other", 0.3))
        coefs = (torch.full((6,), 0.7),)
        ahead = wire.forward(wear=mix, coefs=coefs, dropout=Dice(5)("dropout") if rate else None)
        out = next(iter(wire.send(ahead).tensors.values()))
        assert there(trunk) == ([] if lost else [wire.client])
        wire.send(Do(wire.key("do"), (DOUBLE,)))
        back = wire.send(wire.backward(ahead, torch.full_like(out, 0.25))).tensors
        wire.send(Do(wire.key("do"), (Grad(("personal", "other"), ("g", "h")),)))
        return {"out": out, **back}, wire.held("g") | {
            f"h {k}": v for k, v in wire.held("h").items()
        }
    finally:
        trunk.close()


@pytest.mark.parametrize("rate", [0.0, 0.2])
@pytest.mark.parametrize("seat", [U, V], ids=["hidden", "loss"])
def test_a_backward_without_its_graph_gives_the_same_bits(seat: Seat, rate: float) -> None:
    kept, again = taught(seat, lost=False, rate=rate), taught(seat, lost=True, rate=rate)
    assert any(bool(v.any()) for v in kept[1].values())
    assert "coef/0" in kept[0]
    assert same(kept[0], again[0])
    assert same(kept[1], again[1])


def test_over_the_budget_the_oldest_graphs_go(
    three: tuple[Trunk, list[Wire]], clock: Clock
) -> None:
    trunk, wires = three
    wires[0].send(wires[0].forward(keep=True))
    one = trunk.pending.bytes()
    trunk.pending.budget = 2 * one
    for at, wire in enumerate(wires[1:]):
        clock.now = 1.0 + at
        wire.send(wire.forward())
    assert there(trunk) == ["c1", "c2"]
    assert trunk.pending.bytes() == 2 * one


def test_a_graph_larger_than_the_budget_does_not_stay(three: tuple[Trunk, list[Wire]]) -> None:
    trunk, wires = three
    trunk.pending.budget = 1
    ahead = wires[0].forward()
    out = wires[0].send(ahead).tensors["hidden"]
    assert trunk.pending.bytes() == 0
    assert "grad" in wires[0].send(wires[0].backward(ahead, torch.ones_like(out))).tensors


def test_a_graph_is_measured_once_and_is_more_than_its_result(
    three: tuple[Trunk, list[Wire]],
) -> None:
    trunk, wires = three
    out: Tensor = wires[0].send(wires[0].forward()).tensors["hidden"]
    assert len(trunk.pending.sizes) == 1
    (kept,) = trunk.pending.held["c0"].values()
    size, blocks = kept.bytes, U.cut.back + 1
    assert blocks * out.nbytes < size < 100 * blocks * out.nbytes
    trunk.pending.sizes = dict.fromkeys(trunk.pending.sizes, 77)
    ahead = wires[1].forward()
    wires[1].send(ahead)
    (kept,) = trunk.pending.held["c1"].values()
    assert kept.bytes == 77 * ahead.hidden.shape[0] * ahead.hidden.shape[1]


def test_of_who_does_not_come_back_no_graph_stays(
    three: tuple[Trunk, list[Wire]], clock: Clock
) -> None:
    """It is freed, not only forgotten; and who comes back later than that gets its answer."""
    trunk, wires = three
    ahead: list[Forward] = []
    for at, wire in enumerate(wires):
        clock.now = 10.0 * at
        ahead.append(wire.forward())
        wire.send(ahead[-1])
    graph = next(iter(trunk.pending.held["c0"].values())).graph
    assert graph is not None
    held = weakref.ref(graph.out)
    del graph
    clock.now = 30.0
    assert trunk.pending.sweep() == 0
    clock.now = 30.1
    assert trunk.pending.sweep() == 1
    assert there(trunk) == ["c1", "c2"]
    gc.collect()
    assert held() is None
    late = wires[0].send(wires[0].backward(ahead[0], torch.ones_like(ahead[0].hidden)))
    early = wires[1].send(wires[1].backward(ahead[1], torch.ones_like(ahead[1].hidden)))
    assert torch.equal(late.tensors["grad"], early.tensors["grad"])
    assert not trunk.pending.held["c0"]


def test_without_bounds_all_stay_and_nothing_is_measured(clock: Clock) -> None:
    trunk, (wire,) = served(U)
    trunk.pending.clock = clock
    wire.join()
    wire.send(wire.forward())
    clock.now = 1e9
    assert trunk.pending.sweep() == 0
    assert there(trunk) == ["c0"]
    assert not trunk.pending.sizes
    trunk.close()


def test_as_many_tokens_fit_as_graphs_of_the_dearest_need() -> None:
    trunk, (wire,) = served(U)
    wire.join()
    assert trunk.pending.room == math.inf
    trunk.pending.budget = 1 << 20
    assert trunk.pending.room == math.inf  # nothing was measured yet
    ahead = wire.forward()
    wire.send(ahead)
    (kept,) = trunk.pending.held["c0"].values()
    tokens = ahead.hidden.shape[0] * ahead.hidden.shape[1]
    assert kept.bytes > tokens
    assert trunk.pending.room == pytest.approx((1 << 20) / kept.bytes * tokens)
    trunk.close()


def test_a_wrong_backward_costs_the_right_one_nothing(three: tuple[Trunk, list[Wire]]) -> None:
    trunk, wires = three
    trunk.pending.budget = 0
    ahead = wires[0].forward()
    out = wires[0].send(ahead).tensors["hidden"]
    with pytest.raises(StepError, match="no forward that waits"):
        wires[0].send(wires[0].backward(replace(ahead, key=wires[0].key("forward")), out))
    assert "grad" in wires[0].send(wires[0].backward(ahead, torch.ones_like(out))).tensors


def test_what_is_known_of_shapes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexp.server.pending.SIZES", 3)
    waiting = Waiting(budget=1 << 40)
    trunk, (wire,) = served(U)
    trunk.pending = waiting
    wire.join()
    for length in range(2, 9):
        hidden = wire.forward().hidden[:, :1].expand(-1, length, -1).contiguous()
        rows = len(hidden)
        wire.send(
            wire.forward(
                hidden=hidden,
                shapes={"input_ids": (rows, length)},
                mask=torch.ones(rows, length, dtype=torch.long),
            )
        )
    assert len(waiting.sizes) <= 3
    trunk.close()
