"""The laws hold for methods that keep them, and name themselves when a method does not."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch

from flexp import laws
from flexp.client.desk import Desk, Training
from flexp.errors import StrategyError
from flexp.model.adapter import Dense
from flexp.model.cut import Cut
from flexp.model.ops import Optim, SlotSpec
from flexp.parcel import Parcel
from flexp.privacy.egress import Leave
from flexp.selection import ALL, Where
from flexp.strategies.base import ClientId, Served, Setting, Strategy, Turn
from flexp.strategies.fedavg import FedAvg
from flexp.strategies.fedbn import FedBn
from flexp.strategies.fedprox import FedProx
from flexp.strategies.flexp import FlexP
from flexp.strategies.local import Local
from flexp.strategies.pooled import Pooled
from flexp.strategies.pretrained import Base
from flexp.strategies.scaffold import Scaffold
from flexp.strategies.splitfed_v1 import SplitFedV1
from flexp.strategies.splitfed_v2 import SplitFedV2
from flexp.tensors import Mix, Tensors, Term, mean

# ---- methods that keep them


@pytest.mark.parametrize(
    ("method", "alone"),
    [
        (FedAvg(), None),
        (Local(), None),
        (Base(), None),
        (Pooled(), None),  # no cut at all
        (FlexP(), FlexP(align=0.0, head="free")),
        (SplitFedV2(), SplitFedV2()),  # waves, and a slot at the server
    ],
    ids=lambda one: one.name if one else "",
)
@pytest.mark.daily("pooled-", "flexp-flexp", "splitfed_v2-splitfed_v2")
def test_methods_keep_the_laws(method: Strategy[Any], alone: Strategy[Any] | None) -> None:
    laws.check(method, alone=alone)


@pytest.mark.slow
def test_methods_that_refuse_adamw_or_lora_are_told_other_ground() -> None:
    plain = laws.Ground(Training(Optim("sgd", lr=1.0), batch=4, steps=2))
    with pytest.raises(StrategyError, match=r"cannot be checked .* Set train.optimizer=sgd"):
        laws.check(Scaffold())
    laws.check(Scaffold(), ground=plain)
    assert laws.alike(FedProx(mu=0.0), FedAvg(), ground=plain)
    assert not laws.alike(Scaffold(), FedAvg(), ground=plain)
    with pytest.raises(StrategyError, match=r"cannot be checked .* Set adapter.kind=dense"):
        laws.check(FedBn())
    laws.check(FedBn(), ground=laws.Ground(kind=Dense(("query", "LayerNorm"))))


def test_a_method_that_needs_the_whole_model_is_checked_whole() -> None:
    class Sees(FedAvg):
        """Looks at the whole model, and says so."""

        split: ClassVar[str] = "no: it reads the last block's weights."

        def train(self, desk: Desk, offer: Parcel) -> Parcel:
            assert desk.model.far is None
            return super().train(desk, offer)

    laws.check(Sees())


def test_a_method_that_refuses_some_seats_is_checked_at_the_others() -> None:
    class Tail(FedAvg):
        """Wants the head at the client."""

        def refuses(self, setting: Setting) -> str:
            far = any(seat.labels != "keep" for seat in setting.seats.values())
            return 'it needs the head. Set plan.labels to "keep".' if far else ""

        def train(self, desk: Desk, offer: Parcel) -> Parcel:
            assert desk.seat.labels == "keep"
            return super().train(desk, offer)

    laws.check(Tail())


def test_a_method_that_refuses_everything_cannot_be_checked() -> None:
    class Never(FedAvg):
        """Wants something else."""

        def refuses(self, setting: Setting) -> str:
            return "it needs images. Set task.kind."

    with pytest.raises(StrategyError, match=r"cannot be checked .* it needs images"):
        laws.check(Never())


def test_a_predictor_that_is_no_adapter_is_compared_by_what_it_predicts() -> None:
    class Blend(FedAvg):
        """Serves a mix of the shared adapter."""

        def personal(self, desk: Desk, offer: Parcel) -> Served:
            worn: Mix = (Term("personal", 0.5),)
            return Served(lambda batch: desk.model.logits(batch, worn), None)

    laws.check(Blend())
    assert not laws.alike(Blend(), FedAvg())


# ---- methods that do not


class Uploads(FedAvg):
    """Sends an adapter that it did not declare."""

    leaves: ClassVar[tuple[Leave, ...]] = ()


class Confides(FedAvg):
    """Sends labels in a loose tensor."""

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        facts = desk.fit()
        labels = torch.tensor(desk.shard.train.labels)
        return desk.reply("personal", tensors={"labels": labels}, facts=facts)


class Branches(FedAvg):
    """Trains less where little of the model is near."""

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        facts = desk.fit(steps=1 if desk.seat.cut == Cut(1, 1) else None)
        return desk.reply("personal", facts=facts)


class OnlyNear(FedAvg):
    """Merges what is near for each client, and forgets that it depends on the cut."""

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        facts = desk.fit(train=Where(side="near"))
        return desk.reply("personal", facts=facts)


class Hides(FedAvg):
    """Draws from nobody's dice."""

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        facts = desk.fit()
        desk.assign("personal", (Term("personal", random.uniform(0.9, 1.0)),))
        return desk.reply("personal", facts=facts)


