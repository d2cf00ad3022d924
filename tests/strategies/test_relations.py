"""What must be equal to what, between methods and between whole and cut, and what a step costs."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from toys import (
    LENGTH,
    H,
    Played,
    at_desk,
    backbone,
    batches_for,
    examples,
    gap,
    play,
    same,
    toy_task,
    whole,
)

from flexp.client.desk import Training
from flexp.data.examples import Batch, Examples, Shard
from flexp.dice import Dice
from flexp.engine.base import Assignment, replies
from flexp.engine.local import LocalEngine
from flexp.errors import AdapterError
from flexp.model.adapter import Lora
from flexp.model.backbone import Backbone
from flexp.model.cut import Cut, Seat
from flexp.model.ops import Optim
from flexp.products import gram_distance, gram_gradient, lora_pairs, stack, truncate
from flexp.selection import HEAD, Where
from flexp.strategies.base import Scene, Strategy, Turn
from flexp.strategies.fedavg import FedAvg
from flexp.strategies.flexp import FlexP
from flexp.strategies.local import Local
from flexp.tensors import Tensors, Term, Wear, lerp, mean, mean_by_name

MIXED = (Seat(Cut(1, 1)), Seat(Cut(2, 0)), whole(4))
SGD = Training(Optim("sgd", lr=0.5), batch=4, steps=2)
FREE = FlexP(align=0.0, head="free", moments="keep")


@functools.cache
def body() -> Backbone:
    return backbone()


def block(name: str) -> int:
    return body().block_of(name)


def far(seat: Seat) -> set[int]:
    """The blocks that a seat leaves to the server; the head is block 4."""
    last = 4 - seat.cut.back
    return set(range(seat.cut.front, last)) | ({4} if seat.labels != "keep" else set())


def everyone(played: Played, other: Played) -> bool:
    return all(same(played.adapters[c], other.adapters[c]) for c in played.adapters)


# ---- equal methods


@pytest.mark.parametrize("seats", [whole(4), Seat(Cut(2, 2))], ids=["front", "both ends"])
def test_flexp_that_hosts_nothing_far_is_local(seats: Seat) -> None:
    local = play(Local(), seats, rounds=2)
    assert everyone(play(FREE, seats, rounds=2), local)
    assert not everyone(play(FlexP(), seats, rounds=2), local)


@pytest.mark.parametrize(
    "seats",
    [MIXED, (Seat(Cut(1), "logits"), Seat(Cut(3), "loss"), Seat(Cut(3, 1))), [Seat(Cut(1, 2))] * 3],
    ids=["mixed", "v-shape", "equal"],
)
def test_splitfed_v1_is_fedavg(seats: Sequence[Seat]) -> None:
    fedavg = play(FedAvg(), whole(4), rounds=2)
    split = play(FedAvg(), seats, rounds=2, profile="open")
    assert everyone(split, fedavg)
    assert same(split.state, fedavg.state)


def test_fedavg_of_one_client_is_local() -> None:
    once: dict[str, Any] = {"rounds": 1, "seeds": (1,)}
    again: dict[str, Any] = {**once, "rounds": 3}
    # With moments, only the first round: FedAvg begins every round with a fresh optimizer.
    assert everyone(play(FedAvg(), MIXED[:1], **once), play(Local(), MIXED[:1], **once))
    assert not everyone(play(FedAvg(), MIXED[:1], **again), play(Local(), MIXED[:1], **again))
    plain: dict[str, Any] = {**again, "training": SGD}
    assert everyone(play(FedAvg(), MIXED[:1], **plain), play(Local(), MIXED[:1], **plain))


@pytest.mark.parametrize("seat", [Seat(Cut(1, 1)), Seat(Cut(2), "loss")], ids=["u", "v"])
def test_a_round_of_flexp_is_fedavg_far_and_local_near(seat: Seat) -> None:
    """SplitFed v3: fronts are personal, server copies are averaged."""
    flexp = play(FREE, seat, rounds=1, profile="open")
    fedavg = play(FedAvg(), seat, rounds=1, profile="open")
    local = play(Local(), seat, rounds=1, profile="open")
    assert {block(k) for k in flexp.state} == far(seat)
    assert same(flexp.state, {k: fedavg.state[k] for k in flexp.state})
    for client, adapter in flexp.adapters.items():
        for k, v in adapter.items():
            expected = flexp.state[k] if k in flexp.state else local.adapters[client][k]
            assert torch.equal(v, expected), k


# ---- pooled = federated


def driven(
    strategy: Strategy[Any], shards: Mapping[str, Shard], seats: Sequence[Seat], training: Training
) -> Any:
    """The state after one round."""
    placed = dict(zip(shards, seats, strict=True))
    engine = LocalEngine(
        body(), toy_task(body()), shards, kind=Lora(rank=3, alpha=6.0), training=training,
        dice=Dice(0),
    )  # fmt: skip
    try:
        state = strategy.start(Scene(tuple(shards), placed, engine.initial, Dice(0)))
        turn = Turn(0, 1, 0, True, placed, {}, body().block_of, body().depth)
        work = [Assignment(c, placed[c], strategy.offer(state, c, turn)) for c in placed]
        arrivals = list(engine.run(strategy, work, turn))
        assert [a.rows for a in arrivals] == [s.rows for s in shards.values()]
        turn = replace(turn, rows={a.client: a.rows for a in arrivals})
        return strategy.merge(state, replies(arrivals), turn)
    finally:
        engine.close()


def joined(parts: Sequence[Examples]) -> Examples:
    return Examples(
        tuple(i for p in parts for i in p.ids),
        tuple(i for p in parts for i in p.labels if isinstance(i, int)),
        tuple(i for p in parts for i in p.origins),
    )


def test_one_step_of_everybody_is_one_step_on_the_pooled_rows() -> None:
    parts = [examples(n, rows) for n, rows in enumerate((3, 6, 12))]
    one_step = Training(Optim("sgd", lr=1.0), batch=99, steps=1)
    pooled = driven(Local0(), {"all": Shard(joined(parts))}, [whole(4)], one_step)
    shards = {f"c{n}": Shard(p) for n, p in enumerate(parts)}
    for seats in ([whole(4)] * 3, MIXED):
        found = driven(FedAvg(), shards, seats, one_step)
        assert gap(found, pooled) < 1e-6
    begun = body().initial(Lora(rank=3, alpha=6.0), Dice(0)("initial"))
    assert gap(pooled, begun) > 1e-3
    equal = mean_of_equal_weights(shards, one_step)
    assert gap(equal, pooled) > 1e-5  # rows as weights are what makes it so


class Local0(FedAvg):
    """FedAvg of one client: what it trained."""


class Even(FedAvg):
    """FedAvg with equal weights."""

    def merge(self, state: Tensors, replies: Mapping[str, Any], turn: Turn) -> Tensors:
        return mean([r.adapters["personal"] for r in replies.values()], [1.0] * len(replies))


def mean_of_equal_weights(shards: Mapping[str, Shard], training: Training) -> Tensors:
    return driven(Even(), shards, MIXED, training)


# ---- FlexP-SFL: hosting, sharing, and what is never uploaded


HOSTS = (Seat(Cut(1, 0)), Seat(Cut(2, 1)), Seat(Cut(1, 2)))  # far: 1 2 3, 2, 1


def test_a_block_with_one_host_is_that_hosts_copy() -> None:
    played = play(FREE, HOSTS, rounds=1)
    copies = [a.reply.adapters["personal"] for a in played.arrivals if a.reply is not None]
    assert [{block(k) for k in c} for c in copies] == [{1, 2, 3}, {2}, {1}]
    assert {block(k) for k in played.state} == {1, 2, 3}
    for k, v in played.state.items():
        if block(k) == 3:
            assert torch.equal(v, copies[0][k])
        else:
            hosts = [c[k] for c in copies if k in c]
            assert torch.allclose(v, (hosts[0] + hosts[1]) / 2, atol=1e-7)
            assert not torch.equal(v, hosts[0]) or "lora_A" in k  # B is 0, so A waits


def test_only_its_hosts_move_a_block() -> None:
    first = play(FREE, HOSTS, rounds=1, seeds=(1, 2, 3)).state
    other = play(FREE, HOSTS, rounds=1, seeds=(1, 9, 3)).state  # c1 hosts block 2 only
    for n, moved in ((1, False), (2, True), (3, False)):
        names = [k for k in first if block(k) == n]
        assert same({k: first[k] for k in names}, {k: other[k] for k in names}) != moved, n


def test_own_near_parts_differ_and_far_parts_are_common() -> None:
    seat = Seat(Cut(1, 1))
    played = play(FlexP(), seat, rounds=2, keep_crossings=True)
    one, two = played.adapters["c0"], played.adapters["c1"]
    for k in one:
        assert torch.equal(one[k], two[k]) == (block(k) in {*far(seat), 4}), k  # a fixed head
    for arrival in played.arrivals:
        assert arrival.ledger.crossings is not None
        up = {c.name.split("/")[0] for c in arrival.ledger.crossings if c.way == "up"}
        assert up == {"hidden", "mask", "grad"}  # no weight at all


@pytest.mark.parametrize("seats", [[Seat(Cut(1, 1))] * 3, HOSTS], ids=["equal", "mixed"])
def test_data_of_one_client_reaches_the_others_through_the_trunk(seats: Sequence[Seat]) -> None:
    first = play(FlexP(), seats, rounds=2, seeds=(1, 2, 3), keep_crossings=True)
    other = play(FlexP(), seats, rounds=2, seeds=(1, 9, 3), keep_crossings=True)
    changed = {
        k for k, v in first.adapters["c0"].items() if not torch.equal(v, other.adapters["c0"][k])
    }
    common = far(seats[0]) & far(seats[1])
    assert {block(k) for k in changed} >= common
    for played in (first, other):
        for n, arrival in enumerate(played.arrivals):
            assert arrival.ledger.crossings is not None
            for one in arrival.ledger.crossings:
                slot, _, name = one.name.partition("/base_model.")
                near = name and block(f"base_model.{name}") not in far(seats[n])
                assert not (one.way == "up" and near), one
                if one.way == "down" and name:
                    assert slot == "slot/reference"
                    assert near  # a reference is for what is near


@pytest.mark.parametrize("head", ["aligned", "free"])
@pytest.mark.parametrize("form", ["product", "factors"])
def test_alignment_adds_its_gradient_and_nothing_else(head: Any, form: Any) -> None:
    """u - lr (g + lambda grad R): against the same run without it, only the last term is left.

    Block 1 is near for c1 and far for c0, so its reference is c0's copy; block 0 and the head have
    none, so theirs is the beginning. In the first round everybody is at the reference still.
    """
    seats, weight, rate, scaling = (Seat(Cut(1, 0)), Seat(Cut(2, 0))), 0.5, 2.0, (6.0 / 3) ** 2
    one_step = Training(Optim("sgd", lr=rate), batch=4, steps=1)
    options: dict[str, Any] = {"seeds": (1, 2), "training": one_step}
    aligned = FlexP(form="prox", align=weight, head=head, compare=form)
    first, free = (play(FREE, seats, rounds=n, **options) for n in (1, 2))
    found = play(aligned, seats, rounds=2, **options).adapters["c1"]
    mine = first.adapters["c1"]
    reference = {**body().initial(Lora(rank=3, alpha=6.0), Dice(0)("initial")), **first.state}
    near = {k for k in mine if block(k) not in far(seats[1])}
    expected = {k: mine[k] - reference[k] for k in near if head == "aligned" or block(k) != 4}
    if form == "product":
        for a, b in lora_pairs(near).values():
            grads = gram_gradient(mine[a], mine[b], reference[a], reference[b])
            expected[a], expected[b] = (scaling * g for g in grads)
    pulled = {k: (free.adapters["c1"][k] - v) / (rate * weight) for k, v in found.items()}
    assert gap({k: pulled[k] for k in expected}, expected) < 2e-6
    assert not any(bool(v.any()) for k, v in pulled.items() if k not in expected)
    for n in (0, 1, *([4] if head == "aligned" else [])):
        assert max(float(v.abs().max()) for k, v in expected.items() if block(k) == n) > 1e-4


# ---- what a step costs


ROWS, CLASSES = 3, 3
S = ROWS * LENGTH * H * 4  # one hidden state, fp32
MASK = ROWS * LENGTH * 8
LABELS = ROWS * 8
LOGITS = ROWS * CLASSES * 4
COEF = (4 + 2) * 4  # one number per block, and before and after them
FRONT, TAIL = Where(part="front"), Where(part="tail")
U, V = Seat(Cut(1, 1)), Seat(Cut(2), "loss")
LEARNED: Wear = (Term("personal", torch.tensor(0.5, requires_grad=True)), Term("personal"))

COSTS = {
    # seat, what trains, wear, up, down
    "u-shape": (U, ~Where(part="head"), "personal", 2 * S + MASK, 2 * S),
    "frozen front": (U, ~FRONT, "personal", 2 * S + MASK, S),
    "only the tail": (U, TAIL | HEAD, "personal", S + MASK, S),
    "v-shape, loss": (V, Where(), "personal", S + MASK + LABELS + 4, S + 4),
    "v-shape, loss, frozen front": (V, ~FRONT, "personal", S + MASK + LABELS + 4, 4),
    "v-shape, logits": (
        replace(V, labels="logits"),
        Where(),
        "personal",
        S + MASK + LOGITS,
        S + LOGITS,
    ),
    "a learned weight": (U, Where(), LEARNED, 2 * S + MASK + COEF, 2 * S + COEF),
    "whole": (whole(4), Where(), "personal", 0, 0),
}


@pytest.mark.parametrize("name", COSTS)
def test_bytes_of_a_step_are_the_formulas(name: str) -> None:
    seat, train, wear, up, down = COSTS[name]
    steps = 3
    with at_desk(body(), seat) as (desk, ledger):
        begun = ledger.messages, ledger.sent, ledger.received
        desk.fit(wear=wear, train=train, batches=iter(batches_for(body(), steps)))
        messages, sent, received = (
            x - y
            for x, y in zip((ledger.messages, ledger.sent, ledger.received), begun, strict=True)
        )
    assert begun[1:] == (0, 0)
    assert (sent, received) == (steps * up, steps * down)
    # Operations ride on the next forward: two messages a step, one if nothing there is to learn.
    per_step = {"whole": 0, "only the tail": 1}.get(name, 2)
    assert messages == steps * per_step


def test_prediction_costs_two_hidden_states() -> None:
    batch = batches_for(body(), 1)[0]
    with at_desk(body(), U) as (desk, ledger), torch.no_grad():
        desk.model.logits(batch)
        assert (ledger.sent, ledger.received) == (S + MASK, S)
        unmasked = Batch({"input_ids": batch.inputs["input_ids"]}, batch.labels)
        desk.model.logits(unmasked)
        assert ledger.sent == 2 * S + MASK
        assert ledger.kinds == {
            ("up", "hidden"): 2 * S,
            ("up", "mask"): MASK,
            ("down", "hidden"): 2 * S,
        }


def test_a_round_costs_its_steps_and_what_is_offered_near() -> None:
    seats = (Seat(Cut(1, 1)), Seat(Cut(2, 0)), whole(4))
    played = play(FedAvg(), seats, rounds=1, training=replace(SGD, batch=3))
    begun = body().initial(Lora(rank=3, alpha=6.0), Dice(0)("initial"))
    for seat, arrival in zip(seats, played.arrivals, strict=True):
        near = sum(v.numel() * 4 for k, v in begun.items() if block(k) not in far(seat))
        steps = 0 if seat == whole(4) else SGD.steps or 0
        assert arrival.ledger.sent == steps * (2 * S + MASK) + near
        assert arrival.ledger.received == steps * 2 * S + near


# ---- products of factors


def pair(seed: int, rank: int, rows: int = 7, columns: int = 5) -> tuple[Tensor, Tensor]:
    stream = torch.Generator().manual_seed(seed)
    options: Any = {"generator": stream, "dtype": torch.float64}
    return torch.randn(rank, columns, **options), torch.randn(rows, rank, **options)


@given(st.integers(0, 99), st.integers(1, 4), st.integers(1, 4))
def test_gram_distance_is_the_dense_one_and_its_gradient_autograds(
    seed: int, rank: int, other: int
) -> None:
    (a, b), (a2, b2) = pair(seed, rank), pair(seed + 1, other)
    a, b = a.requires_grad_(), b.requires_grad_()
    dense = (b @ a - b2 @ a2).square().sum()
    assert torch.allclose(gram_distance(a, b, a2, b2), dense, rtol=1e-9)
    expected = torch.autograd.grad(dense / 2, (a, b))
    found = gram_gradient(a.detach(), b.detach(), a2, b2)
    assert all(torch.allclose(x, y, rtol=1e-9) for x, y in zip(found, expected, strict=True))


def test_gram_distance_in_single_precision() -> None:
    (a, b), (a2, b2) = ([x.float() for x in pair(n, 3)] for n in (1, 2))
    dense = (b @ a - b2 @ a2).square().sum()
    assert float(gram_distance(a, b, a2, b2)) == pytest.approx(float(dense), rel=1e-6)
    assert float(gram_distance(a, b, a, b)) == pytest.approx(0, abs=1e-3)


@given(st.integers(0, 99), st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_a_stack_is_the_weighted_sum_of_products(seed: int, ranks: list[int]) -> None:
    pairs = [pair(seed + n, r) for n, r in enumerate(ranks)]
    weights = [0.5 + n for n in range(len(ranks))]
    a, b = stack(pairs, weights)
    assert (a.shape[0], b.shape[1]) == (sum(ranks), sum(ranks))
    dense = sum((w * (b @ a) for (a, b), w in zip(pairs, weights, strict=True)), torch.zeros(7, 5))
    assert torch.allclose(b @ a, dense)


@given(st.integers(0, 99), st.integers(1, 4), st.integers(1, 6))
def test_a_truncation_is_the_best_of_its_rank(seed: int, rank: int, keep: int) -> None:
    a, b = pair(seed, rank)
    short_a, short_b = truncate(a, b, keep)
    assert (short_a.shape, short_b.shape) == ((keep, 5), (7, keep))
    spectrum = torch.linalg.svdvals(b @ a)
    lost = (b @ a - short_b @ short_a).square().sum()
    assert torch.allclose(lost, spectrum[keep:].square().sum(), atol=1e-9)  # Eckart and Young
    kept = min(keep, rank)
    half = spectrum[:kept]  # each factor carries half of the spectrum
    assert torch.allclose(short_a[:kept].square().sum(1), half)
    assert torch.allclose(short_b[:, :kept].square().sum(0), half)
    assert not short_a[kept:].any()


@given(st.integers(0, 99), st.integers(1, 4))
def test_equal_products_truncate_to_equal_factors(seed: int, rank: int) -> None:
    a, b = pair(seed, rank)
    turn = torch.linalg.qr(pair(seed + 7, rank, rank, rank)[0])[0] * 2.0
    same_a, same_b = turn @ a, b @ torch.linalg.inv(turn)
    assert torch.allclose(same_b @ same_a, b @ a)
    for x, y in zip(truncate(a, b, rank), truncate(same_a, same_b, rank), strict=True):
        assert torch.allclose(x, y, atol=1e-6)


def test_pairs_are_found_by_name() -> None:
    names = ["x.lora_A.weight", "x.lora_B.weight", "y.lora_A.weight", "head.weight"]
    assert lora_pairs(names) == {"x": ("x.lora_A.weight", "x.lora_B.weight")}


# ---- means, by hand


def v(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32)


def test_a_mean_by_hand() -> None:
    # Two clients with 1 and 3 rows: (1 * (2, 4) + 3 * (6, 0)) / 4 = (5, 1).
    assert same(mean([{"x": v(2, 4)}, {"x": v(6, 0)}], [1, 3]), {"x": v(5, 1)})
    one = {"x": v(0.1, 0.7)}
    assert same(mean([one], [3.0]), one)  # not scaled at all
    assert mean([one], [3.0])["x"] is not one["x"]


@pytest.mark.parametrize(
    ("items", "weights"),
    [([], []), ([{"x": v(1)}], []), ([{"x": v(1)}] * 2, [0, 0]), ([{"x": v(1)}] * 2, [1, -1])],
)
def test_a_mean_needs_weights(items: list[Tensors], weights: list[float]) -> None:
    with pytest.raises(AdapterError, match=r"[Ww]eight"):
        mean(items, weights)


def test_a_mean_of_different_adapters_is_refused() -> None:
    with pytest.raises(AdapterError, match="do not hold the same tensors"):
        mean([{"x": v(1)}, {"y": v(1)}], [1, 1])


def test_a_mean_by_name_is_over_those_who_have_it() -> None:
    # x: hosts with 1 and 3 rows; y: the second and third, 3 and 1 rows; z: the third alone.
    items = [{"x": v(2)}, {"x": v(6), "y": v(8)}, {"y": v(0), "z": v(0.3)}]
    assert same(mean_by_name(items, [1, 3, 1]), {"x": v(5), "y": v(6), "z": v(0.3)})
    assert mean_by_name([], []) == {}


def test_lerp_by_hand() -> None:
    a, b = {"x": v(0, 8)}, {"x": v(4, 0)}
    assert same(lerp(a, b, 0.25), {"x": v(1, 6)})  # three quarters of a, one of b
    assert same(lerp(a, b, 0.0), a)
    assert same(lerp(a, b, 1.0), b)
    assert lerp(a, b, 0.0)["x"] is not a["x"]
    odd = {"x": v(0.1)}, {"x": v(0.7)}
    assert same(lerp(*odd, 1.0), odd[1])  # exact, where arithmetic alone would not be
