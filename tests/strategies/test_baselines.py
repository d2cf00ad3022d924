"""The baselines: what each must equal, bit for bit, and what a round of it costs."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from strategies.prices import SGD, check_round
from toys import Played, backbone, play, same, shard, whole

from flexp.client.desk import Desk, Training
from flexp.data.examples import Shard
from flexp.dice import Dice
from flexp.evaluate import pooled
from flexp.model.adapter import Dense, Ia3, Lora
from flexp.model.backbone import Backbone
from flexp.model.cut import Cut, Seat
from flexp.model.ops import Optim
from flexp.parcel import Parcel
from flexp.products import lora_pairs
from flexp.selection import ALL, FAR, Where
from flexp.strategies.base import ClientId, Setting, Strategy, Turn
from flexp.strategies.ditto import Ditto
from flexp.strategies.fedavg import FedAvg
from flexp.strategies.fedper import FedPer
from flexp.strategies.fedprox import FedProx
from flexp.strategies.ffa_lora import FfaLora
from flexp.strategies.flexp import FlexP
from flexp.strategies.local import Local
from flexp.strategies.pooled import Pooled
from flexp.strategies.sl import Sl
from flexp.strategies.splitfed_v1 import SplitFedV1
from flexp.strategies.splitfed_v2 import SplitFedV2
from flexp.strategies.splitfed_v3 import SplitFedV3
from flexp.strategies.splitlora import SplitLora
from flexp.tensors import Tensors

U, V = Seat(Cut(1, 1)), Seat(Cut(2), "loss")
MIXED = (U, Seat(Cut(2, 0)), whole(4))
DICE = Dice(0)("initial")
VS = (Seat(Cut(1), "logits"), Seat(Cut(3), "loss"), Seat(Cut(3, 1)))
HEADLESS = Lora(rank=3, alpha=6.0, head=False)


@functools.cache
def body() -> Backbone:
    return backbone()


def alike(a: Played, b: Played) -> bool:
    return all(same(a.adapters[c], b.adapters[c]) for c in a.adapters)


@pytest.mark.parametrize("seats", [MIXED, VS], ids=["mixed", "v-shape"])
def test_splitfed_v1_is_fedavg_of_the_whole_net(seats: Sequence[Seat]) -> None:
    split = play(SplitFedV1(), seats, rounds=3, profile="open")
    fedavg = play(FedAvg(), whole(), rounds=3)
    assert alike(split, fedavg)
    assert same(split.state, fedavg.state)


@pytest.mark.parametrize("seat", [U, V, Seat(Cut(1), "logits")], ids=["u", "v", "logits"])
def test_splitfed_v3_is_flexp_without_alignment(seat: Seat) -> None:
    v3 = play(SplitFedV3(), seat, rounds=3, profile="open")
    assert alike(
        v3, play(FlexP(align=0.0, head="free", moments="keep"), seat, rounds=3, profile="open")
    )
    assert not alike(v3, play(FlexP(align=1.0), seat, rounds=3, profile="open"))


def test_splitfed_v3_that_hosts_nothing_far_is_local() -> None:
    assert alike(play(SplitFedV3(), whole()), play(Local(), whole()))


def test_fedprox_without_its_pull_is_fedavg() -> None:
    fedavg = play(FedAvg(), MIXED)
    assert alike(play(FedProx(mu=0.0), MIXED), fedavg)
    assert not alike(play(FedProx(mu=1.0), MIXED), fedavg)


def test_ditto_is_fedavg_and_without_its_pull_local() -> None:
    free, held = play(Ditto(lam=0.0), MIXED), play(Ditto(lam=1.0), MIXED)
    local, fedavg = play(Local(), MIXED), play(FedAvg(), MIXED)
    assert alike(free, local)
    assert not alike(held, local)
    assert same(free.state, fedavg.state)
    assert same(held.state, fedavg.state)  # the personal adapters do not touch the shared one


def test_fedper_without_a_head_is_fedavg_and_with_all_blocks_personal_local() -> None:
    assert alike(play(FedPer(), MIXED, kind=HEADLESS), play(FedAvg(), MIXED, kind=HEADLESS))
    # Blocks 1 to 3 stay personal; with block 0 frozen by nothing, only its sharing is left.
    some, none = play(FedPer(blocks=3), MIXED), play(FedPer(), MIXED)
    assert {body().block_of(k) for k in some.state} == {0}
    assert {body().block_of(k) for k in none.state} == {0, 1, 2, 3}


def test_one_client_alone_is_one_client_alone() -> None:
    """With nobody to share with, methods differ only in what their optimizers remember."""
    plain: dict[str, Any] = {"rounds": 3, "seeds": (1,), "training": SGD}
    for seat in (U, whole()):
        local = play(Local(), [seat], **plain)
        for method in (Pooled(), FedAvg(), FedPer(), Sl(), SplitFedV1(), SplitFedV2(), SplitLora()):
            seats = [whole()] if method.name == "pooled" else [seat]
            assert alike(play(method, seats, **plain), local), method.name
        keeps: dict[str, Any] = {"rounds": 3, "seeds": (1,)}  # AdamW
        kept = play(Local(), [seat], **keeps)
        for method in (Pooled(), SplitFedV2(), SplitFedV3(), SplitLora()):
            seats = [whole()] if method.name == "pooled" else [seat]
            assert alike(play(method, seats, **keeps), kept), method.name


def test_splitlora_that_averages_every_round_is_splitfed_v2() -> None:
    v2, seats = play(SplitFedV2(), MIXED, rounds=4), MIXED
    assert alike(play(SplitLora(), seats, rounds=4), v2)
    rare = play(SplitLora(every=2), seats, rounds=4)
    assert not alike(rare, v2)
    before, after = (play(SplitLora(every=2), U, rounds=n) for n in (3, 4))
    assert before.state.count == 1
    assert not same(before.adapters["c0"], before.adapters["c1"])  # own fronts in between
    assert same(after.adapters["c0"], after.adapters["c1"])


def test_splitfed_v2_whole_is_fedavg_and_cut_a_relay_of_the_server_net() -> None:
    assert alike(play(SplitFedV2(), whole(), training=SGD), play(FedAvg(), whole(), training=SGD))
    # One round at one cut: the far net saw one client after the other, like the relay's.
    v2 = play(SplitFedV2(), U, rounds=1, training=SGD)
    fedavg = play(FedAvg(), U, rounds=1, training=SGD)
    far = [k for k in fedavg.state if body().place(k, U).side == "far" and "lora_B" in k]
    assert far
    for k in far:
        moved = v2.adapters["c0"][k].norm(), fedavg.state[k].norm()
        assert moved[0] > 1.5 * moved[1]  # three clients' steps, not their mean


def test_the_relay_is_one_model_trained_on_client_after_client() -> None:
    """Two clients in turn: the second alone, begun where the first alone ended."""
    relay = play(Sl(), [U, Seat(Cut(2, 1))], rounds=1, seeds=(1, 2))
    first = play(FedAvg(), [whole()], rounds=1, seeds=(1,))
    begun = Begun(first.state)
    # c1's data, under its own name: c0 is in the round, and does nothing.
    second = play(begun, [whole()] * 2, rounds=1, seeds=(1, 2))
    assert same(relay.state, second.state)


class Begun(FedAvg):
    """FedAvg from a given adapter, of which only client c1 trains."""

    def __init__(self, adapter: Tensors) -> None:
        object.__setattr__(self, "adapter", adapter)

    def start(self, scene: Any) -> Tensors:
        return vars(self)["adapter"]

    def waves(self, state: Tensors, chosen: Sequence[str], dice: Any) -> list[list[str]]:
        return [["c1"]]


def test_the_mean_of_ffa_lora_is_exact() -> None:
    """sum p_i B_i A = (sum p_i B_i) A, where FedAvg of both factors is off."""

    def off(strategy: Strategy[Any]) -> float:
        played = play(strategy, MIXED, rounds=1)
        copies = [a.reply.adapters["personal"] for a in played.arrivals if a.reply is not None]
        weights = [a.rows / sum(b.rows for b in played.arrivals) for a in played.arrivals]
        merged, begun = played.adapters["c0"], body().initial(Lora(3, 6.0), DICE)
        worst = 0.0
        for a, b in lora_pairs(merged).values():
            true = sum(
                (w * c[b].double() @ c.get(a, begun[a]).double()
                 for w, c in zip(weights, copies, strict=True)),
                torch.zeros((), dtype=torch.float64),
            )  # fmt: skip
            made = merged[b].double() @ merged[a].double()
            worst = max(worst, float((made - true).norm() / true.norm()))
        return worst

    assert off(FfaLora()) < 1e-6
    assert off(FedAvg()) > 1e-3


def test_ffa_lora_never_moves_a() -> None:
    played = play(FfaLora(), MIXED, keep_crossings=True)
    begun = body().initial(Lora(3, 6.0), DICE)
    for adapter in played.adapters.values():
        assert same(*({k: v for k, v in x.items() if "lora_A" in k} for x in (adapter, begun)))
    for arrival in played.arrivals:
        assert not any("lora_A" in c.name for c in arrival.ledger.crossings or ())


def test_pooled_is_one_machine_with_everybodys_rows() -> None:
    """Three clients' rows in one shard, as many steps as all three: local there is the same."""
    together = pooled({f"c{n}": shard(n + 1) for n in range(3)}, None, "train")
    assert len(together) == 36
    for training in (SGD, replace(SGD, optim=Optim(lr=1e-2))):
        steps = replace(training, steps=6)
        alone = play(Local(), whole(), training=steps, shards={"c0": Shard(together)})
        found = play(Pooled(), whole(), training=training)
        for adapter in found.adapters.values():
            assert same(adapter, alone.adapters["c0"])
    epoch = Training(Optim(lr=1e-2), batch=4, epochs=1)
    alone = play(Local(), whole(), training=epoch, shards={"c0": Shard(together)})
    assert same(play(Pooled(), whole(), training=epoch).state.adapter, alone.adapters["c0"])