class Relays(FedAvg):
    """Clients in the order in which they were chosen."""

    def waves(
        self, state: Tensors, chosen: Sequence[ClientId], dice: Any
    ) -> Sequence[Sequence[ClientId]]:
        return [[client] for client in chosen]


class Collects(FedAvg):
    """State with a set in it."""

    def start(self, scene: Any) -> Any:
        return {"w": super().start(scene), "seen": {"anna"}}

    def offer(self, state: Any, client: ClientId, turn: Turn) -> Parcel:
        return super().offer(state["w"], client, turn)

    def merge(self, state: Any, replies: Mapping[ClientId, Parcel], turn: Turn) -> Any:
        return {**state, "w": super().merge(state["w"], replies, turn)}


class Jots(FedAvg):
    """A memory of what is no JSON."""

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        note: Any = desk.shard
        desk.memory.facts["shard"] = note
        return super().train(desk, offer)


class Tells(FedAvg):
    """Facts that no server takes."""

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        return desk.reply("personal", facts={**desk.fit(), "best": float("nan")})


@dataclass(frozen=True)
class Remembers(FedAvg):
    """Keeps the last mean on itself, anew in every run."""

    def start(self, scene: Any) -> Tensors:
        object.__setattr__(self, "kept", None)
        return super().start(scene)

    def merge(self, state: Tensors, replies: Mapping[ClientId, Parcel], turn: Turn) -> Tensors:
        found = super().merge(state, replies, turn)
        before = getattr(self, "kept", None)
        object.__setattr__(self, "kept", found)
        return found if before is None else mean([found, before], [1.0, 1.0])


class Keeps(FedAvg):
    """Personal adapters that are declared common."""

    slots: ClassVar[Mapping[str, SlotSpec]] = {"personal": SlotSpec(lasts="run")}

    def offer(self, state: Tensors, client: ClientId, turn: Turn) -> Parcel:
        return Parcel()


class Claims(FedAvg):
    """A common adapter that is declared personal."""

    own: ClassVar[Where] = ALL


class Stops(FedAvg):
    """Fails at the desk."""

    def train(self, desk: Desk, offer: Parcel) -> Parcel:
        raise ValueError("nothing to learn")


class Silent(FedAvg):
    pass


class Secret(FedAvg):
    """Does not say why something leaves."""

    leaves: ClassVar[tuple[Leave, ...]] = (Leave("personal"),)


class Odd(FedAvg):
    """A kind that nobody knows."""

    kind: ClassVar[Any] = "best"


BROKEN: list[tuple[type[FedAvg], str, str]] = [
    (Uploads, laws.DECLARED, "slot/personal/"),
    (Confides, laws.DECLARED, "tensor/labels"),
    (Branches, laws.CUT, "ends with other"),
    (OnlyNear, laws.CUT, "ends with other"),
    (Hides, laws.REPEATED, "ends with other"),
    (Relays, laws.ORDER, "ends with other"),
    (Collects, laws.DATA, "holds a set"),
    (Jots, laws.DATA, "facts.shard"),
    (Tells, laws.TURNS, "facts"),
    (Remembers, laws.DATA, "ends with other"),
    (Keeps, laws.OWN, "not own, but clients differ"),
    (Claims, laws.OWN, "own, but clients have the same"),
    (Stops, laws.TURNS, "ValueError: nothing to learn"),
    (Silent, laws.DESCRIBED, "docstring"),
    (Secret, laws.DESCRIBED, "why"),
    (Odd, laws.DESCRIBED, "kind"),
]


@pytest.mark.parametrize(
    ("method", "law", "what"), BROKEN, ids=lambda one: getattr(one, "__name__", "")
)
def test_a_broken_law_is_named(method: type[FedAvg], law: str, what: str) -> None:
    with pytest.raises(StrategyError) as found:
        laws.check(method())
    said = str(found.value)
    assert said.startswith(f'"fedavg" breaks the law "{law}": ')
    assert what in said
    assert laws.LAWS[law] in said


def test_every_law_has_a_method_that_breaks_it() -> None:
    assert {law for _, law, _ in BROKEN} == set(laws.LAWS)


def test_a_method_of_which_near_and_far_learn_apart_says_so() -> None:
    with pytest.raises(StrategyError, match=laws.CUT):
        laws.check(FlexP())
    with pytest.raises(StrategyError, match=laws.CUT):
        laws.check(FlexP(), alone=FlexP(align=5.0))


# ---- equal methods, and what a check leaves alone


def test_methods_are_alike_or_not() -> None:
    assert laws.alike(FedProx(mu=0.0), FedAvg())
    assert laws.alike(SplitFedV1(), FedAvg())
    assert not laws.alike(FedProx(mu=5.0), FedAvg())


def test_methods_that_share_no_seat_are_not_alike() -> None:
    class Far(FedAvg):
        """Wants the head at the server."""

        def refuses(self, setting: Setting) -> str:
            near = any(seat.labels == "keep" for seat in setting.seats.values())
            return "it needs the head at the server." if near else ""

    laws.check(Far())
    assert not laws.alike(Far(), replace(Pooled()))


def test_a_check_leaves_the_threads_as_they_were() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(StrategyError):
            laws.check(Stops())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_the_model_of_a_check_is_the_same_in_every_process() -> None:
    begun = laws._body().model.state_dict()
    torch.rand(3)
    laws._body.cache_clear()
    again = laws._body().model.state_dict()
    assert all(torch.equal(begun[k], again[k]) for k in begun)
