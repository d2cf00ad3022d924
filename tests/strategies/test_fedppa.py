"""FedPPA: the oracles of its section, by hand, what it equals, and what a round of it costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from strategies.bowls import FRONT, TRUNK, A, Bench, numbers
from strategies.pairs import alike
from strategies.prices import SEATS, check_round
from torch import Tensor
from toys import Played, backbone, examples, play, same, whole

from flexp.client.desk import Training
from flexp.data.examples import Shard
from flexp.data.tasks import label_entropy
from flexp.model.adapter import Lora
from flexp.model.cut import Cut, Seat
from flexp.model.ops import Optim
from flexp.parcel import Parcel
from flexp.selection import ALL, HEAD, NONE, Where
from flexp.strategies import build
from flexp.strategies.base import Setting
from flexp.strategies.fedavg import FedAvg
from flexp.strategies.fedppa import FedPpa
from flexp.strategies.flexp import FlexP
from flexp.strategies.flexp_sfl import FlexPSfl
from flexp.strategies.layers import taken
from flexp.strategies.local import Local
from flexp.strategies.ranks import Ranked

U = Seat(Cut(1, 1))
PLAIN = Training(Optim("sgd", lr=3.0), batch=4, steps=2)
HALF = FedPpa(parts=1)  # half of the way at the start of a turn


def ran(method: Any, seats: Any, **more: Any) -> Played:
    """A few rounds of it, in which nobody fails."""
    options: dict[str, Any] = {"training": PLAIN, **more}
    found = play(method, seats, **options)
    assert all(arrival.failure is None for arrival in found.arrivals)
    return found


# ---- by hand


def test_fedppa_goes_part_of_the_way_before_each_part() -> None:
    # One step, so one part: at 0 there is nothing to approach. a: (4, 8, 16), b: (8, 4, -8), and
    # in the mean, whatever their rows, (6, 6, 4). a goes on from (5, 7, 10), b from (7, 5, -2).
    bench = Bench(build("fedppa", {}))
    bench.round()
    assert bench.worn("a") == (4, 8, 16)
    assert bench.worn("b") == (8, 4, -8)
    bench.round()
    assert bench.worn("a") == (6.5, 11.5, 21)
    assert bench.worn("b") == (11.5, 6.5, -9)


def test_fedppa_rises_to_beta_within_a_turn() -> None:
    # Fronts. a: 4; then half of the way back to 0, so 2, and 5. b: 8, 4, 10. The mean is 7.5.
    # a goes a quarter of the way: 5.625, to 6.8125; then half: 7.15625, and half of the way to 8.
    bench = Bench(build("fedppa", {"parts": 2}), steps=2)
    bench.round()
    assert (bench.worn("a")[0], bench.worn("b")[0]) == (5, 10)
    bench.round()
    assert bench.worn("a")[0] == 7.578125


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        ({}, (0.25, 0.5)),  # no more parts than steps
        ({"schedule": "even"}, (0.5, 0.5)),
        ({"schedule": "start"}, (0.5, 0.0)),
        ({"parts": 1}, (0.5, 0.0)),
        ({"beta": 0.0}, (0.0, 0.0)),
    ],
)
def test_fedppa_has_three_schedules(options: dict[str, Any], shares: tuple[float, float]) -> None:
    bench = Bench(build("fedppa", options), steps=2)
    bench.state = Ranked(0, numbers(FRONT=9.0, TRUNK=0.0, HEAD=0.0))
    bench.kept["a"] = {"personal": numbers(FRONT=6.0, TRUNK=0.0, HEAD=0.0)}
    bench.round("b")
    front = 6.0
    for share in shares:  # so much of the way to 9, then half of the way to 8
        front += share * (9 - front)
        front += (8 - front) / 2
    assert bench.worn("a")[0] == front


def test_fedppa_by_p2_pulls_ever_harder() -> None:
    # As fedprox in the first round: 5/8 of the way. Then from v: v/16 + 5t/8 + 5g/16 with g 7.5.
    bench = Bench(build("fedppa", {"form": "prox", "mu": 0.5, "ramp": 0}), steps=2)
    bench.round()
    assert bench.worn("a") == (5, 10, 20)
    bench.round()
    assert bench.worn("a")[0] == 0.3125 + 5 + 2.34375
    # Of T_w = 2 rounds the first has half of mu: 4, then the slope is (4 - 8) + 0.25 * 4 = -3.
    bench = Bench(build("fedppa", {"form": "prox", "mu": 0.5, "ramp": 2}), steps=2)
    bench.round()
    assert bench.worn("a")[0] == 5.5


def told(entropy: float | None, **values: float) -> Parcel:
    loose = {} if entropy is None else {"entropy": torch.tensor(entropy)}
    return Parcel({"personal": numbers(**values)}, tensors=loose)


def merged(replies: Mapping[str, Parcel]) -> dict[str, float]:
    bench = Bench(FedPpa(weigh="entropy"), rows={client: [A] for client in replies})
    found = bench.strategy.merge(Ranked(0, {}), replies, bench.turn())
    return {k: float(v) for k, v in taken(found.adapter, 0).items()}


def test_fedppa_plus_weighs_by_entropy() -> None:
    # (0.5 * 4 + 1.5 * 8) / 2 = 7; b alone has a trunk, and it comes back as it is.
    found = merged({"a": told(0.5, FRONT=4.0), "b": told(1.5, FRONT=8.0, TRUNK=0.3)})
    assert found == {FRONT: 7, TRUNK: float(torch.tensor(0.3))}


# ---- the oracles of the section


@pytest.mark.parametrize("seats", [SEATS, whole(4)], ids=["mixed cuts", "whole"])
def test_identical_architectures_beta_one_at_the_start_only_is_fedavg(seats: Any) -> None:
    once = FedPpa(beta=1.0, schedule="start", parts=3)
    found, fedavg = (ran(m, seats) for m in (once, FedAvg()))
    assert same(taken(found.state.adapter, 3), fedavg.state)
    assert not same(taken(ran(HALF, seats).state.adapter, 3), fedavg.state)


def test_parts_are_epochs_where_the_recipe_has_as_many() -> None:
    epochs = replace(PLAIN, batch=12, steps=None, epochs=2)
    fedavg = ran(FedAvg(), U, training=epochs)
    start = ran(FedPpa(beta=1.0, schedule="start", parts=2), U, training=epochs)
    assert same(taken(start.state.adapter, 3), fedavg.state)
    rising = FedPpa(beta=1.0, parts=2)  # half of the way, an epoch, all of it, an epoch
    steps = replace(PLAIN, batch=12)
    assert alike(ran(rising, U, training=epochs), ran(rising, U, training=steps))


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"form": "prox", "mu": 0.0}])
def test_beta_zero_is_local_only(options: dict[str, Any]) -> None:
    found = ran(FedPpa(**options), SEATS)
    local = ran(Local(), SEATS)
    assert alike(found, local)
    assert not alike(ran(FedPpa(), SEATS), local)


def labelled(labels: Mapping[str, tuple[int, ...]]) -> dict[str, Shard]:
    """A shard per client with those labels and rows of its own."""
    return {
        client: Shard(replace(examples(seed, len(given)), labels=given))
        for seed, (client, given) in enumerate(labels.items())
    }


EVEN, SKEWED, ONE = (0, 1, 2, 0, 1, 2), (0, 0, 0, 0, 0, 1), (1, 1, 1, 1, 1, 1)


def states(third: tuple[int, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What is common after two rounds, with FedPPA+ and with FedPPA."""
    shards = labelled({"a": EVEN, "b": EVEN[::-1], "c": third})
    methods = FedPpa(weigh="entropy"), FedPpa()
    plus, plain = (ran(m, U, shards=shards).state.adapter for m in methods)
    return plus, plain