@dataclass(frozen=True)
class SharedTrunk(FedAvg):
    """FedAvg that trains and averages what is far, and nothing else."""

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        return desk.reply("personal", where=FAR, facts=desk.fit(train=FAR))

    def merge(self, state: Tensors, replies: Mapping[ClientId, Parcel], turn: Turn) -> Tensors:
        return {**state, **super().merge(state, replies, turn)}


def test_flexp_with_frozen_near_parts_is_fedavg_of_the_trunk() -> None:
    frozen = FlexP(form="freeze", head="aligned")  # at equal cuts nobody hosts a near block
    assert alike(play(frozen, U), play(SharedTrunk(), U))


# ---- what a round costs


NOT_A = ~Where(names="*.lora_A.*")
# method: fits per turn, near tensors sent down and up, in the second round
COSTS: dict[str, tuple[Strategy[Any], int, Where, Where]] = {
    "local": (Local(), 1, ~ALL, ~ALL),
    "fedavg": (FedAvg(), 1, ALL, ALL),
    "fedprox": (FedProx(), 1, ALL, ALL),
    "ditto": (Ditto(), 2, ALL, ALL),
    "fedper": (FedPer(), 1, ~Where(part="head"), ~Where(part="head")),
    "ffa_lora": (FfaLora(), 1, NOT_A, NOT_A),
    "sl": (Sl(), 1, ALL, ALL),
    "splitfed_v1": (SplitFedV1(), 1, ALL, ALL),
    "splitfed_v2": (SplitFedV2(), 1, ALL, ALL),
    "splitfed_v3": (SplitFedV3(), 1, ~ALL, ~ALL),
    "splitlora": (SplitLora(), 1, ALL, ALL),
    "flexp": (FlexP(align=0.0, head="free", moments="keep"), 1, ~ALL, ~ALL),
}


