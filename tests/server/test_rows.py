"""Rows that a server keeps for a turn: named instead of sent, and asked for when they are gone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import same
from wires import DOUBLE, U, Wire, served

from flexp.errors import LinkError
from flexp.link.frame import decode, encode
from flexp.link.messages import Do, Forward, Leave
from flexp.model.ops import Grad
from flexp.tensors import Tensors


@pytest.fixture
def wire() -> Iterator[Wire]:
    trunk, wires = served(U)
    trunk.pending.rows.each = 1 << 20
    wires[0].join()
    yield wires[0]
    trunk.close()


def numbered(wire: Wire, *rows: int, step: int = 0, **changes: Any) -> Forward:
    """A forward whose rows have these numbers; on board is what is not only named."""
    whole = wire.forward(step)
    here = [k for k, n in enumerate(rows) if n >= 0]
    changes = {"hidden": whole.hidden[here], "wants": False, "rows": rows, **changes}
    return replace(whole, **changes)


def out(wire: Wire, message: Forward) -> Tensor:
    return wire.send(message).tensors["hidden"]


@pytest.mark.parametrize("rows", [(-1, -2, -3), (-1, 0, -3), (7, -2, 7)])
def test_a_row_that_is_named_is_the_one_that_came(wire: Wire, rows: tuple[int, ...]) -> None:
    real = wire.batch.inputs["attention_mask"].bool()
    whole = out(wire, numbered(wire, 1, 2, 3))
    assert wire.trunk.pending.rows.bytes() == int(real.sum()) * 32 * 4  # without padding
    message = numbered(wire, *rows, step=1)
    assert len(message.hidden) < 3
    sent = decode(bytearray(encode(1, message))).body
    assert isinstance(sent, Forward)
    assert torch.equal(out(wire, sent)[real], whole[real])


def test_what_is_gone_is_asked_for_and_operations_are_done_once(wire: Wire) -> None:
    before = wire.held()
    out(wire, numbered(wire, 1, 2, 3))
    wire.trunk.pending.rows.held["c0"].pop(2)
    message = numbered(wire, -1, -2, -3, step=1, ops=(DOUBLE,))
    first, again = wire.send(message, "d"), wire.send(message, "d")
    assert first.facts == again.facts == {"lacks": [2]}
    assert not first.tensors
    assert same(wire.held(), {k: 2 * v for k, v in before.items()})
    out(wire, wire.forward(1))


@pytest.mark.parametrize("end", ["join", "leave"])
def test_rows_are_there_for_one_turn(wire: Wire, end: str) -> None:
    out(wire, numbered(wire, 1, 2, 3))
    assert wire.trunk.pending.rows.bytes()
    wire.trunk.tables.clear()  # the next turn's keys
    wire.join() if end == "join" else wire.send(Leave(wire.key("leave")))
    assert not wire.trunk.pending.rows.bytes()


def test_a_client_leaves_no_more_than_it_may_and_the_oldest_go(wire: Wire) -> None:
    rows = wire.trunk.pending.rows
    out(wire, numbered(wire, 1, 2, 3))
    sizes = [state.nbytes for state in rows.held["c0"].rows.values()]
    rows.each = sizes[0] + sizes[2]
    out(wire, numbered(wire, 3, 0, 4, step=1))
    assert [*rows.held["c0"].rows] == [3, 4]
    assert rows.bytes() <= rows.each
    rows.each = 0
    out(wire, numbered(wire, 5, 6, 7, step=2))
    assert [*rows.held["c0"].rows] == [3, 4]


def test_rows_take_what_graphs_leave() -> None:
    trunk, wires = served(U, U)
    rows = trunk.pending.rows
    rows.each, trunk.pending.budget = 1 << 20, 1 << 40
    try:
        for wire in wires:
            wire.join()
            out(wire, numbered(wire, 1, 2, 3))
        each = rows.held["c0"].bytes
        trunk.pending.budget = trunk.pending.bytes() + each
        out(wires[0], numbered(wires[0], -1, -2, -3, step=1))  # takes the place of its graph
        assert [*rows.held] == ["c0"]  # the other's are unused for longer
        trunk.pending.budget = 1
        out(wires[1], wires[1].forward(1))
        assert not rows.held
    finally:
        trunk.close()


@pytest.mark.parametrize(
    ("rows", "changes", "problem"),
    [
        ((1, 2), {}, "2 should have come"),
        ((-1, -2, 5), {"hidden": torch.ones(2, 9, 32)}, "1 should have come"),
        ((1, 2, 3), {"wants": True}, "without a wish"),
        ((-1, -2, -3), {"hidden": torch.ones(0, 4, 32)}, "not those that were kept"),
        ((-1,) * 60, {"hidden": torch.ones(0, 9, 32)}, "not those that were kept"),
        ((-1, -2, -3), {"hidden": torch.ones(0, 1 << 20, 32)}, "not those that were kept"),
        ((-1, -2, -3), {"hidden": torch.ones(0, 9, 31)}, "A hidden state is"),
        ((-1, -2, -3), {"hidden": torch.ones(0, 9, 32).half()}, "numbers of type"),
    ],
)
def test_rows_that_do_not_fit_are_refused(
    wire: Wire, rows: tuple[int, ...], changes: dict[str, Any], problem: str
) -> None:
    out(wire, numbered(wire, 1, 2, 3))
    before = wire.held()
    message = replace(numbered(wire, 1, 2, 3, step=1), ops=(DOUBLE,))
    with pytest.raises(LinkError, match=problem):
        wire.send(replace(message, rows=rows, **changes))
    assert same(wire.held(), before)


# ---- no graph below what trains


def learned(wire: Wire, step: int, *, wants: bool) -> tuple[Tensors, bool]:
    """The far gradient, and whether the server kept a graph from the hidden state on."""
    ahead = wire.forward(step, wants=wants)
    shape = torch.full_like(out(wire, ahead), 0.25)
    graph = wire.trunk.pending.of("c0", ahead.key.call, step).graph
    assert graph is not None
    wire.send(replace(wire.backward(ahead, shape), hidden=False))
    wire.send(Do(wire.key("do", step), (Grad(("personal",), ("g",)),)))
    return wire.held("g"), graph.hidden.requires_grad


def test_a_hidden_state_without_gradient_has_no_graph_and_the_rest_is_the_same(wire: Wire) -> None:
    (whole, kept), (some, none) = (learned(wire, n, wants=w) for n, w in ((0, True), (1, False)))
    assert (kept, none) == (True, False)
    assert any(bool(g.any()) for g in some.values())
    assert same(whole, some)
    ahead = wire.forward(2, wants=False)
    shape = torch.ones_like(out(wire, ahead))
    with pytest.raises(LinkError, match="not wanted"):
        wire.send(wire.backward(ahead, shape))