def test_equal_histograms_make_fedppa_plus_fedppa() -> None:
    plus, plain = states((2, 2, 1, 1, 0, 0))
    assert same(plus, plain)
    plus, plain = states(SKEWED)
    assert not same(plus, plain)


def test_entropy_of_a_one_class_client_is_zero_and_so_is_its_weight() -> None:
    entropies = [label_entropy(shard.train) for shard in labelled({"a": EVEN, "b": ONE}).values()]
    assert [float(e) for e in entropies] == [pytest.approx(1.0986123), 0.0]
    both = merged({"a": told(0.7, FRONT=4.0), "b": told(0.0, FRONT=8.0)})
    assert both == {FRONT: 4}


def test_all_entropies_zero_fall_back_to_uniform() -> None:
    assert merged({"a": told(0.0, FRONT=4.0), "b": told(0.0, FRONT=8.0)}) == {FRONT: 6}
    # Also where only those count nothing who have the layer; and what is no entropy counts nothing.
    some = {"a": told(0.0, FRONT=4.0), "b": told(-1.0, FRONT=8.0), "c": told(0.7, TRUNK=1.0)}
    assert merged(some) == {FRONT: 6, TRUNK: 1}
    assert merged({"a": told(None, FRONT=4.0), "b": told(0.2, FRONT=8.0)}) == {FRONT: 8}


RANKED = (replace(U, rank=2), Seat(Cut(2, 0)), whole(4))  # the others have the recipe's, 3


def test_a_layer_of_one_contributor_returns_unchanged() -> None:
    """Nobody shares c0's pairs, so they are as if it were alone with them; the head is common."""
    found = ran(FedPpa(), RANKED)
    apart = ran(FedPpa(head="private"), RANKED)
    local = ran(Local(), RANKED)
    assert same(apart.adapters["c0"], local.adapters["c0"])
    assert not same(apart.adapters["c1"], local.adapters["c1"])
    head = "base_model.model.classifier.weight"
    assert not torch.equal(found.adapters["c0"][head], local.adapters["c0"][head])
    for arrival in found.arrivals:
        sent = arrival.reply.adapters["personal"] if arrival.reply else {}
        assert any("lora_" in k for k in sent) == (arrival.client != "c0")


