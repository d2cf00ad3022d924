"""Methods that correct, mix and pull, once by hand, and what each must equal.

The bench is that of ``test_by_hand.py``: a has one row and wants (8, 16, 32), b has three and wants
(16, 8, -16), front, trunk and head; they start at 0, and a step goes half of the way.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from strategies.bowls import A, B, Bench, flat
from strategies.pairs import MIXED, SGD, alike, ran
from toys import gap, play, same

from flexp.client.desk import Desk, Training
from flexp.model.adapter import Lora
from flexp.model.ops import Optim
from flexp.parcel import Parcel
from flexp.strategies import build
from flexp.strategies.apfl import Apfl
from flexp.strategies.base import Scene, Setting
from flexp.strategies.fedala import FedAla
from flexp.strategies.fedavg import FedAvg
from flexp.strategies.generator import code_of
from flexp.strategies.local import Local
from flexp.strategies.per_fedavg import PerFedAvg
from flexp.strategies.pfedhn import Maker, PFedHn
from flexp.strategies.pfedme import PFedMe
from flexp.strategies.scaffold import Scaffold

# ---- scaffold


def test_scaffold_corrects_each_step() -> None:
    # Two steps: a to (6, 12, 24), b to (12, 6, -12). The mean counts each once: (9, 9, 6). K eta is
    # 1, so the controls are what they moved: a's -(6, 12, 24), b's (-12, -6, 12), c (-9, -9, -6).
    bench = Bench(build("scaffold", {}), steps=2)
    bench.round()
    assert bench.both() == (9, 9, 6)
    assert flat(bench.state.controls) == (-18, -18, -12)  # their sum
    # a's front wants 8: slope 1 + 6 - 9 = -2, so 10; 2 + 6 - 9 = -1, so 10.5. b's wants 16:
    # -7 + 12 - 9 = -4, so 11; -5 + 12 - 9 = -2, so 12. The mean is 11.25, and so on.
    bench.round()
    assert bench.trained("a") == (10.5, 12, 12)
    assert bench.trained("b") == (12, 10.5, 3)
    assert bench.both() == (11.25, 11.25, 7.5)
    # a's control is -6 + 9 + (9 - 10.5) = 1.5, the mean of the slopes 1 and 2; b's is -6.
    assert flat(bench.kept["a"]["control"])[0] == 1.5
    assert flat(bench.state.controls)[0] == -4.5


def test_scaffold_divides_by_the_step_size_of_the_head() -> None:
    # One step of a quarter: a's head comes to 8, b's to -4. Their controls are the slopes all the
    # same, -32 and 16; and b's, which fails, does not count: c is -32 / 2, a part of N = 2.
    bench = Bench(build("scaffold", {}), optim=Optim("sgd", lr=0.5, head_lr=0.25))
    bench.round("b")
    assert bench.both() == (4, 8, 8)
    assert flat(bench.state.controls) == (-8, -16, -32)
    # b from there, without a control of its own: its front's slope is (4 - 16) - 4 = -16.
    bench.round()
    assert bench.trained("b")[0] == 12


def test_scaffold_moves_the_server_by_its_rate() -> None:
    bench = Bench(build("scaffold", {"server_lr": 0.5}))
    bench.round()
    assert bench.both() == (3, 3, 2)  # half of the way to (6, 6, 4)


def test_the_first_round_of_scaffold_is_fedavg() -> None:
    first, later = (ran(Scaffold(), rounds=n, training=SGD) for n in (1, 2))
    assert alike(first, ran(FedAvg(), rounds=1, training=SGD))  # equal rows
    assert not alike(later, ran(FedAvg(), rounds=2, training=SGD))
    # One client is its own mean: its control is the common one, and nothing is corrected.
    alone = play(Scaffold(), MIXED[:1], seeds=(1,), training=SGD)
    fedavg = play(FedAvg(), MIXED[:1], seeds=(1,), training=SGD)
    assert gap(alone.adapters["c0"], fedavg.adapters["c0"]) < 1e-6


@pytest.mark.parametrize(
    "training",
    [
        Training(),
        replace(SGD, optim=Optim("sgd", momentum=0.9)),
        replace(SGD, clip_norm=1.0),
    ],
)
def test_scaffold_refuses_what_has_no_sum_of_step_sizes(training: Training) -> None:
    setting = Setting("classification", Lora(), {"a": MIXED[0]}, 4, head=True)
    assert Scaffold().refuses(replace(setting, training=SGD)) == ""
    found = Scaffold().refuses(replace(setting, training=training))
    assert "Set train.optimizer=sgd, without train.momentum and clip_norm" in found


# ---- mixes and pulls


def test_apfl_moves_the_own_adapter_by_the_slope_at_the_mix() -> None:
    # All at 0. Half of the slope goes to v: a's (2, 4, 8), b's (4, 2, -4). w is FedAvg's.
    bench = Bench(build("apfl", {"rate": 0.0}))
    bench.round()
    assert flat(bench.state) == (7, 5, -2)
    assert bench.worn("a") == (4.5, 4.5, 3)  # the middle of (2, 4, 8) and (7, 5, -2)
    assert bench.worn("b") == (5.5, 3.5, -3)


def test_apfl_learns_how_much_is_its_own() -> None:
    # In the first round v = w, so alpha stays. Then a's slope at (4.5, 4.5, 3) is -(3.5, 11.5, 29),
    # and its product with v - w = (-5, -1, 10) is -261. v moves by half of half of the slope.
    bench, share = Bench(build("apfl", {"rate": 1 / 1024})), 0.5 + 261 / 1024
    bench.round()
    bench.round()
    assert bench.memories["a"].facts["alpha"] == share
    own, shared = (2.875, 6.875, 15.25), (10.5, 7.5, -3)
    assert flat(bench.state) == shared
    expected = [share * v + (1 - share) * w for v, w in zip(own, shared, strict=True)]
    assert bench.worn("a") == tuple(expected)
    bench = Bench(build("apfl", {"rate": 1.0}))
    bench.round()
    bench.round()
    assert bench.memories["a"].facts["alpha"] == 1.0  # and no more


def test_apfl_of_one_share_is_local_and_of_none_fedavg() -> None:
    own, none = (ran(Apfl(alpha=a, rate=0.0)) for a in (1.0, 0.0))
    fedavg = ran(FedAvg())
    assert alike(own, ran(Local()))
    assert alike(none, fedavg)
    learned = ran(Apfl())
    assert same(own.state, fedavg.state)
    assert same(learned.state, fedavg.state)
    assert not alike(learned, ran(Apfl(rate=0.0)))


def test_pfedme_follows_its_envelopes() -> None:
    # Two steps towards t, pulled to w by 0.5: 5/8 of the way from 0. Then w_i goes half of the way
    # to theta: a's (2.5, 5, 10), b's (5, 2.5, -5). Their mean: (2.5 + 15) / 4 = 4.375 and so on.
    options = {"lam": 0.5, "inner": 2, "rate": 1.0}
    bench = Bench(build("pfedme", options))
    bench.round()
    assert bench.worn("a") == (5, 10, 20)
    assert bench.worn("b") == (10, 5, -10)
    assert flat(bench.state) == (4.375, 3.125, -1.25)
    half = Bench(build("pfedme", {**options, "beta": 0.5}))
    half.round()
    assert flat(half.state) == (2.1875, 1.5625, -0.625)


def test_pfedme_goes_on_from_batch_to_batch_and_begins_anew_from_round_to_round() -> None:
    # A step is theta/4 + t/2 + w/4. a's front in the second batch, from 5 and w_i = 2.5: 5.875,
    # then 6.09375; w_i goes half of the way there, 4.296875.
    bench = Bench(build("pfedme", {"lam": 0.5, "inner": 2, "rate": 1.0}), steps=2)
    bench.round()
    assert bench.worn("a")[0] == 6.09375
    assert flat(bench.replies["a"].adapters["shared"])[0] == 4.296875
    # Next both begin at w, b's w_i being twice a's: (1 + 6) / 4 * 4.296875.
    w = 7.51953125
    assert flat(bench.state)[0] == w
    bench.round()
    one = w / 4 + 4 + w / 4
    two = one / 4 + 4 + w / 4
    near = (w + two) / 2
    three = two / 4 + 4 + near / 4
    assert bench.worn("a")[0] == three / 4 + 4 + near / 4


def test_pfedme_that_takes_theta_over_after_one_step_is_fedavg() -> None:
    for beta, rounds in ((1.0, 2), (0.0, 0)):
        found = ran(PFedMe(lam=2.0, inner=1, rate=0.5, beta=beta))
        assert same(found.state, ran(FedAvg(), rounds=rounds).state)
    assert not same(ran(PFedMe()).state, ran(FedAvg()).state)


def test_per_fedavg_moves_the_start_by_the_slope_one_step_further() -> None:
    # A quarter of the way is 3/4 of the slope left: a step of a half goes 3/8 of the way. From 0
    # a comes to (3, 6, 12), b to (6, 3, -6): (3 + 18) / 4 = 5.25, 3.75, (12 - 18) / 4 = -1.5.
    bench = Bench(build("per_fedavg", {"alpha": 0.25}), rows={"a": [A] * 2, "b": [B] * 6})
    bench.round()
    assert flat(bench.state) == (5.25, 3.75, -1.5)
    # What a serves is a quarter further from there to what it wants.
    assert bench.worn("a") == (5.9375, 6.8125, 6.875)
    assert bench.worn("b") == (7.9375, 4.8125, -5.125)


def test_per_fedavg_without_a_hessian_takes_a_difference_of_slopes() -> None:
    # The bowls' H is 1, and differences of straight slopes are exact: 3/4 of 3/4 is left, half of
    # which is 9/32. a's front comes to 2.25, b's to 4.5: (2.25 + 13.5) / 4 = 3.9375.
    options = {"alpha": 0.25, "form": "hessian-free", "delta": 0.5}
    bench = Bench(build("per_fedavg", options), rows={"a": [A] * 3, "b": [B] * 9})
    bench.round()
    assert flat(bench.state) == (3.9375, 2.8125, -1.125)


@dataclass(frozen=True)
class Second(FedAvg):
    """FedAvg on the second parts of batches of ``count`` times the size."""

    count: int = 2

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        size = self.count * desk.training.batch
        seconds = (batch.parts(self.count)[1] for batch in desk.batches(size=size))
        return desk.reply("personal", facts=desk.fit(batches=seconds))


def test_per_fedavg_that_does_not_adapt_is_fedavg_on_its_second_batches() -> None:
    assert alike(ran(PerFedAvg(alpha=0.0)), ran(Second()))
    assert alike(ran(PerFedAvg(alpha=0.0, form="hessian-free")), ran(Second(3)))
    free, first = (ran(PerFedAvg(alpha=0.5, form=f)) for f in ("hessian-free", "first-order"))
    assert not same(free.state, first.state)


def test_fedala_keeps_what_it_has_learned_to_keep() -> None:
    # First everybody is where everybody began, and there is nothing to learn: FedAvg, (7, 5, -2).
    options = {"blocks": 0, "rate": 2**-11, "passes": 1}
    bench = Bench(build("fedala", options))
    bench.round()
    assert bench.worn("a") == (4, 8, 16)
    assert flat(bench.state) == (7, 5, -2)
    # a's head at -2 has the slope -34, times the gap 18 to its own 16: V goes from 0 to 612 / 2048.
    # It begins at -2 + V 18 = 3.37890625, and goes half of the way to 32. The rest is FedAvg's.
    # b's: 14 times -6, so V = 84 / 2048, -2.24609375, and half of the way to -16.
    bench.round()
    assert flat(bench.kept["a"]["kept"]) == (0, 0, 612 / 2048)
    assert bench.worn("a") == (7.5, 10.5, 17.689453125)
    assert bench.worn("b") == (11.5, 6.5, -9.123046875)
    assert flat(bench.state) == (10.5, 7.5, -2.419921875)


def test_fedala_keeps_no_more_than_all() -> None:
    bench = Bench(build("fedala", {"blocks": 0, "settled": 1e9}))
    bench.round()
    bench.round()
    assert flat(bench.kept["a"]["kept"]) == (0, 0, 1)
    assert bench.worn("a") == (7.5, 10.5, 24)  # its own head, as in FedPer
    assert bench.memories["a"].facts["learned"] is True


def test_fedala_that_learns_nothing_is_fedavg() -> None:
    still, fedavg = ran(FedAla(rate=0.0)), ran(FedAvg())
    assert same(still.state, fedavg.state)
    assert same(ran(FedAla(), rounds=1).state, ran(FedAvg(), rounds=1).state)
    learned = ran(FedAla(passes=1))
    assert not same(learned.state, fedavg.state)
    assert not same(learned.adapters["c0"], learned.adapters["c1"])


def test_pfedhn_steps_through_what_it_made() -> None:
    # One hidden number per client: 1 for a, and 0 for b, whose -1 is cut off. All maps are 0 and
    # all begin at 0, so a is trained to (4, 8, 16) and b to (8, 4, -8). By the mean of both,
    # (7, 5, -2), moves what everybody gets; by a's quarter, (1, 2, 4), what is times the number.
    bench = Bench(build("pfedhn", {"rate": 1.0, "width": 1, "hidden": 1}))
    codes = {"a": torch.tensor([1.0]), "b": torch.tensor([-1.0])}
    bench.state = replace(bench.state, layers={"0": torch.tensor([[1.0]])}, clients=codes)
    bench.round()
    assert bench.worn("a") == (8, 7, 2)
    assert bench.worn("b") == (7, 5, -2)
    # a goes to (8, 11.5, 17), by (0, 4.5, 15), and b to (11.5, 6.5, -9), by (4.5, 1.5, -7).
    bench.round()
    assert flat(bench.state.begun) == (10.375, 7.25, -3.5)
    assert flat(bench.state.maps) == (1, 3.125, 7.75)
    # The slope at a's number: -(4.5 * 2 + 15 * 4) / 4 = -17.25, times 1 to the layer and to a.
    assert float(bench.state.layers["0"]) == float(bench.state.clients["a"]) == 18.25
    assert float(bench.state.clients["b"]) == -1.0


@dataclass(frozen=True)
class Blind(PFedHn):
    """A network that sees no difference between clients."""

    def start(self, scene: Scene) -> Maker:
        state = super().start(scene)
        return replace(state, layers={k: v * 0 for k, v in state.layers.items()})


def test_pfedhn_that_tells_nobody_apart_is_fedavg() -> None:
    found, fedavg = ran(Blind(rate=1.0)), ran(FedAvg())
    assert gap(found.adapters["c1"], fedavg.state) < 1e-5  # w - (w - t) is rounded
    assert gap(ran(PFedHn(rate=1.0)).adapters["c1"], fedavg.state) > 1e-3


def test_pfedhn_makes_something_for_who_comes_later() -> None:
    bench = Bench(build("pfedhn", {}))
    middle = (bench.state.clients["a"] + bench.state.clients["b"]) / 2
    assert torch.allclose(code_of(bench.state.clients, "c"), middle)
