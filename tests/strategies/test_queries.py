"""Slopes from losses alone, of functions of which they are known, and surgery on hidden states."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import at_desk, backbone, whole

from flexp.errors import AdapterError
from flexp.model.adapter import Lora
from flexp.model.cut import Cut, Seat
from flexp.model.ops import SlotSpec
from flexp.model.surgery import NAMES, NUDGE, Surgery, middle, operated
from flexp.strategies.queries import Queries
from flexp.tensors import Tensors, Term

STREAM = torch.Generator


def hill(code: Tensor) -> Tensor:
    """c1^2 + 3 c1 c2 of each row."""
    return code[..., 0] ** 2 + 3 * code[..., 0] * code[..., 1]


def test_cge_by_hand() -> None:
    # At (1, 2) it is 7, and the slope (2 + 6, 3). With rho = 1/2, one side: at (1.5, 2) 11.25, so
    # 8.5; at (1, 2.5) 8.5, so 3. Two sides: (11.25 - 3.25) / 1 = 8, and (8.5 - 5.5) / 1 = 3.
    code = torch.tensor([[1.0, 2.0]])
    tried: list[tuple[Any, list[float], float]] = [
        ("one", [8.5, 3.0], 7.0),
        ("two", [8.0, 3.0], 7.125),
    ]
    for sides, wanted, value in tried:
        how = Queries(sides=sides, rho=0.5)
        found, slope = how.slope(lambda n: hill(code + n), code, STREAM())
        assert slope.tolist() == [wanted]
        assert found.tolist() == [value]


def test_of_two_rows_each_has_its_own_slope() -> None:
    code = torch.tensor([[1.0, 2.0], [-1.0, 0.5]])
    _, slope = Queries(sides="two", rho=0.5).slope(lambda n: hill(code + n), code, STREAM())
    assert slope.tolist() == [[8.0, 3.0], [-0.5, -3.0]]


@pytest.mark.parametrize(("sides", "order"), [("one", 1), ("two", 2)])
def test_the_error_of_cge_falls_with_rho_or_with_its_square(sides: Any, order: int) -> None:
    stream = torch.Generator().manual_seed(0)
    first, second = (torch.randn(8, 8, generator=stream, dtype=torch.float64) for _ in range(2))
    code = torch.randn(5, 8, generator=stream, dtype=torch.float64, requires_grad=True)

    def loss(code: Tensor) -> Tensor:
        return torch.logsumexp(torch.tanh(code @ first) @ second, dim=-1)

    (true,) = torch.autograd.grad(loss(code).sum(), [code])
    errors = list[float]()
    for rho in (4e-3, 2e-3, 1e-3):
        with torch.no_grad():
            _, slope = Queries(sides=sides, rho=rho).slope(lambda n: loss(code + n), code, STREAM())
        errors.append(float((slope - true).abs().max()))
    for larger, smaller in itertools.pairwise(errors):
        assert larger / smaller == pytest.approx(2**order, rel=0.05)
    assert errors[-1] < (2e-2 if order == 1 else 1e-4)


@pytest.mark.parametrize("along", ["signs", "normal"])
def test_random_directions_find_the_slope_in_the_mean(along: Any) -> None:
    wanted = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]])
    how = Queries(along, "two", 0.1, directions=20_000)
    ask = lambda n: (n * wanted).sum(-1)  # noqa: E731
    _, slope = how.slope(ask, wanted, torch.Generator().manual_seed(0))
    assert torch.allclose(slope, wanted, atol=0.1)
    u = how.lines(wanted, torch.Generator().manual_seed(0))
    assert not torch.equal(u[:, 0], u[:, 1])  # each row has its own
    assert (u.abs() == 1).all() == (along == "signs")


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        (Queries(), 13),
        (Queries(sides="two"), 24),
        (Queries("signs", directions=4), 5),
        (Queries("normal", "two", directions=4), 8),
    ],
)
def test_queries_are_counted(how: Queries, wanted: int) -> None:
    asked = list[int]()

    def ask(nudges: Tensor) -> Tensor:
        asked.append(len(nudges))
        return nudges.sum(-1)

    how.slope(ask, torch.zeros(2, 12), STREAM())
    assert asked == [wanted] == [how.count(12)]


# ---- surgery


def worn(residual: bool = True) -> Tensors:
    stream, kind = torch.Generator().manual_seed(2), Surgery(3, 2, 4, residual=residual)
    shapes = kind.layout(6)
    return {name: torch.randn(shape, generator=stream) for name, shape in shapes.items()}


def test_padding_is_no_part_of_a_rows_mean() -> None:
    hidden = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    assert torch.allclose(middle(hidden, mask)[0], hidden[0, :3].mean(0))
    assert torch.allclose(middle(hidden, mask)[1], hidden[1, 1:].mean(0))
    assert torch.allclose(middle(hidden, None), hidden.mean(1))
    with pytest.raises(AdapterError, match="rows of positions"):
        middle(torch.zeros(2, 3, 4, 4), None)


def test_one_change_is_added_at_all_positions_of_a_row() -> None:
    hidden, held = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0)), worn()
    change = operated(hidden, {}, held, "input")[0] - hidden
    assert torch.allclose(change, change[:, :1].expand_as(change), atol=1e-6)
    assert not torch.allclose(change[0], change[1])
    assert torch.equal(operated(hidden, {}, held, "cut")[0], hidden)  # it is worn elsewhere


def test_an_encoder_at_its_anchor_without_an_own_code_changes_nothing() -> None:
    hidden, held = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0)), worn()
    for name in [n for n in held if "_anchor_" in n]:
        held[name] = held[name.replace("_anchor_", "_encoder_")]
    assert not torch.equal(operated(hidden, {}, held, "input")[0], hidden)
    held[NAMES["input"]["own"]] = torch.zeros(2)
    assert torch.equal(operated(hidden, {}, held, "input")[0], hidden)


def test_with_nudges_all_rows_are_there_as_often() -> None:
    hidden, held = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0)), worn(False)
    ids = torch.arange(10).view(2, 5)
    nudges = torch.zeros(6, 5)
    nudges[3, 1] = 1.0
    out, inputs = operated(hidden, {"input_ids": ids}, {**held, NUDGE: nudges}, "input")
    once = operated(hidden, {}, held, "input")[0]
    assert torch.equal(inputs["input_ids"], torch.cat([ids, ids, ids]))
    assert torch.allclose(out[[0, 1, 2, 4, 5]], once[[0, 1, 0, 0, 1]], atol=1e-6)
    assert not torch.allclose(out[3], once[1])


@pytest.mark.parametrize(
    ("family", "at"), [("bert-cls", "input"), ("gpt2-cls", "input"), ("vit", "input"),
                       ("bert-cls", "cut"), ("vit", "cut")],
)  # fmt: skip
def test_surgery_is_the_same_at_every_cut(family: str, at: Any) -> None:
    body, wear = backbone(family), (Term("personal"), Term("surgery"))
    slots = {"personal": SlotSpec(Lora(3)), "surgery": SlotSpec(Surgery(3, 2, 4, at))}
    found = list[Tensor]()
    seats = [Seat(Cut(1)), Seat(Cut(1, 2))] if at == "cut" else [Seat(Cut(1, 1)), whole(4)]
    for seat in seats:
        with at_desk(body, seat, slots=slots) as (desk, _):
            if family == "vit":
                pixels = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
                batch: Any = type("B", (), {"inputs": {"pixel_values": pixels}})
            else:
                batch = desk.task.collate(desk.shard.train, range(2))
            desk.model.near["surgery"][NAMES[at]["own"]] += 1.0
            both = [desk.model.logits(batch, w) for w in ("personal", wear)]
            assert not torch.allclose(both[0], both[1])
            found.append(both[1])
    assert torch.equal(*found)
