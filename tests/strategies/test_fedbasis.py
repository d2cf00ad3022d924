"""FedBasis, once by hand and by the oracles of its specification."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from strategies.bowls import FACTOR, FRONT, PAIR, Bench, flat, numbers
from strategies.pairs import SGD, alike, ran
from strategies.prices import MASK, STEPS, S, body, sizer
from strategies.prices import SEATS as PRICED
from torch import Tensor
from toys import at_desk, backbone, play, same, shard, whole

from flexp.client.desk import Desk, Training
from flexp.dice import Dice
from flexp.model.adapter import Dense, Ia3, Kind, Lora
from flexp.model.cut import Cut, Seat
from flexp.model.ops import Optim, SlotSpec
from flexp.parcel import Parcel
from flexp.products import lora_pairs
from flexp.selection import ALL
from flexp.strategies import build
from flexp.strategies.base import Scene, Setting
from flexp.strategies.fedavg import FedAvg
from flexp.strategies.fedbasis import FedBasis
from flexp.tensors import Mix, Stacked, Tensors, Term, add, norm

KIND = Lora(rank=3, alpha=6.0)
SEATS = (Seat(Cut(1, 1)), whole(4), Seat(Cut(2, 0)))
ONE: dict[str, Any] = {  # one number; nothing of it is 0 for long
    "start": numbers(FRONT=0.0),
    "rows": {"a": [(8,)], "b": [(16,)]},
}


def test_fedbasis_fits_blends_and_then_trains_bases_by_them() -> None:
    # The warm start is FedAvg: a goes half of the way to 4, b to 8, and each has a base.
    rate = math.log(3) / 4
    method = build("fedbasis", {"bases": 2, "blend_steps": 1, "rate": rate, "sharp": 1.0})
    bench = Bench(method, **ONE)
    bench.round()
    assert [flat(base) for base in bench.state.held] == [(4,), (8,)]
    assert (bench.worn("a"), bench.worn("b")) == ((6,), (6,))
    # Blends of 1/2 each wear 6. a's slope is 6 - 8 = -2, along the shares -2 * (4, 8), and along
    # psi 1/2 (-8 + 12, -16 + 12) = (2, -2). So psi is ln 3 (-1/2, 1/2): 1/4 and 3/4.
    # b's slope is -10, five times as much: shares as 1 to 3^5 = 243, of 244.
    bench.round()
    assert blend_of(bench, "a") == pytest.approx([1 / 4, 3 / 4])
    assert blend_of(bench, "b") == pytest.approx([1 / 244, 243 / 244])
    # a wears 7 now, slope -1: bases go 1/2 * 1/4 and 1/2 * 3/4 up, to 4.125 and 8.375.
    # b wears 1948/244, slope -1956/244: bases go 1/2 * 1/244 and 1/2 * 243/244 of that up.
    up = 1956 / 244 / 2 / 244
    first, second = (4.125 + 4 + up) / 2, (8.375 + 8 + 243 * up) / 2
    assert [flat(base)[0] for base in bench.state.held] == pytest.approx([first, second])
    assert bench.serves("a")[0] == pytest.approx(first / 4 + second * 3 / 4)


def test_fedbasis_counts_a_base_by_its_share_if_asked() -> None:
    # As above, but the first base is 4.125 of weight 1/4 and 4.016 of weight 1/244.
    more = {"blend_steps": 1, "rate": math.log(3) / 4, "sharp": 1.0, "weights": "blends"}
    bench = Bench(build("fedbasis", {"bases": 2, **more}), **ONE)
    bench.round()
    bench.round()
    up = 1956 / 244 / 2 / 244
    first = (4.125 * 61 + (4 + up)) / 62  # 1/4 is 61/244
    second = (8.375 * 183 + (8 + 243 * up) * 243) / 426
    assert [flat(base)[0] for base in bench.state.held] == pytest.approx([first, second])


def blend_of(bench: Bench, client: str) -> list[float]:
    """What a client has come to, at tau = 1."""
    psi: Any = bench.memories[client].facts["psi"]
    return torch.tensor(psi).softmax(0).tolist()


# ---- products


def test_blends_of_pairs_are_sums_of_products() -> None:
    # a: A = B = 2, product 4; b: A = B = 0, product 0. Half of each wears 2, though half of the
    # factors would be A = B = 1, product 1. Exported it is one pair of rank 2, worn B A / 2.
    bench = Bench(build("fedbasis", {"bases": 2}), **PAIR)
    bench.round()
    assert [flat(base) for base in bench.state.held] == [(2, 2), (0, 0)]
    offer = bench.strategy.offer(bench.state, "a", bench.turn())
    desk = bench.sit("a", offer)
    wear = bench.strategy.personal(desk, offer).adapter
    assert isinstance(wear, Stacked)
    assert bench.serves("a") == (2,)
    held = desk.whole(wear)
    assert float(held[FRONT] @ held[FACTOR]) / 2 == 2


@pytest.mark.parametrize("seat", SEATS, ids=["cut", "whole", "other"])
def test_what_is_exported_is_the_sum_of_products(seat: Seat) -> None:
    with opened(seat, drawn_bases(KIND)) as (desk, bases):
        held = desk.whole(Stacked((Term("base/0", 0.7), Term("base/1", 0.3))))
    for a, b in lora_pairs(held).values():
        product = 0.7 * bases[0][b] @ bases[0][a] + 0.3 * bases[1][b] @ bases[1][a]
        assert len(held[a]) == 2 * KIND.rank
        assert torch.allclose(held[b] @ held[a] / 2, product, atol=1e-6)


# ---- what it equals


@pytest.mark.parametrize("training", [SGD, Training(Optim(weight_decay=0.1), batch=4, steps=2)])
@pytest.mark.parametrize("more", [{}, {"warm": 0}, {"weights": "blends"}, {"sharp": 0.01}])
def test_one_base_is_fedavg_bit_for_bit(training: Training, more: Any) -> None:
    one = ran(FedBasis(bases=1, **more), training=training)
    other = ran(FedAvg(), training=training)
    assert alike(one, other)
    assert same(one.state.held[0], other.state)
    assert not alike(ran(FedBasis(bases=2), training=training), other)


@pytest.mark.parametrize("warm", [1, 2])
def test_the_warm_start_is_fedavg(warm: int) -> None:
    found = ran(FedBasis(bases=3, warm=warm + 1), rounds=warm)
    assert alike(found, ran(FedAvg(), rounds=warm))
    assert same(found.state.held[0], ran(FedAvg(), rounds=warm).state)


@dataclass(frozen=True)
class Placed(FedBasis):
    """FedBasis whose blends are one base each, that of the client's cluster."""

    def psi(self, desk: Desk, offer: Parcel) -> Tensor:
        return torch.tensor([900.0, 0.0] if desk.client in ("c0", "c2") else [0.0, 900.0])


