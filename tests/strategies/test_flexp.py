"""FlexP-SFL: its alignments, its two servers and its presets, by hand and as equalities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from strategies.bowls import CUT, WHOLE, Bench
from toys import Played, backbone, play, same, whole

from flexp.client.desk import Desk, Training
from flexp.data.loss import apart, distillation
from flexp.errors import FlexpError
from flexp.model.adapter import Lora
from flexp.model.cut import Cut, Seat
from flexp.model.ops import Optim, Step
from flexp.model.slots import Slots
from flexp.parcel import Parcel
from flexp.selection import NEAR, Place, Where
from flexp.strategies import build
from flexp.strategies.base import Setting
from flexp.strategies.fedavg import FedAvg
from flexp.strategies.flexp import FlexP
from flexp.strategies.flexp_sfl import FlexPSfl
from flexp.tensors import agreed_mean

U = Seat(Cut(1, 1))
HOSTS = (Seat(Cut(1, 0)), Seat(Cut(2, 1)), Seat(Cut(1, 2)))  # far: 1 2 3, 2, 1
MIXED = {"a": CUT, "b": WHOLE}


def bench(name: str = "flexp", seats: Any = None, **options: Any) -> Bench:
    given: dict[str, Any] = {"head": "free", "compare": "factors", **options}
    return Bench(build(name, given), seats or MIXED, steps=2)


# ---- alignment by hand


def test_mix_moves_part_of_the_way_when_a_turn_begins() -> None:
    # Two steps go 3/4 of the way. a's block 1 is far: 12, and it has no other host.
    run = bench(align=0.5)
    run.round()
    assert run.worn("a") == (6, 12, 24)
    assert run.worn("b") == (12, 6, -12)
    # Fronts have no reference but 0: 6 -> 3 -> 6.75, 12 -> 6 -> 13.5. b's block 1 has a's 12:
    # 6 -> 9 -> 8.25. The heads are free, and a's trunk is shared.
    run.round()
    assert run.worn("a") == (6.75, 15, 30)
    assert run.worn("b") == (13.5, 8.25, -15)


def test_mix_reaches_its_strength_after_the_ramp() -> None:
    run = bench(align=0.5, ramp=4)
    run.round()
    run.round()  # 2 of 4: a quarter of the way, 6 -> 4.5 -> 7.125
    assert run.worn("a")[0] == 7.125


def test_freeze_puts_the_reference_and_trains_the_rest() -> None:
    run = bench(form="freeze")
    run.round()
    assert run.worn("a") == (0, 12, 24)
    assert run.worn("b") == (0, 12, -12)  # block 1 is what a's has become
    run.round()
    assert run.worn("b") == (0, 15, -15)


def test_only_the_blocks_next_to_the_cut_are_aligned() -> None:
    run = bench(align=1.0, nearest=0)
    run.round()
    run.round()
    assert run.worn("a") == (7.5, 15, 30)  # as if nothing were aligned
    places = [Seat(Cut(3, 2)).place(n, 8) for n in range(-1, 9)]
    assert [p.hops for p in places] == [3, 2, 1, 0, 2, 1, 0, 0, 1, 2]
    taken = [n - 1 for n, p in enumerate(places) if (NEAR & Where(nearest=2)).holds("x", p)]
    assert taken == [1, 2, 6, 7]


def test_a_pulled_trunk_stays_ones_own() -> None:
    # The merge is (12 + 3 * 6) / 4 = 7.5; from the middle of the way, 9.75 and 6.75, two steps.
    run = bench(seats=CUT, trunk="pulled")
    run.round()
    assert run.worn("a") == (6, 12, 24)
    run.round()
    assert run.worn("a") == (6.75, 14.4375, 30)
    assert run.worn("b") == (13.5, 7.6875, -15)


def test_a_fixed_head_is_everybodys_beginning() -> None:
    run = bench(seats=CUT, head="fixed")
    run.round()
    assert (run.worn("a")[2], run.worn("b")[2]) == (0, 0)
    played = play(FlexP(), U)
    one, two, _ = played.adapters.values()
    begun = played.engine.initial(FlexP().specs()["personal"])
    for k in (k for k in one if backbone().block_of(k) == 4):
        assert torch.equal(one[k], two[k])
        assert torch.equal(one[k], begun[k])
        assert k.endswith("bias") or torch.allclose(one[k].norm(dim=1), torch.ones(()))


def test_a_frozen_front_stays_where_it_began() -> None:
    run = bench(seats=CUT, front="frozen")
    run.round()
    assert run.worn("a") == (0, 7.5, 24)


def test_what_conflicts_is_projected_away() -> None:
    base = {"x": torch.tensor([1.0, 1.0])}
    items = [{"x": torch.tensor([2.0, 1.0])}, {"x": torch.tensor([0.0, 2.0])}]
    # (1, 0) and (-1, 1): less their parts along each other (0.5, 0.5) and (0, 1).
    assert agreed_mean(items, [1.0, 1.0], base)["x"].tolist() == [1.25, 1.75]
    assert agreed_mean(items[:1] * 2, [1.0, 3.0], base)["x"].tolist() == [2.0, 1.0]
    assert agreed_mean(items, [1.0, 1.0], {})["x"].tolist() == [1.0, 1.5]


def test_distances_between_two_models() -> None:
    mine, theirs = torch.randn(5, 3), torch.randn(5, 3)
    soft = torch.softmax(theirs / 2, -1)
    expected = 4 * torch.nn.functional.kl_div(
        torch.log_softmax(mine / 2, -1), soft, reduction="batchmean"
    )
    assert torch.allclose(distillation(mine, theirs, torch.zeros(5)), expected)
    rows, labels = torch.randn(2, 4, 7), torch.tensor([[-100, 3, 1, -100], [-100, -100, 2, 5]])
    picked = torch.stack([rows[0, 0], rows[0, 1], rows[1, 1], rows[1, 2]])
    teacher = torch.randn(2, 4, 7)
    known = torch.stack([teacher[0, 0], teacher[0, 1], teacher[1, 1], teacher[1, 2]])
    flat = distillation(picked, known, torch.zeros(4))
    assert torch.allclose(distillation(rows, teacher, labels), flat)
    hidden = torch.tensor([[[3.0, 0.0], [0.0, 9.0]]])
    turned = torch.tensor([[[5.0, 0.0], [2.0, 0.0]]])
    assert apart(hidden, turned, None).item() == pytest.approx(1.0)  # 0 and sqrt(2), squared
    assert apart(hidden, turned, torch.tensor([[1, 0]])).item() == 0.0


@pytest.mark.parametrize("option", ["distil", "feature"])
def test_forms_b_and_c_hold_the_model_back(option: str) -> None:
    free = play(FlexP(align=0.0, head="free"), U)
    held = play(build("flexp", {"align": 0.0, "head": "free", option: 30.0}), U)
    begun = free.engine.initial(FlexP.slots["personal"])

    def moved(played: Played) -> float:
        front = [k for k in begun if ".layer.0." in k and "lora_B" in k]
        return sum(float(a[k].square().sum()) for a in played.adapters.values() for k in front)

    assert moved(held) < 0.8 * moved(free)


# ---- the two servers


def test_one_client_alone_is_the_same_at_both_servers() -> None:
    options: dict[str, Any] = {"seeds": (1,), "rounds": 3}
    parallel = play(FlexP(moments="keep"), U, **options)
    sequential = play(FlexP(server="sequential", moments="keep"), U, **options)
    assert same(parallel.adapters["c0"], sequential.adapters["c0"])


PACES = {"c0": 1.0, "c1": 1.3, "c2": 10.0}
FLOWING = FlexP(server="sequential")


def test_a_straggler_slows_nobody() -> None:
    slow = play(FLOWING, HOSTS, rounds=3, paces=PACES)
    even = play(FLOWING, HOSTS, rounds=3, paces={**PACES, "c2": 1.0})
    done = {c: [a.clock for a in slow.arrivals if a.client == c] for c in PACES}
    other = {c: [a.clock for a in even.arrivals if a.client == c] for c in PACES}
    assert done["c0"] == other["c0"] == pytest.approx([3.0, 6.0, 9.0])
    assert done["c1"] == other["c1"] == pytest.approx([3.9, 7.8, 11.7])
    assert done["c2"] == pytest.approx([30.0, 60.0, 90.0])
    assert [a.client for a in slow.arrivals] == [
        "c0",
        "c1",
        "c0",
        "c1",
        "c0",
        "c1",
        "c2",
        "c2",
        "c2",
    ]


def test_a_recorded_order_gives_the_same_adapters() -> None:
    first = play(FLOWING, HOSTS, paces=PACES)
    again = play(FLOWING, HOSTS, paces={"c0": 5.0, "c1": 1.0, "c2": 2.0}, recorded=first.order)
    other = play(FLOWING, HOSTS, paces={"c0": 5.0, "c1": 1.0, "c2": 2.0})
    assert again.order == first.order
    assert all(same(first.adapters[c], again.adapters[c]) for c in PACES)
    assert other.order != first.order
    assert not all(same(first.adapters[c], other.adapters[c]) for c in PACES)


def test_a_recording_of_another_run_is_refused() -> None:
    with pytest.raises(FlexpError, match='message 3 is to be of "c9", but c0, c1, c2 wait'):
        play(FLOWING, HOSTS, recorded=["c0", "c1", "c2", "c9"])


def test_a_turn_that_fails_leaves_the_steps_of_others() -> None:
    clean = play(FLOWING, HOSTS, rounds=1, paces=PACES, seeds=(1, 2, 3))
    broken = play(FLOWING, HOSTS, rounds=1, paces=PACES, wrap=Broken("c2", 9).link)
    failed = [a.client for a in broken.arrivals if a.failure is not None]
    assert failed == ["c2"]
    assert len([a for a in broken.arrivals if a.reply is not None]) == 2
    begun = broken.engine.initial(FLOWING.specs()["personal"])
    moved = [k for k, v in broken.state.items() if not torch.equal(v, begun[k])]
    assert {backbone().block_of(k) for k in moved} == {1, 2, 3}
    assert not same(clean.state, broken.state)


@dataclass
class Broken:
    """A link that fails at one client's message of that number."""

    client: str
    at: int
    sent: int = 0
    inner: Any = None

    def link(self, client: str, inner: Any) -> Any:
        if client != self.client:
            return inner
        self.inner = inner
        return self

    def send(self, message: Any) -> Any:
        self.sent += 1
        if self.sent == self.at:
            raise OSError("the line is dead")
        return self.inner.send(message)

    def close(self) -> None:
        self.inner.close()