@pytest.mark.parametrize("name", COSTS)
def test_a_round_costs_what_the_formula_says(name: str) -> None:
    method, fits, down, up = COSTS[name]
    check_round(method, fits, down, up)


# ---- refusals


def setting(**changes: Any) -> Setting:
    seats = {"anna": U, "ben": Seat(Cut(2, 0))}
    common = Setting("classification", Lora(3, 6.0), seats, 4, head=True)
    return replace(common, **changes)


RANKS = {"anna": Seat(Cut(1, 1), rank=2), "ben": Seat(Cut(1, 1), rank=4)}


@pytest.mark.parametrize(
    ("method", "changes", "why"),
    [
        (FedPer(), {"head": False}, r"nobody trains one here. Set strategy.blocks"),
        (FedPer(blocks=4), {}, "blocks is 4, but the model has 4"),
        (FfaLora(), {"adapter": Ia3()}, "Set adapter.kind=lora"),
        (SplitLora(), {"adapter": Ia3()}, "Set adapter.kind=lora"),
        (FfaLora(), {"adapter": Dense()}, "Set adapter.kind=lora"),
        (SplitLora(), {"adapter": Dense()}, "Set adapter.kind=lora"),
        (FedAvg(), {"adapter": Dense()}, ""),
        (SplitLora(every=0), {}, "every is 0"),
        (FedAvg(), {"seats": RANKS}, "all clients need one rank"),
        (Local(), {"seats": RANKS}, ""),
        (FedPer(blocks=1), {"head": False}, ""),
        (FfaLora(), {}, ""),
    ],
)
def test_a_method_says_where_it_cannot_run(
    method: Strategy[Any], changes: dict[str, Any], why: str
) -> None:
    found = method.refuses(setting(**changes))
    assert (why in found) if why else not found