@dataclass(frozen=True)
class Begun(FedAvg):
    """FedAvg from a given adapter."""

    adapter: Tensors | None = None

    def start(self, scene: Scene) -> Tensors:
        assert self.adapter is not None
        return self.adapter


PLACED = Placed(bases=2, rate=0.0, warm=0, differ="noise", weights="blends")


@pytest.mark.parametrize("training", [SGD, Training(Optim(weight_decay=0.1), batch=4, steps=2)])
@pytest.mark.parametrize("seats", [SEATS, (whole(4),) * 3], ids=["mixed", "whole"])
def test_blends_of_one_base_each_are_a_fedavg_per_cluster_bit_for_bit(
    training: Training, seats: Sequence[Seat]
) -> None:
    begun = play(PLACED, seats, rounds=0, training=training).state.held
    found = play(PLACED, seats, rounds=3, training=training).state.held
    for base, members in enumerate([(0, 2), (1,)]):
        there = {f"c{n}": shard(n + 1) for n in members}
        placed = [seats[n] for n in members]
        method = Begun(adapter=begun[base])
        alone = play(method, placed, shards=there, rounds=3, training=training)
        assert same(found[base], alone.state)
        assert not same(found[base], begun[base])
    plain = play(replace(PLACED, weights="rows"), seats, rounds=3, training=training)
    assert not same(plain.state.held[0], found[0])  # of whom it is not weighs it down


# ---- slopes


def drawn_bases(kind: Kind, *, alike: bool = False) -> list[Tensors]:
    """Two bases with numbers everywhere."""
    begun, out = backbone().initial(kind, Dice(1)), list[Tensors]()
    for n in range(2):
        stream = torch.Generator().manual_seed(0 if alike else n)
        out.append({k: v + 0.3 * torch.randn(v.shape, generator=stream) for k, v in begun.items()})
    return out


@contextmanager
def opened(
    seat: Seat, bases: Sequence[Tensors], **more: Any
) -> Generator[tuple[Desk, Sequence[Tensors]]]:
    """A desk with bases on it."""
    slots = {f"base/{k}": SlotSpec() for k in range(len(bases))}
    offer = Parcel({f"base/{k}": base for k, base in enumerate(bases)})
    how: dict[str, Any] = {"kind": KIND, **more}
    with at_desk(backbone(), seat, slots=slots, offer=offer, **how) as (desk, _):
        yield desk, bases


@pytest.mark.parametrize("kind", [KIND, Dense(("query",))], ids=["lora", "dense"])
@pytest.mark.parametrize("seat", SEATS, ids=["cut", "whole", "other"])
def test_the_slope_of_a_base_is_its_share_of_that_at_the_blend(kind: Kind, seat: Seat) -> None:
    # Where both bases are alike the blend is what each is, so its slope is that of one alone.
    with opened(seat, drawn_bases(kind, alike=True), kind=kind) as (desk, _):
        batch = next(desk.batches(steps=1))
        mix: Mix = (Term("base/0", 0.7), Term("base/1", 0.3))
        wear = Stacked(mix) if isinstance(kind, Lora) else mix
        desk.grad(desk.model.loss(batch, wear), ["base/0", "base/1"], ["g/0", "g/1"])
        desk.grad(desk.model.loss(batch, "base/0"), ["base/0"], ["g"])
        slope, parts = desk.whole("g"), [desk.whole(f"g/{k}") for k in range(2)]
    for part, share in zip(parts, (0.7, 0.3), strict=True):
        for k, v in slope.items():
            assert float((part[k] - share * v).abs().max()) <= 1e-7, k
    assert norm(slope) > 0.1


