"""Methods that share a part of the adapter, once by hand, and what each must equal.

The bench is that of ``test_by_hand.py``: a has one row and wants (8, 16, 32), b has three and wants
(16, 8, -16), front, trunk and head; they start at 0, and a step goes half of the way.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from strategies.bowls import Bench, flat
from strategies.pairs import alike, ran
from toys import model_of, same

from flexp.model.adapter import Dense, Lora
from flexp.selection import Place, Where
from flexp.strategies import build
from flexp.strategies.fedavg import FedAvg
from flexp.strategies.fedbabu import FedBabu
from flexp.strategies.fedbn import NORMS, FedBn
from flexp.strategies.fedper import FedPer
from flexp.strategies.fedrep import FedRep
from flexp.strategies.local import Local

HEADLESS = Lora(rank=3, alpha=6.0, head=False)


# ---- a shared part


def test_fedrep_trains_the_head_and_then_the_body() -> None:
    # Bowls do not mix blocks, so a round ends as FedPer's: bodies in the mean, (4 + 24) / 4 = 7.
    bench = Bench(build("fedrep", {}))
    bench.round()
    assert bench.worn("a") == (7, 5, 16)
    assert bench.worn("b") == (7, 5, -8)
    # With two steps for the head, a's goes to 24, b's to -12. (From 16 by 28 to 30 next.)
    bench = Bench(build("fedrep", {"head_steps": 2}))
    bench.round()
    assert bench.worn("a") == (7, 5, 24)
    assert bench.worn("b") == (7, 5, -12)
    bench.round()
    assert bench.worn("a") == (10.5, 7.5, 30)


def test_fedrep_keeps_the_last_block_if_asked() -> None:
    bench = Bench(build("fedrep", {"blocks": 1, "head_steps": 2}))
    bench.round()
    assert bench.worn("a") == (7, 12, 24)
    assert bench.worn("b") == (7, 6, -12)


class Together(FedRep):
    """FedRep whose parts move at once."""

    def phases(self) -> Sequence[tuple[Where, int | None]]:
        return [(~self.body | self.body, None)]


class Swapped(FedRep):
    """FedRep that begins with the body."""

    def phases(self) -> Sequence[tuple[Where, int | None]]:
        return super().phases()[::-1]


def test_fedrep_is_fedper_one_part_after_the_other() -> None:
    fedrep = ran(FedRep())
    assert alike(ran(Together()), ran(FedPer()))
    assert not alike(fedrep, ran(FedPer()))
    assert not alike(fedrep, ran(Swapped()))  # the order counts
    assert alike(ran(FedRep(), kind=HEADLESS), ran(FedAvg(), kind=HEADLESS))


def test_fedbabu_learns_under_a_fixed_head_and_tunes_at_the_end() -> None:
    bench = Bench(build("fedbabu", {}), rounds=2)
    bench.round()
    assert bench.both() == (7, 5, 0)
    # The second round is the last: from there, half of the way to what each wants.
    bench.round()
    assert flat(bench.state.bodies["0"]) == (7, 5)
    assert bench.worn("a") == (7.5, 10.5, 16)
    assert bench.worn("b") == (11.5, 6.5, -8)
    assert not bench.replies["a"].adapters


def test_fedbabu_goes_on_tuning_where_it_was_and_serves_the_body_to_who_missed_it() -> None:
    bench = Bench(build("fedbabu", {"tune": "head", "tune_rounds": 2}), rounds=3)
    bench.round()
    bench.round("b")
    assert bench.worn("a") == (7, 5, 16)
    assert bench.worn("b") == (7, 5, 0)
    bench.round()
    assert bench.worn("a") == (7, 5, 24)
    assert bench.worn("b") == (7, 5, -8)


def test_fedbabu_without_tuning_is_fedrep_without_steps_of_the_head() -> None:
    plain = ran(FedBabu(tune_rounds=0))
    assert alike(ran(FedRep(head_steps=0)), plain)
    assert same(plain.state.bodies["0"], ran(FedBabu(), rounds=3).state.bodies["0"])
    tuned = ran(FedBabu(), rounds=1)  # a run that is all tuning
    assert alike(tuned, ran(Local(), rounds=1))


NORMED = Dense(("query", "LayerNorm"))


def test_fedbn_keeps_normalisations() -> None:
    # The bench's trunk by the name of a norm: fronts and heads are averaged, trunks stay.
    bench = Bench(Trunk())
    bench.round()
    assert bench.worn("a") == (7, 8, -2)
    assert bench.worn("b") == (7, 4, -2)
    bench.round()
    assert bench.worn("a") == (10.5, 12, -3)


class Trunk(FedBn):
    """FedBN that takes block 1 for a normalisation."""

    @property
    def body(self) -> Where:
        return ~Where(names="*.1.*")


def test_fedbn_without_normalisations_is_fedavg() -> None:
    assert alike(ran(FedBn()), ran(FedAvg()))
    found = ran(FedBn(), kind=NORMED)
    assert not alike(found, ran(FedAvg(), kind=NORMED))
    one, two = found.adapters["c0"], found.adapters["c1"]
    assert {k for k in one if not torch.equal(one[k], two[k])} == {k for k in one if "Norm" in k}


@pytest.mark.parametrize("family", ["bert-cls", "llama", "gpt2", "distilbert-cls", "vit", "qwen3"])
def test_fedbn_finds_the_normalisations_of_a_model(family: str) -> None:
    model = model_of(family, 2)
    kinds = {p: "norm" in type(m).__name__.lower() for p, m in model.named_modules()}
    place = Place("near", "front", 0, 2)
    for name, _ in model.named_parameters():
        path = name.rpartition(".")[0]
        assert NORMS.holds(f"base_model.model.{name}", place) == kinds[path], name