@pytest.mark.parametrize(("stale", "share"), [(0, 1.0), (1, 0.5), (3, 0.25)])
def test_a_stale_step_counts_less(stale: int, share: float) -> None:
    """With staleness 1, a step that n steps of others came before counts 1 / (1 + n)."""
    engine = play(FlexP(server="sequential", staleness=1.0), U, rounds=1).engine
    home = engine.tenants["c0"]
    home.seen, engine.tenants.steps = 10, 10 + stale
    aged = engine.tenants._aged(home, Step("personal", "personal@g", 2.0))
    assert isinstance(aged, Step)
    assert (aged.scale, aged.share) == (2.0, share)


@pytest.mark.parametrize("optim", [Optim("sgd", lr=0.1), Optim(lr=0.1)], ids=["sgd", "adamw"])
def test_a_share_of_a_step_moves_by_that_share(optim: Optim) -> None:
    """AdamW does not notice how long a gradient is, so a share is of the step."""

    def moved(share: float) -> float:
        slots = Slots(lambda name: Place("far", "trunk", 0, 1), 1, optims={"p": optim})
        slots.put("p", {"w": torch.tensor([1.0])})
        slots.put("p@g", {"w": torch.tensor([2.0])})
        slots.do([Step("p", "p@g", share=share)])
        return float(slots["p"]["w"]) - 1.0

    assert moved(1.0) < -0.05
    assert moved(0.25) == pytest.approx(0.25 * moved(1.0), rel=1e-5)


