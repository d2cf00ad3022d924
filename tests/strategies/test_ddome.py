"""DDOME, once by hand and by the oracles of its specification."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from strategies.bowls import Bench, flat, numbers
from strategies.pairs import SGD, alike
from strategies.prices import MASK, STEPS, S, body, sizer
from strategies.prices import SEATS as PRICED
from toys import H, at_desk, backbone, gap, play, same, whole

from flexp.client.desk import Training
from flexp.dice import Dice
from flexp.model.adapter import Lora, Prompt
from flexp.model.cut import Cut, Seat
from flexp.model.ops import Optim, SlotSpec
from flexp.parcel import Parcel
from flexp.selection import ALL
from flexp.strategies import build
from flexp.strategies.base import Scene, Setting
from flexp.strategies.ddome import Ddome
from flexp.strategies.experts import Experts, joint_loss, mixture
from flexp.strategies.fedavg import FedAvg
from flexp.strategies.gating import Gate, Lesson
from flexp.tensors import Tensors

KIND = Lora(rank=3, alpha=6.0)


# ---- by hand

PAIR: dict[str, Any] = {  # two numbers each, and those of c are a's; features are their signs
    "start": numbers(FRONT=0.0, TRUNK=0.0),
    "rows": {"a": [(8, -8)], "b": [(-8, 8)], "c": [(4, -4)]},
}
ANCHORED = {
    "experts": 2,
    "top": 1,
    "anchors": ("a", "b"),
    "newcomers": ("c",),
    "hidden": 0,
    "optimizer": "sgd",
    "rate": 2.0,
    "serve": "client",
}
ZERO = {"gate/0/weight": torch.zeros(2, 2), "gate/0/bias": torch.zeros(2)}


def test_ddome_trains_the_expert_of_an_anchor_and_routes_a_newcomer_to_it() -> None:
    bench = Bench(build("ddome", ANCHORED), **PAIR)
    bench.state = replace(bench.state, gate=ZERO)
    bench.round()
    # a goes half of the way to (8, -8) with the first expert, b to (-8, 8) with the second.
    assert [flat(held) for held in bench.state.held] == [(4, -4), (-4, 4)]
    # a's features are (1, -1), and its shares (1/2, 1/2) for (1, 0): the slope of the weights is
    # (-1/2, 1/2) times features, of the biases (-1/2, 1/2). A step of 2 is [[1, -1], [-1, 1]] and
    # (1, -1). b's is the same for weights, and (-1, 1) for biases. The mean is over rows alike.
    weight, bias = bench.state.gate["gate/0/weight"], bench.state.gate["gate/0/bias"]
    assert weight.flatten().tolist() == pytest.approx([1, -1, -1, 1], abs=1e-4)
    assert bias.tolist() == [0, 0]
    # c says (2, -2) to its own features (1, -1), so it gets a's expert; it has trained nothing.
    assert bench.serves("c") == (4, -4)
    assert bench.replies["c"].adapters == {}
    assert bench.replies["c"].facts["steps"] == 0


def test_a_mixture_is_the_log_of_the_mean_of_probabilities() -> None:
    # Of two classes: the first expert says 1/4, 3/4, the second 3/4, 1/4; shares are 1/3 and 2/3.
    # p = (1/12 + 6/12, 3/12 + 2/12) = (7/12, 5/12). The label is the first one, so responsibilities
    # are 1/7 and 6/7: slopes of what the gate says are 1/3 - 1/7 and 2/3 - 6/7, and of what the
    # first expert says 1/7 (1/4 - 1, 3/4).
    first = torch.tensor([[1.0, 3.0]]).log().requires_grad_()
    second = torch.tensor([[3.0, 1.0]]).log().requires_grad_()
    says = torch.tensor([[1.0, 2.0]]).log().requires_grad_()
    found = mixture([first, second], says)
    assert found.exp()[0].tolist() == pytest.approx([7 / 12, 5 / 12])
    torch.nn.functional.nll_loss(found, torch.tensor([0])).backward()
    assert says.grad is not None
    assert first.grad is not None
    assert says.grad[0].tolist() == pytest.approx([1 / 3 - 1 / 7, 2 / 3 - 6 / 7])
    assert first.grad[0].tolist() == pytest.approx([-3 / 28, 3 / 28])


def test_tokens_of_a_text_are_mixed_by_the_shares_of_their_row() -> None:
    logits = [torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    says = torch.tensor([[0.0, 0.0], [50.0, -50.0]])
    found = mixture(logits, says).exp()
    parts = [one.softmax(-1) for one in logits]
    assert torch.allclose(found[0], (parts[0][0] + parts[1][0]) / 2, atol=1e-6)
    assert torch.allclose(found[1], parts[0][1], atol=1e-6)


# ---- what it equals


SMALL: dict[str, Any] = {"body": backbone(depth=2), "seeds": (1, 2)}
TWO = (Seat(Cut(1)), whole(2))
ADAMW = Training(Optim(weight_decay=0.1), batch=4, steps=2)


@pytest.mark.parametrize(
    ("training", "more"), [(SGD, {}), (ADAMW, {"anchors": ("c1",), "weights": "shares"})]
)
def test_one_expert_is_fedavg_bit_for_bit(training: Training, more: Any) -> None:
    methods = (Ddome(1, 1, **more), FedAvg(), Ddome(2, 1, serve="client", differ=0.1))
    one, other, third = (play(m, TWO, training=training, **SMALL) for m in methods)
    assert alike(one, other)
    assert same(one.state.held[0], other.state)
    assert one.state.gate == {}
    assert not alike(third, other)


# ---- who learns


def opened(slots: int, family: str = "bert-cls") -> tuple[dict[str, SlotSpec], Parcel]:
    """Experts with numbers everywhere."""
    begun, held = backbone(family).initial(KIND, Dice(1)), dict[str, Tensors]()
    for n in range(slots):
        stream = torch.Generator().manual_seed(n)
        held[f"expert/{n}"] = {
            k: v + 0.3 * torch.randn(v.shape, generator=stream) for k, v in begun.items()
        }
    return {slot: SlotSpec() for slot in held}, Parcel(held)


def sure(k: int, experts: int) -> Gate:
    """A gate that gives every row to one expert, to the last bit."""
    gate = Gate({}, Dice(0), 0, experts)
    layers = gate.begun(H)
    layers["gate/0/bias"][k] = 1e4
    gate.tensors = layers
    return gate


@pytest.mark.parametrize("seat", [Seat(Cut(1, 1)), whole(4)], ids=["cut", "whole"])
def test_a_gate_that_is_sure_gives_gradient_to_its_expert_only(seat: Seat) -> None:
    slots, offer = opened(2)
    with at_desk(backbone(), seat, kind=KIND, slots=slots, offer=offer) as (desk, _):
        batch = next(desk.batches(steps=1))
        loss = joint_loss([0, 1], Lesson(sure(1, 2), Optim("sgd")), None, 1.0)
        desk.grad(loss(desk.model, batch), [*slots], ["g/0", "g/1"])
        desk.grad(desk.model.loss(batch, "expert/1"), ["expert/1"], ["alone"])
        none, some, alone = (desk.whole(slot) for slot in ("g/0", "g/1", "alone"))
    assert all(not v.any() for v in none.values())
    assert gap(some, alone) < 1e-6
    assert all(v.any() for v in some.values())


def test_an_expert_that_nobody_selects_is_bitwise_unchanged() -> None:
    method = Ddome(3, 1, anchors=("c0", "c1"), differ=0.1, hidden=0)
    begun, found = (play(method, TWO, rounds=n, **SMALL).state for n in (0, 1))
    moved = [not same(a, b) for a, b in zip(begun.held, found.held, strict=True)]
    assert moved == [True, True, False]
    assert found.gate.keys() == {"gate/0/weight", "gate/0/bias", "gate/centre"}


@dataclass(frozen=True)
class Begun(Ddome):
    """DDOME from given experts and a given gate."""

    begun: Experts | None = None

    def start(self, scene: Scene) -> Experts:
        assert self.begun is not None
        return self.begun


def test_permuting_expert_ids_permutes_everything() -> None:
    order = (2, 0, 1)  # what is where afterwards
    method = Ddome(3, 2, anchors=("c0", "c1", "c2"), hidden=4, rate=0.5, optimizer="sgd")
    how: dict[str, Any] = {"body": SMALL["body"], "training": SGD}
    begun = play(replace(method, differ=0.1), whole(2), rounds=0, **how).state
    begun = replace(begun, gate=Gate({}, Dice(1), 4, 3).begun(H))
    plain = play(Begun(**vars(method), begun=begun), whole(2), **how).state
    method = replace(method, anchors=tuple(method.anchors[k] for k in order))
    turned = play(Begun(**vars(method), begun=permuted(begun, order)), whole(2), **how).state
    assert between(permuted(plain, order), turned) < 1e-5
    assert between(permuted(plain, (0, 1, 2)), turned) > 1e-2
    assert min(gap(a, b) for a, b in zip(plain.held, begun.held, strict=True)) > 1e-2


def permuted(state: Experts, order: tuple[int, ...]) -> Experts:
    """The same experts under other numbers."""
    last = {k: v[list(order)] for k, v in state.gate.items() if k.startswith("gate/1")}
    return replace(state, held=tuple(state.held[k] for k in order), gate={**state.gate, **last})


def between(a: Experts, b: Experts) -> float:
    """The largest difference of two states."""
    held = zip((*a.held, a.gate), (*b.held, b.gate), strict=True)
    return max(gap(one, other) for one, other in held)


# ---- what is refused, and what it costs


def test_ddome_refuses_what_it_cannot_serve() -> None:
    setting = Setting("classification", Lora(), {"a": whole(4), "b": Seat(Cut(1))}, 4, head=True)
    assert Ddome().refuses(setting) == ""
    assert Ddome(anchors=("a",), newcomers=("b",)).refuses(setting) == ""
    assert '"c" is no client' in Ddome(newcomers=("c",)).refuses(setting)
    assert '"c" is no client' in Ddome(anchors=("a", "c")).refuses(setting)
    assert "Name fewer" in Ddome(newcomers=("a", "b")).refuses(setting)
    assert "Name fewer" in Ddome(newcomers=("a",), anchors=("a",)).refuses(setting)
    assert "Raise strategy.experts" in Ddome(1, anchors=("a", "b")).refuses(setting)
    prompts = replace(setting, adapter=Prompt(3))
    assert "Set strategy.serve=client" in Ddome().refuses(prompts)
    assert Ddome(serve="mixture").refuses(prompts) == ""
    assert Ddome(1).refuses(prompts) == ""
    ranks = replace(setting, seats={"a": Seat(Cut(1), rank=2), "b": Seat(Cut(1))})
    assert "Remove plan.ranks" in Ddome().refuses(ranks)
    heads = replace(setting, heads={"a": ("x", "y"), "b": ("u", "v")})
    assert "the heads of all clients together" in Ddome().refuses(heads)


@pytest.mark.parametrize(("top", "hidden"), [(1, 8), (2, 0)])
def test_a_round_of_ddome_costs_what_the_formula_says(top: int, hidden: int) -> None:
    # Of M = 3, K near experts each way, and the gate; a newcomer gets the gate alone. At a cut its
    # 12 rows go up and come down once for features, and a step is one of training per expert.
    method = Ddome(3, top, newcomers=("c2",), hidden=hidden)
    cuts = (*PRICED[:2], PRICED[0])
    played = play(method, cuts, rounds=2, training=SGD, body=body())
    begun = body().initial(KIND, Dice(0)("initial"))
    layers = (H + 1) * 3 if not hidden else (H + 1) * hidden + (hidden + 1) * 3
    for arrival in played.arrivals:
        assert arrival.failure is None
        ledger, near = arrival.ledger, sizer(begun, cuts[int(arrival.client[1])])(ALL)
        if arrival.client == "c2":
            assert (ledger.sent, ledger.received) == (0, 4 * (layers + H))
            continue
        assert (ledger.sent, ledger.received) == (
            3 * (S + MASK) + STEPS * top * (2 * S + MASK) + top * near + 4 * layers,
            3 * S + STEPS * top * 2 * S + top * near + 4 * (layers + H),  # with the centre
        ), arrival.client


def test_one_expert_costs_what_fedavg_does() -> None:
    found, plain = (play(m, PRICED, training=SGD, body=body()) for m in (Ddome(1), FedAvg()))
    for arrival, other in zip(found.arrivals, plain.arrivals, strict=True):
        ledgers = arrival.ledger, other.ledger
        assert len({(one.sent, one.received) for one in ledgers}) == 1