def moved(optim: Optim) -> list[Tensors]:
    """How far two alike bases go in one step, of shares 0.8 and 0.2."""
    method = FedBasis(bases=2, rate=0.0, sharp=1.0)
    facts: Any = {"bases": 2, "sharp": 1.0, "products": True}
    with opened(whole(4), drawn_bases(KIND, alike=True), optim=optim) as (desk, bases):
        desk.training = replace(desk.training, steps=1)
        desk.memory.facts["psi"] = [math.log(share) for share in (0.8, 0.2)]
        method.train(desk, Parcel(facts=facts))
        return [add(desk.whole(f"base/{k}"), bases[k], -1.0) for k in range(2)]


def pairs_of(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(a.flatten(), b.flatten(), strict=True)


def test_a_step_of_a_base_is_its_share_of_one_at_the_blend() -> None:
    first, second = moved(Optim("sgd", lr=1.0))
    for k, v in first.items():
        assert torch.allclose(v, 4 * second[k], rtol=1e-4, atol=1e-6), k
    assert norm(first) > 0.1


def test_a_step_of_adamw_is_its_share_of_one_too() -> None:
    # AdamW's first step is as long as the rate says, unless a slope is close to its eps.
    first, second = moved(Optim("adamw", lr=1e-2))
    both = [(float(a), float(b)) for k in first for a, b in pairs_of(first[k], second[k])]
    steep = [(a, b) for a, b in both if abs(b) > 0.00199]
    assert len(steep) > 0.5 * len(both)
    for a, b in steep:
        assert a == pytest.approx(4 * b, rel=1e-2)
        assert abs(a) == pytest.approx(0.008, rel=1e-2)


# ---- what is refused, and what it costs


def test_fedbasis_refuses_what_it_cannot_blend() -> None:
    seats = {"a": whole(4), "b": Seat(Cut(1), rank=None)}
    setting = Setting("classification", Lora(), seats, 4, head=True)
    assert FedBasis().refuses(setting) == ""
    assert FedBasis(newcomers=("b",)).refuses(setting) == ""
    assert FedBasis().refuses(replace(setting, adapter=Ia3())) == ""
    assert 'newcomer "c" is no client' in FedBasis(newcomers=("c", "a")).refuses(setting)
    assert "Shorten strategy.newcomers" in FedBasis(newcomers=("a", "b")).refuses(setting)
    assert "Set strategy.differ=noise" in FedBasis(warm=0).refuses(setting)
    assert FedBasis(warm=0, bases=1).refuses(setting) == ""
    assert FedBasis(warm=0, differ="noise").refuses(setting) == ""
    dora = replace(setting, adapter=Lora(dora=True))
    assert "Set adapter.dora=false" in FedBasis().refuses(dora)
    ranks = replace(setting, seats={"a": Seat(Cut(1), rank=2), "b": Seat(Cut(1))})
    assert "Remove plan.ranks" in FedBasis().refuses(ranks)


@pytest.mark.parametrize("bases", [1, 2, 4])
def test_a_round_of_fedbasis_costs_what_the_formula_says(bases: int) -> None:
    # K near adapters each way, of a newcomer down alone. At a cut a step for the blend is one of
    # training with the K shares up, and their slopes down, a number per block and two more each.
    method = FedBasis(bases=bases, warm=1, blend_steps=3, newcomers=("c2",))
    cuts = (*PRICED[:2], PRICED[0])
    arrivals = play(method, cuts, rounds=2, training=SGD, body=body()).arrivals
    begun = body().initial(KIND, Dice(0)("initial"))
    for arrival in arrivals:
        assert arrival.failure is None
        new, near = arrival.client == "c2", sizer(begun, cuts[int(arrival.client[1])])(ALL)
        blends, steps, shares = 3 * (bases > 1), STEPS * (not new), bases * (4 + 2) * 4
        down = bases * near if bases > 1 or not new else 0
        assert (arrival.ledger.sent, arrival.ledger.received) == (
            (steps + blends) * (2 * S + MASK) + blends * shares + bases * near * (not new),
            (steps + blends) * 2 * S + blends * shares + down,
        ), arrival.client


def test_a_warm_start_costs_what_fedavg_does() -> None:
    method = FedBasis(bases=4, warm=3)
    found = play(method, PRICED, rounds=2, training=SGD, body=body()).arrivals
    plain = play(build("fedavg", {}), PRICED, rounds=2, training=SGD, body=body()).arrivals
    for arrival, other in zip(found, plain, strict=True):
        ledgers = arrival.ledger, other.ledger
        assert len({(one.sent, one.received) for one in ledgers}) == 1
