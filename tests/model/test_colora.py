"""Co-LoRA, its gate and the alignment of its frozen factors, by what their formulas say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional
from toys import at_desk, backbone

from flexp.dice import Dice
from flexp.errors import AdapterError
from flexp.model.canon import canonical, crowding, polar
from flexp.model.colora import CoLora, blocks_of, delta, gate, nth
from flexp.model.cut import Cut, Seat
from flexp.model.ops import SlotSpec
from flexp.model.wearing import Wearing
from flexp.model.worn import Factors, Worn, gated
from flexp.parcel import Parcel
from flexp.tensors import Stacked, Tensors, Term, Wear

KIND = CoLora(3, 6.0, groups=2)
BOTH = Stacked((Term("others"), Term("personal")), gated=True)
SLOTS = {"personal": SlotSpec(), "others": SlotSpec()}


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


FACTORS = drawn(3, 32, seed=5), drawn(32, 3, seed=6), drawn(3, 3, seed=7), drawn(3, seed=8)


# ---- which blocks, and what they are called


@pytest.mark.parametrize(
    ("depth", "found"),
    [(16, [3, 7, 11, 15]), (28, [6, 13, 20, 27]), (12, [2, 5, 8, 11]), (4, [0, 1, 2, 3])],
)
def test_co_lora_is_in_the_last_block_of_each_group(depth: int, found: list[int]) -> None:
    assert blocks_of(depth, 4) == found


def test_more_groups_than_blocks_are_refused() -> None:
    with pytest.raises(AdapterError, match="4 groups of blocks, but the model has 3"):
        blocks_of(3, 4)


def test_its_tensors_and_those_of_lora_are_where_they_belong() -> None:
    body = backbone()
    found = body.layout(KIND)
    co = {body.block_of(k) for k in found if ".colora_P" in k}
    plain = {body.block_of(k) for k in found if ".lora_A." in k}
    gates = {body.block_of(k) for k in found if ".colora_gate" in k}
    assert (co, plain, gates) == ({1, 3}, {0, 2}, {0, 1, 2, 3})
    shapes = {k.rpartition(".")[2]: s for k, s in found.items() if "3.attention.self.query" in k}
    assert shapes == {
        "colora_A": (3, 32),
        "colora_B": (32, 3),
        "colora_P": (3, 3),
        "colora_Q": (3,),
        "colora_gate": (32,),
    }


def test_matched_tensors_of_two_depths_have_the_same_names() -> None:
    names = []
    for depth in (4, 6):
        body = backbone(depth=depth)
        names.append(set(nth(body.layout(KIND), body.block_of).values()))
    assert names[0] == names[1]
    assert len(names[0]) == 2 * 2 * 2  # blocks, targets, P and Q


def test_a_rank_that_has_no_room_is_refused() -> None:
    with pytest.raises(AdapterError, match="40 directions at right angles"):
        backbone().layout(CoLora(40))


# ---- what is worn


def test_co_lora_adds_what_its_formula_says() -> None:
    x, a, b, p, q = drawn(2, 5), drawn(3, 5), drawn(4, 3), drawn(3, 3), drawn(3)
    expected = torch.stack([b @ (p @ (a @ row) + q) for row in x])
    assert torch.allclose(delta(x, a, b, p, q), expected, atol=1e-5)


def test_at_the_start_it_adds_nothing_though_b_is_not_zero() -> None:
    body = backbone()
    begun = body.initial(KIND, Dice(0))
    b = [v for k, v in begun.items() if k.endswith("colora_B")]
    assert b
    assert all(torch.allclose(v.T @ v, torch.eye(3), atol=1e-5) for v in b)
    a = [v for k, v in begun.items() if k.endswith("colora_A")]
    assert all(torch.allclose(v @ v.T, torch.eye(3), atol=1e-5) for v in a)
    with at_desk(body, Seat(Cut(1, 1)), kind=KIND, slots=SLOTS) as (desk, _):
        batch = desk.task.collate(desk.shard.train, range(4))
        with torch.no_grad():
            plain = body.run(batch.inputs)
            assert torch.equal(desk.model.logits(batch, "personal"), plain)
            assert torch.equal(desk.model.logits(batch, BOTH), plain)


def served(seat: Seat, wear: Wear, changes: Tensors) -> torch.Tensor:
    """Logits of a wear at a seat, where tensors of the named slots were changed."""
    body = backbone()
    adapters = {
        slot: {
            k: v + changes[f"{slot}/{k}"] for k, v in body.initial(KIND, Dice(3)("initial")).items()
        }
        for slot in SLOTS
    }
    with at_desk(body, seat, kind=KIND, slots=SLOTS, offer=Parcel(adapters)) as (desk, _):
        batch = desk.task.collate(desk.shard.train, range(4))
        with torch.no_grad():
            return desk.model.logits(batch, wear)


def changed(*but: str) -> Tensors:
    """Random changes of all tensors of both slots, and none of those whose names end so."""
    body, out = backbone(), dict[str, torch.Tensor]()
    for slot in SLOTS:
        for n, (k, s) in enumerate(body.layout(KIND).items()):
            still = k.endswith(but) if but else False
            seed = n + 1000 * (slot == "others")
            out[f"{slot}/{k}"] = torch.zeros(s) if still else 0.3 * drawn(*s, seed=seed)
    return out


@pytest.mark.parametrize("seat", [Seat(Cut(1, 1)), Seat(Cut(2), "logits")], ids=str)
def test_two_adapters_by_a_gate_are_the_same_at_any_cut(seat: Seat) -> None:
    changes = changed()
    assert torch.equal(served(seat, BOTH, changes), served(Seat(Cut(4, 0)), BOTH, changes))


def test_a_gate_weighs_what_each_adds_and_the_second_has_the_rest() -> None:
    layer = backbone().model.get_submodule("bert.encoder.layer.1.attention.self.query")
    x, a, b, p, q, w = drawn(2, 5, 32), *FACTORS, drawn(32, seed=9)
    one, two = Factors(a, b, 2.0, between=(p, q)), Factors(b.T, a.T, 0.5)
    path = "somewhere"
    worn = gated(Worn({path: (one,)}), Worn({path: (two,)}, gates={path: w}), 0.0)
    wearing = Wearing(layer, path, lambda: worn)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    with torch.no_grad():
        found = wearing.apply(x, replace(worn, mask=mask))
        g = gate(x, w, mask)
        expected = wearing.plain(x) + g * 2.0 * ((x @ a.T) @ p.T + q) @ b.T
        expected = expected + (1 - g) * 0.5 * (x @ b) @ a
    assert torch.allclose(found, expected, atol=1e-4)


# ---- the gate


def test_a_gate_is_half_open_at_first_and_looks_at_real_positions_alone() -> None:
    x, mask = drawn(2, 3, 4), torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert torch.equal(gate(x, torch.zeros(4), mask), torch.full((2, 1, 1), 0.5))
    w = drawn(4, seed=1)
    found = gate(x, w, mask).flatten()
    assert found[0] == pytest.approx(float(torch.sigmoid((x[0] @ w).mean())))
    assert found[1] == pytest.approx(float(torch.sigmoid((x[1, :2] @ w).mean())))


def test_noise_of_a_gate_has_the_deviation_that_was_asked_for() -> None:
    x, w = torch.zeros(4000, 1, 4), torch.zeros(4)
    assert torch.equal(gate(x, w, noise=0.7), torch.full((4000, 1, 1), 0.5))  # without dice
    said = torch.logit(gate(x, w, noise=0.7, dice=Dice(0)))
    assert float(said.std()) == pytest.approx(0.7, rel=0.05)
    assert float(functional.softplus(torch.zeros(()))) + 1e-5 == pytest.approx(0.69316, abs=1e-5)


def test_it_needs_rows_of_positions() -> None:
    with pytest.raises(AdapterError, match="rows of positions"):
        gate(drawn(6, 4), torch.zeros(4), torch.ones(2, 3))


# ---- alignment


def test_the_polar_factor_has_rows_at_right_angles_and_is_the_nearest() -> None:
    a = drawn(3, 8)
    found = polar(a)
    assert torch.allclose(found @ found.T, torch.eye(3), atol=1e-6)
    away = float((a - found).square().sum())
    for seed in range(1, 20):
        other = polar(a + 0.1 * drawn(3, 8, seed=seed))
        assert float((a - other).square().sum()) >= away - 1e-6
    assert torch.allclose(polar(found), found, atol=1e-6)


def test_crowding_is_the_mean_square_of_cosines_between_columns() -> None:
    a = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
    # Cosines: of the first two 1 / sqrt 2, of the last two the same, of the others 0.
    assert float(crowding(a)) == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert float(crowding(torch.eye(3))) == 0


def test_the_canonical_map_predicts_one_models_outputs_from_the_others() -> None:
    # Both say the same five numbers, with a little noise. Least squares is the best there is.
    latent = drawn(400, 5)
    x = latent @ drawn(5, 8, seed=1) + 0.01 * drawn(400, 8, seed=2)
    y = latent @ drawn(5, 12, seed=3) + 0.01 * drawn(400, 12, seed=4)
    x, y = x - x.mean(0), y - y.mean(0)
    best = torch.linalg.lstsq(x.double(), y.double()).solution
    left = (y - x @ best.float()).square().sum() / y.square().sum()
    found = (y - x @ canonical(x, y).T).square().sum() / y.square().sum()
    assert canonical(x, y).shape == (12, 8)
    assert float(found - left) < 0.01