def test_ranks_are_averaged_each_for_itself() -> None:
    seats = (U, replace(U, rank=2), Seat(Cut(2, 0)), replace(whole(4), rank=2))
    every: dict[str, Any] = {"rounds": 1, "seeds": (1, 2, 3, 4)}
    found = ran(FedPpa(beta=0.0), seats, **every).state.adapter
    local = ran(Local(), seats, **every).adapters
    for rank, clients in ((3, ("c0", "c2")), (2, ("c1", "c3"))):
        for k, v in taken(found, rank).items():
            held = [local[c][k] for c in (clients if "lora_" in k else local)]
            assert torch.allclose(v, torch.stack(held).mean(0), atol=1e-7), k


def test_equal_shapes_at_swapped_positions_are_not_common() -> None:
    there = merged({"a": told(1.0, FRONT=4.0), "b": told(1.0, TRUNK=8.0)})
    assert there == {FRONT: 4, TRUNK: 8}
    assert merged({"a": told(1.0, FRONT=4.0), "b": told(1.0, FRONT=8.0)}) == {FRONT: 6}


# ---- relations


@pytest.mark.parametrize("beta", [0.5, 0.3])
def test_p1_of_one_part_is_the_mix_of_flexp(beta: float) -> None:
    """All layers are common and aligned; g_l is the reference."""
    found = play(FedPpa(parts=1, beta=beta), SEATS)
    mixed = FlexPSfl(trunk="pulled", form="mix", align=beta)
    assert alike(found, play(mixed, SEATS))
    assert not alike(found, play(FedPpa(parts=3, beta=beta), SEATS))


def test_p1_without_upload_is_the_mix_of_flexp_towards_hosted_layers() -> None:
    """Every block is at the server for somebody; the head is nobody's there, so it is private."""
    seats = (Seat(Cut(0, 2)), Seat(Cut(2, 0)))
    more: dict[str, Any] = {"seeds": (1, 2), "profile": "open"}
    found = play(FedPpa(parts=1, upload="far"), seats, **more)
    mixed = FlexP(trunk="pulled", form="mix", align=0.5, head="free")
    assert alike(found, play(mixed, seats, **more))


def test_what_nobody_hosts_is_private_without_upload() -> None:
    found = ran(FedPpa(upload="far"), U, keep_crossings=True)
    local = ran(Local(), U)
    offered = {backbone().block_of(k.partition("@")[0]) for k in found.state.adapter}
    assert offered == {0, 1, 2, 3, 4}  # as everybody began
    sent = {c.name for a in found.arrivals for c in a.ledger.crossings or () if c.way == "up"}
    assert sent == {"hidden", "mask", "grad"}
    fetched = {k for a in found.arrivals for (_, k) in a.ledger.kinds}
    assert not any("slot" in k for k in fetched)
    assert not alike(found, local)  # the trunk approaches its mean


# ---- what a round costs


BLOCK0 = Where(names="*.layer.0.*")
COSTS: dict[str, tuple[FedPpa, Any, Any]] = {
    "common layers each way": (FedPpa(), ALL, ALL),
    "and one float": (FedPpa(weigh="entropy"), ALL, lambda size: size(ALL) + 4),  # pyright: ignore[reportUnknownLambdaType]
    "without the head": (FedPpa(head="private"), ~HEAD, ~HEAD),
    "P2": (FedPpa(form="prox"), ALL, ALL),
    "nothing up": (FedPpa(upload="far"), ~(BLOCK0 | HEAD), NONE),
}


@pytest.mark.parametrize("name", COSTS)
def test_a_round_of_fedppa_costs(name: str) -> None:
    method, down, up = COSTS[name]
    check_round(method, 1, down, up)


# ---- where it cannot run


def setting(**changes: Any) -> Setting:
    seats = {"anna": U, "ben": replace(U, rank=2)}
    return replace(Setting("classification", Lora(3, 6.0), seats, 4, head=True), **changes)


HEADS = {"anna": ("classification", "a", "b"), "ben": ("classification", "c", "d")}


@pytest.mark.parametrize(
    ("method", "changes", "why"),
    [
        (FedPpa(), {}, ""),
        (FedPpa(weigh="entropy"), {}, ""),
        (FedPpa(), {"heads": HEADS}, "brings the heads of all clients together"),
        (FedPpa(head="private"), {"heads": HEADS}, ""),
        (FedPpa(weigh="entropy"), {"task": "causal-lm"}, 'Set strategy.weigh to "uniform"'),
    ],
)
def test_fedppa_says_where_it_cannot_run(method: FedPpa, changes: Any, why: str) -> None:
    found = method.refuses(setting(**changes))
    assert (why in found) if why else not found