def test_combinations_that_mean_nothing_are_refused() -> None:
    setting = Setting("classification", Lora(3, 6.0), {"anna": U}, 4, head=True)
    for options, told in (
        ({"align": 3.0}, "at most 1"),
        ({"server": "sequential", "conflicts": "project"}, "no copies conflict"),
    ):
        assert told in build("flexp", options).refuses(setting)
    assert not build("flexp", {"align": 3.0, "form": "prox"}).refuses(setting)


# ---- presets


SGD = Training(Optim("sgd", lr=0.5), batch=4, steps=2)
UPLOAD: dict[str, Any] = {"align": 1.0, "moments": "fresh"}


def test_uploading_and_replacing_everything_is_fedavg() -> None:
    for seats in (whole(), HOSTS):
        v1 = play(FlexPSfl(**UPLOAD), seats, rounds=3)
        assert same(v1.state, play(FedAvg(), seats, rounds=3).state)


@dataclass(frozen=True)
class Backs(FedAvg):
    """FedAvg of all but a front of one block."""

    name: ClassVar[str] = "backs"

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        facts = desk.fit(train=~Where(part="front"))
        return desk.reply("personal", facts=facts)


def test_backs_averaged_until_a_round_then_alone() -> None:
    """PFSL-like: fronts frozen, tails and trunks averaged until a round; then only tails train."""
    pfsl = FlexPSfl(**UPLOAD, front="frozen", until=2)
    two, four = (play(pfsl, U, rounds=n, training=SGD) for n in (2, 4))
    averaged = play(Backs(), U, rounds=2, training=SGD)
    backs = {k: v for k, v in averaged.state.items() if backbone().block_of(k) > 0}
    assert same(two.state, backs)
    begun = two.engine.initial(FlexP.slots["personal"])
    one, other, _ = four.adapters.values()
    for k in one:
        block = backbone().block_of(k)
        if block < 1:
            assert torch.equal(one[k], begun[k])
        elif block < 3:
            assert torch.equal(one[k], averaged.state[k])
        else:
            assert not torch.equal(one[k], other[k]) or "lora_A" in k
            assert not torch.equal(one[k], two.adapters["c0"][k]) or "lora_A" in k


def test_v1_sends_near_parts_and_v2_none() -> None:
    for strategy, sent in ((FlexPSfl(), True), (build("flexp_sft", {}), False), (FlexP(), False)):
        played = play(strategy, U, keep_crossings=True)
        up = {
            c.name.split("/")[0]
            for a in played.arrivals
            for c in a.ledger.crossings or ()
            if c.way == "up"
        }
        assert up == {"hidden", "mask", "grad"} | ({"slot"} if sent else set())


@pytest.mark.parametrize(
    ("strategy", "why"),
    [
        (FlexP(trunk="pulled", server="sequential"), "no copies to pull"),
        (FlexPSfl(server="sequential"), "needs a round"),
    ],
)
def test_options_that_exclude_each_other_are_refused(strategy: FlexP, why: str) -> None:
    assert why in strategy.refuses(Setting("classification", Lora(), {"a": U}, 4, head=True))
