"""pFedPG, once by hand and by the oracles of its specification."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from strategies.bowls import HEAD, PROMPT, Bench
from strategies.pictures import seen
from strategies.prices import SEATS, SGD, STEPS, body
from torch import Tensor
from torch.nn import functional
from toys import LENGTH, H, backbone, play, same, whole

from flexp.checkpoint import decode_state, encode_state
from flexp.model.adapter import Lora, Prompt
from flexp.model.cut import Cut, Seat
from flexp.model.ops import Optim
from flexp.parcel import decode, encode
from flexp.strategies import build
from flexp.strategies.base import Scene, Setting
from flexp.strategies.fedper import FedPer
from flexp.strategies.pfedpg import PFedPg
from flexp.strategies.prompt_generator import BASE, OUT, QUERY, VALUE, Generator, prompt_of

BEHIND = Prompt(3, at="behind")
PLAIN: dict[str, Any] = {"optimizer": "sgd", "rate": 1.0}
SHAPED: dict[str, Any] = {"start": {PROMPT: torch.zeros(2, 3)}}  # two positions of three numbers
CUTS = (Seat(Cut(1, 1)), Seat(Cut(2)), Seat(Cut(3), "loss"))


def small(clients: str = "ab", seed: int = 3) -> Generator:
    """A generator of two positions of three numbers."""
    bench = Bench(PFedPg(), rows={c: [(0,) * 6] for c in clients}, seed=seed, **SHAPED)
    return bench.state


def test_pfedpg_steps_through_attention_to_what_was_trained() -> None:
    # One position of one number: P = 2 + 2 * 1 * 1 = 4. a wants 8 of it, so it goes to 6, old less
    # new is -2. Slopes: of the base prompt 1 + 1 * 1 = 2 times that, of value and of out the base
    # prompt, 2, times that: all -4. A step of a quarter makes 3, 2, 2, so P = 3 + 3 * 2 * 2 = 15.
    start = {PROMPT: torch.zeros(1, 1), HEAD: torch.zeros(1, 1)}
    bench = Bench(build("pfedpg", {**PLAIN, "rate": 0.25}), rows={"a": [(8, 32)]}, start=start)
    psi = {k: torch.ones(1, 1) for k in bench.state.psi} | {BASE: torch.full((1, 1), 2.0)}
    bench.state = replace(bench.state, psi=psi)
    bench.round()
    assert float(bench.replies["a"].adapters["personal"][PROMPT]) == 6
    assert bench.replies["a"].adapters["personal"].keys() == {PROMPT}  # the head stays
    assert {k: float(bench.state.psi[k]) for k in (BASE, VALUE, OUT)} == {BASE: 3, VALUE: 2, OUT: 2}
    assert float(bench.state.made("a")) == 15
    assert float(bench.kept["a"]["personal"][HEAD]) == 16


def test_pfedpg_without_values_averages_prompts() -> None:
    # a's goes to 4, b's to 8: (4 + 3 * 8) / 4 = 7; alike 6; summed 12. Half of a step: 3.5.
    start = {PROMPT: torch.zeros(1, 1), HEAD: torch.zeros(1, 1)}
    rows = {"a": [(8, 32)], "b": [(16, -16)] * 3}
    for options, wanted in (
        ({}, 7.0),
        ({"weights": "equal"}, 6.0),
        ({"weights": "sum"}, 12.0),
        ({"rate": 0.5}, 3.5),
        ({"weights": "sum", "step": "in turn"}, 12.0),
    ):
        bench = Bench(build("pfedpg", {**PLAIN, "values": 0, **options}), rows=rows, start=start)
        zero = {**bench.state.psi, BASE: torch.zeros(1, 1)}
        bench.state = replace(bench.state, psi=zero)
        bench.round()
        assert float(bench.state.made("a")) == wanted, options
        assert float(bench.kept["b"]["personal"][HEAD]) == -8


# ---- oracles


def test_the_step_is_that_of_half_the_squared_gap_to_what_was_trained() -> None:
    state, trained = small(), torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    psi = {k: v.double().requires_grad_() for k, v in state.psi.items()}
    code = state.clients["a"].double().requires_grad_()
    gap = prompt_of(psi, code) - trained.double()
    (gap.square().sum() / 2).backward()
    change = state.made("a").double() - trained.double()
    after = state.stepped({"a": change}, {"a": 1.0}, Optim("sgd", 1.0))
    for k, v in state.psi.items():
        slope = psi[k].grad
        assert slope is not None
        assert torch.allclose(v - after.psi[k], slope.float(), atol=1e-6), k
    assert code.grad is not None
    assert torch.allclose(state.clients["a"] - after.clients["a"], code.grad.float(), atol=1e-6)
    assert torch.equal(after.clients["b"], state.clients["b"])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_one_clients_prompt_becomes_the_one_it_would_tune_by_itself(optimizer: Any) -> None:
    rows = {"a": [(1, -2, 3, 2, -1, 1)]}
    method = PFedPg(optimizer, 0.3 if optimizer == "sgd" else 0.05)
    bench = Bench(method, rows=rows, **SHAPED)
    for _ in range(250):
        bench.round()
    wanted = torch.tensor(rows["a"][0], dtype=torch.float32).reshape(2, 3)
    assert torch.allclose(bench.state.made("a"), wanted, atol=0.02)


def test_with_w_o_of_zeros_all_get_p_0_which_moves_by_the_mean_change() -> None:
    state = small()
    state = replace(state, psi={**state.psi, OUT: torch.zeros(3, 3)})
    assert torch.equal(state.made("a"), state.psi[BASE])
    assert torch.equal(state.made("b"), state.psi[BASE])
    changes = {c: torch.full((2, 3), float(n + 1)).double() for n, c in enumerate("ab")}
    after = state.stepped(changes, {"a": 0.5, "b": 0.5}, Optim("sgd", 1.0))
    assert torch.allclose(after.psi[BASE], state.psi[BASE] - 1.5)


class Like(PFedPg):
    """The same from the prompt that everybody begins with."""

    def start(self, scene: Scene) -> Generator:
        state = super().start(scene)
        begun = scene.initial(self.slots["personal"])[state.name]
        return replace(state, psi={**state.psi, BASE: begun})


@pytest.mark.parametrize("kind", [Prompt(3), BEHIND], ids=["front", "behind"])
def test_without_values_and_with_a_step_of_one_it_is_fedprompt(kind: Prompt) -> None:
    """FedPrompt is FedPer of a prompt: prompts are averaged, heads are personal. Bit for bit."""
    more: dict[str, Any] = {"kind": kind, "seeds": (1, 2), "rounds": 3}
    seats = (Seat(Cut(1, 1)), whole(4))
    found, fedper = play(Like("sgd", 1.0, values=0), seats, **more), play(FedPer(), seats, **more)
    (name,) = fedper.state
    assert torch.equal(found.state.psi[BASE], fedper.state[name])
    for client in ("c0", "c1"):
        mine, theirs = (e.engine.memories[client].slots["slot/personal"] for e in (found, fedper))
        heads = [k for k in mine if "classifier" in k]
        assert heads
        assert all(torch.equal(mine[k], theirs[k]) for k in heads)
    other = play(Like("sgd", 1.0), seats, **more)
    assert not torch.equal(other.state.psi[BASE], fedper.state[name])


def test_clients_with_equal_rows_get_prompts_that_are_alike() -> None:
    wanted = (3, -2, 1, 3, -2, 1)
    rows = {"a1": [wanted], "a2": [wanted], "b": [tuple(-x for x in wanted)]}
    bench = Bench(PFedPg("adamw", 0.05, descriptor_bound=1.0), rows=rows, **SHAPED)
    for _ in range(150):
        bench.round()
    one, two, other = (bench.state.made(c).flatten() for c in rows)
    alike = float(functional.cosine_similarity(one, two, dim=0))
    assert alike > 0.9
    assert float(functional.cosine_similarity(one, other, dim=0)) < min(alike, 0.5)


def test_the_backbone_stays_as_it_is() -> None:
    frozen = backbone()
    before = {k: v.clone() for k, v in frozen.model.state_dict().items()}
    play(PFedPg("sgd", 1.0), CUTS, kind=BEHIND, body=frozen, profile="open")
    now: Mapping[str, Tensor] = frozen.model.state_dict()
    assert all(torch.equal(v, now[k]) for k, v in before.items())


def test_a_client_that_comes_later_moves_its_descriptor_alone_at_first() -> None:
    state, change = small(), torch.ones(2, 3).double()
    first = state.stepped({"new": change}, {"new": 1.0}, Optim("sgd", 1.0), settle=1)
    assert same(first.psi, state.psi)
    middle = (state.clients["a"] + state.clients["b"]) / 2
    assert not torch.allclose(first.clients["new"], middle)
    second = first.stepped({"new": change}, {"new": 1.0}, Optim("sgd", 1.0), settle=1)
    assert not torch.equal(second.psi[BASE], first.psi[BASE])
    known = state.stepped({"a": change}, {"a": 1.0}, Optim("sgd", 1.0), settle=1)
    assert not torch.equal(known.psi[BASE], state.psi[BASE])


# ---- options


def test_true_slopes_are_the_change_of_one_plain_step() -> None:
    # A step of plain SGD with rate 0.5 changes a prompt by half of its slope; of three steps from
    # one place the slopes are alike, and the change is not three times the first one.
    for steps, alike in ((1, True), (3, False)):
        more: dict[str, Any] = {**SHAPED, "rows": {"a": [(1, 2, 3, 4, 5, 6)]}, "steps": steps}
        change = Bench(PFedPg("sgd", 0.1), **more)
        slope = Bench(PFedPg("sgd", 0.05, learn="slope"), **more)
        for bench in (change, slope):
            bench.round()
        gap = (change.state.psi[BASE] - slope.state.psi[BASE]).abs().max()
        assert (float(gap) < 1e-6) == alike
    assert slope.replies["a"].adapters.keys() == {"slope"}
    expected = 3 * (small("a", seed=0).made("a") - torch.arange(1.0, 7).reshape(2, 3))
    assert torch.allclose(slope.replies["a"].adapters["slope"][PROMPT], expected, atol=1e-5)


def test_an_optimizer_of_the_server_remembers_and_leaves_absent_clients_alone() -> None:
    state, change = small(), torch.ones(2, 3).double()
    once = state.stepped({"a": change}, {"a": 1.0}, Optim(lr=0.1))
    assert torch.equal(once.clients["b"], state.clients["b"])
    twice = once.stepped({"b": change}, {"b": 1.0}, Optim(lr=0.1))
    assert torch.equal(twice.clients["a"], once.clients["a"])
    anew = replace(once, memory={}).stepped({"b": change}, {"b": 1.0}, Optim(lr=0.1))
    assert not torch.equal(twice.psi[VALUE], anew.psi[VALUE])


def test_what_the_optimizer_remembers_can_be_saved() -> None:
    moved = small().stepped({"a": torch.ones(2, 3)}, {"a": 1.0}, Optim("adamw", lr=0.1))
    kept = decode_state(decode(encode(encode_state(moved))), PFedPg())
    assert kept.memory.keys() == moved.memory.keys() != set()
    assert all(same(kept.memory[k], moved.memory[k]) for k in moved.memory)


def test_clients_may_step_in_turn() -> None:
    more: dict[str, Any] = {**SHAPED, "rows": {"a": [(1,) * 6], "b": [(2,) * 6]}}
    methods = PFedPg("sgd", 0.1, step="in turn"), PFedPg("sgd", 0.1)
    bench, other = (Bench(method, **more) for method in methods)
    bench.round()
    other.round()
    assert not torch.equal(bench.state.psi[QUERY], other.state.psi[QUERY])


def test_sizes_and_bounds_are_as_asked() -> None:
    bench = Bench(PFedPg(keys=4, values=5, bound=0.25, descriptor_bound=1.0), **SHAPED)
    psi, codes = bench.state.psi, torch.stack(list(bench.state.clients.values()))
    assert [tuple(psi[k].shape) for k in psi] == [(2, 3), (3, 4), (3, 4), (3, 5), (5, 3)]
    assert float(psi[BASE].abs().max()) <= 0.25 < float(codes.abs().max()) <= 1
    assert float(small().psi[BASE].abs().max()) <= 1  # sqrt(3 / 3)


def test_pfedpg_makes_prompts_of_pictures() -> None:
    found = play(PFedPg("sgd", 1.0), SEATS, **seen("vit", BEHIND))
    assert all(a.failure is None for a in found.arrivals)
    still = play(PFedPg("sgd", 1.0), SEATS, rounds=1, **seen("vit", BEHIND))
    assert not torch.equal(found.state.psi[BASE], still.state.psi[BASE])


def test_pfedpg_refuses_what_is_no_prompt() -> None:
    setting = Setting("classification", Lora(), {"a": whole(4)}, 4, head=True)
    assert "Set adapter.kind=prompt" in PFedPg().refuses(setting)
    heads = {"a": ("classification", "x", "y"), "b": ("classification", "z", "w")}
    assert PFedPg().refuses(replace(setting, adapter=Prompt(), heads=heads)) == ""


# ---- what it costs


@pytest.mark.parametrize("kind", [Prompt(3), BEHIND], ids=["front", "behind"])
def test_a_round_of_pfedpg_costs_what_the_formula_says(kind: Prompt) -> None:
    # 2 m d q, and steps of 4 S of a text that is m longer.
    arrivals = play(PFedPg(), SEATS, kind=kind, training=SGD, body=body()).arrivals
    s, mask, prompt = 4 * (LENGTH + 3) * H * 4, 4 * (LENGTH + 3) * 8, 3 * H * 4
    for arrival in arrivals:
        assert arrival.failure is None
        steps = 0 if SEATS[int(arrival.client[1])] == whole(4) else STEPS
        assert (arrival.ledger.sent, arrival.ledger.received) == (
            steps * (2 * s + mask) + prompt,
            steps * 2 * s + prompt,
        ), arrival.client


@pytest.mark.parametrize("learn", ["change", "slope"])
def test_at_the_cut_nothing_of_a_prompt_travels_and_no_slope_comes_back(learn: Any) -> None:
    seats, kind = (Seat(Cut(1, 1)), Seat(Cut(2))), Prompt(3, at="cut")
    found = play(PFedPg("sgd", 1.0, learn=learn), seats, seeds=(1, 2), kind=kind, training=SGD)
    s, wide = 4 * LENGTH * H * 4, 4 * (LENGTH + 3) * H * 4
    for arrival in found.arrivals:
        assert arrival.failure is None
        assert (arrival.ledger.sent, arrival.ledger.received) == (
            STEPS * (s + 4 * LENGTH * 8 + wide),
            STEPS * wide,
        ), arrival.client
    begun = play(PFedPg("sgd", 1.0), seats, seeds=(1, 2), kind=kind, rounds=0).state
    assert not torch.equal(found.state.psi[BASE], begun.psi[BASE])


@pytest.mark.parametrize("kind", [BEHIND, Prompt(3, at="cut")], ids=["behind", "cut"])
def test_only_prompts_leave_and_heads_stay(kind: Prompt) -> None:
    seats = (Seat(Cut(1, 1)), Seat(Cut(2)))
    found = play(PFedPg(), seats, seeds=(1, 2), kind=kind, keep_crossings=True)
    for arrival in found.arrivals:
        crossed = arrival.ledger.crossings or ()
        names = {c.name for c in crossed if c.name.startswith("slot/") and c.way == "up"}
        assert names == (set() if kind.at == "cut" else {"slot/personal/prompt_behind"})
