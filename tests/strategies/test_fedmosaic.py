"""FedMosaic, once by hand and by the oracles of its specification."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from strategies import prices
from strategies.bowls import FRONT, HEAD, TRUNK, Bench
from strategies.prices import MASK, SEATS, SGD, STEPS, S, sizer
from torch import Tensor
from toys import Played, backbone, play, same, whole

from flexp.dice import Dice
from flexp.model.adapter import Lora
from flexp.model.colora import CoLora
from flexp.model.cut import Cut, Seat
from flexp.parcel import Parcel
from flexp.strategies import build, fedmosaic
from flexp.strategies.base import Setting, Turn
from flexp.strategies.fedmosaic import FROZEN, GATE, MATCHED, PLAIN, FedMosaic, Mosaic
from flexp.strategies.local import Local
from flexp.strategies.rela import likeness, shares
from flexp.tensors import Tensors

KIND = CoLora(3, 6.0, groups=2)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- RELA


def test_clients_with_one_signature_are_all_alike_and_get_the_mean_of_the_others() -> None:
    s = likeness([drawn(5, 7)] * 3)
    assert torch.allclose(s, torch.ones(3, 3, dtype=torch.float64))
    assert shares(s[0, 1:].tolist(), 0.5) == pytest.approx([0.5, 0.5])
    turn = Turn(1, 2, 0, True, dict.fromkeys("abc", whole(4)), {}, lambda name: 0, 4)
    models = {c: {"x.lora_A.y": torch.tensor([float(n)])} for n, c in enumerate("abc")}
    state = Mosaic(models, dict.fromkeys("abc", drawn(5, 7)))
    given = [FedMosaic().offer(state, c, turn).adapters["others"]["x.lora_A.y"] for c in "abc"]
    assert [float(v) for v in given] == pytest.approx([1.5, 1.0, 0.5])


def test_two_clusters_help_those_within_them() -> None:
    one, two = drawn(40, 7, seed=1), drawn(40, 7, seed=2)
    s = likeness([v + 0.1 * drawn(40, 7, seed=3 + n) for n, v in enumerate((one, one, two, two))])
    assert float(s[:2, :2].min()) > 0.95
    assert float(s[2:, 2:].min()) > 0.95
    assert float(s[:2, 2:].abs().max()) < 0.3
    assert torch.equal(s, s.T)
    for i, friend in ((0, 0), (1, 0), (2, 2), (3, 2)):
        row = [x for j, x in enumerate(s[i].tolist()) if j != i]
        assert shares(row, 0.05)[friend] > 0.9


def test_likeness_is_of_columns_and_an_empty_one_counts_for_nobody() -> None:
    one = torch.tensor([[1.0, 0.0, 3.0], [0.0, 2.0, 3.0]])
    two = torch.tensor([[9.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
    # Cosines 1 and -1; the last column of the second says nothing.
    assert float(likeness([one, two])[0, 1]) == 0
    assert float(likeness([one, torch.zeros(2, 3)])[0, 1]) == 0


def test_at_any_temperature_shares_add_up_and_heat_makes_them_even() -> None:
    row = [0.9, 0.1, -0.5]
    for tau in (0.01, 0.5, 10.0):
        assert sum(shares(row, tau)) == pytest.approx(1)
    assert shares(row, 1e9) == pytest.approx([1 / 3] * 3)
    assert shares([0.9, 0.1], 0.5)[0] == pytest.approx(1 / (1 + 2.718281828 ** (-0.8 / 0.5)))


# ---- by hand


def test_fedmosaic_weighs_who_is_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    # Signatures a (1, 0), b (1, 0) and c (0, 1), so S_ab = 1 and S_ac = 0: at tau = 1 / ln 3 a's
    # shares of b and c are 3/4 and 1/4. a and b have one model, c another, of which block 5 is
    # a's block 1. So a's P is 3/4 * 8 + 1/4 * 4 = 7, and its plain tensor is b's, 2.
    two, other = Seat(Cut(1)), Seat(Cut(1), model="larger")
    seats = {"a": two, "b": two, "c": other}
    where: Any = lambda name: int(name.split(".")[1])  # noqa: E731
    turn = Turn(1, 2, 0, True, seats, {}, where, 2, others={"larger": (where, 6)})
    names = {"a": 1, "b": 1, "c": 5}
    values = {"a": (0.0, 0.0), "b": (8.0, 2.0), "c": (4.0, 6.0)}
    models = {
        c: {
            f"m.{names[c]}.q.colora_P": torch.tensor([p]),
            f"m.{names[c] - 1}.q.lora_A.w": torch.tensor([v]),
        }
        for c, (p, v) in values.items()
    }
    east, north = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]])
    state = Mosaic(models, {"a": east, "b": east, "c": north})
    method = FedMosaic(tau=1 / 1.0986122887)
    given = method.offer(state, "a", turn)
    assert given.facts == {"matched": True, "plain": True}
    found = {k: float(v) for k, v in given.adapters["others"].items()}
    assert found == pytest.approx({"m.1.q.colora_P": 7.0, "m.0.q.lora_A.w": 2.0})
    # c has no kin: it gets P and Q alone, of a and b alike, under the name of its own block.
    given = method.offer(state, "c", turn)
    assert given.facts == {"matched": True, "plain": False}
    assert {k: float(v) for k, v in given.adapters["others"].items()} == {"m.5.q.colora_P": 4.0}
    # Who has given nothing yet is offered nothing.
    assert method.offer(state, "d", replace(turn, seats={**seats, "d": two})).adapters == {}


def test_a_signature_fades_by_half_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    # The probe says 8, 4 in the first turn, with a batch each: M is 6 and so is h. Then 2, 0, so M
    # is 1 and h (1 + 6) / 2 = 3.5. Of ten rows the first four stay.
    said = iter([8.0, 4.0, 2.0, 0.0])
    monkeypatch.setattr(fedmosaic, "signature", lambda *_: torch.full((10, 1), next(said)))
    method = build("fedmosaic", {"gate": "local", "noise": 0.0, "every": 2})
    one = Bench(method, steps=4, rows={"a": [(8, 16, 32)]})
    monkeypatch.setattr(one, "sit", with_probe(one.sit))
    for expected in (6.0, 3.5):
        one.round()
        found = one.replies["a"].tensors["signature"]
        assert found.tolist() == [[expected]] * 4
        assert torch.equal(one.state.signatures["a"], found)
    assert {*one.replies["a"].adapters["personal"]} == {FRONT, TRUNK}  # HEAD stays
    assert HEAD in one.kept["a"]["personal"]


def with_probe(sit: Any) -> Any:
    def seated(*given: Any) -> Any:
        return replace(sit(*given), probe=object())

    return seated


def test_noise_on_a_signature_has_its_deviation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fedmosaic, "signature", lambda *_: torch.zeros(100, 100))
    one = Bench(build("fedmosaic", {"gate": "local", "noise": 0.25}), rows={"a": [(8, 16, 32)]})
    monkeypatch.setattr(one, "sit", with_probe(one.sit))
    one.round()
    assert float(one.replies["a"].tensors["signature"].std()) == pytest.approx(0.25, rel=0.05)


# ---- on a model


def of(played: Played, client: str = "c0") -> Tensors:
    """A client's personal adapter, from both sides."""
    near = played.engine.memories[client].slots["slot/personal"]
    return {**near, **played.engine.tenants[client].slots.values.get("personal", {})}


def test_without_others_it_is_local_training() -> None:
    how: dict[str, Any] = {"kind": KIND, "training": SGD, "seeds": (1, 2), "body": backbone()}
    alone = play(FedMosaic(gate="local"), SEATS[:2], **how)

    class Still(Local):
        """Local, but for what Co-LoRA does not train."""

        def train(self, desk: Any, offer: Parcel) -> Parcel:
            return Parcel(facts=desk.fit(train={"personal": ~(FROZEN | GATE)}))

    for client in ("c0", "c1"):
        assert same(of(alone, client), of(play(Still(), SEATS[:2], **how), client))


def test_frozen_factors_stay_and_what_is_exchanged_changes_what_is_said() -> None:
    method, body = FedMosaic(gate_noise=0.0), backbone()
    played = play(method, SEATS[:2], kind=KIND, seeds=(1, 2), body=body, rounds=2)
    begun = body.initial(KIND, Dice(0)("initial"))
    for client in ("c0", "c1"):
        found = of(played, client)
        for k, v in begun.items():
            frozen = k.endswith(("colora_A", "colora_B"))
            assert torch.equal(found[k], v) == frozen, k
    seats = {f"c{n}": seat for n, seat in enumerate(SEATS[:2])}
    turn = Turn(2, 3, 0, True, seats, {}, body.block_of, 4)
    given = method.offer(played.state, "c0", turn).adapters["others"]
    theirs = played.state.models["c1"]
    assert given.keys() == theirs.keys()  # of two clients, each gets the other's
    assert all(torch.allclose(given[k], theirs[k]) for k in given)


def test_a_client_that_moves_learns_what_it_would_have_learnt() -> None:
    how: dict[str, Any] = {"kind": KIND, "seeds": (1, 2), "body": backbone(), "rounds": 3}
    still = play(FedMosaic(), SEATS[:2], **how)
    moved = play(FedMosaic(), SEATS[:2], moves={1: (SEATS[2], Seat(Cut(1, 2)))}, **how)
    for client in ("c0", "c1"):
        assert same(of(still, client), of(moved, client))


def test_where_it_cannot_be() -> None:
    seats: dict[str, Seat] = dict.fromkeys(("a", "b"), Seat(Cut(1, 1)))
    setting = Setting("classification", KIND, seats, 4, True)
    assert FedMosaic().refuses(setting) == ""
    assert "adapter.kind=colora" in FedMosaic().refuses(replace(setting, adapter=Lora()))


def test_odd_signatures_are_not_taken_in() -> None:
    state = Mosaic({"a": {}}, {"a": torch.ones(2, 3)})
    turn: Any = None
    odd = {"b": Parcel({"personal": {}}, {"signature": torch.ones(3, 2)}), "c": Parcel()}
    assert FedMosaic().merge(state, odd, turn) == state
    good = {"b": Parcel({"personal": {}}, {"signature": torch.ones(2, 3)})}
    assert {*FedMosaic().merge(state, good, turn).models} == {"a", "b"}


# ---- what it costs


def test_a_round_costs_what_the_formula_says() -> None:
    # Up: r (in + out) of each plain map, r^2 + r of each matched one, and 0.4 d d_ff numbers of the
    # signature. Down: the same adapters.
    body = prices.body()
    played = play(FedMosaic(), SEATS, rounds=2, kind=KIND, training=SGD, body=body)
    begun, d, d_ff, r, maps = body.initial(KIND, Dice(0)("initial")), 32, 48, 3, 2
    for arrival in played.arrivals:
        assert arrival.failure is None, arrival.failure
        seat = SEATS[int(arrival.client[1])]
        near = sizer(begun, seat)(PLAIN | MATCHED)
        if seat == whole(4):
            assert near == 4 * 2 * maps * (r * (d + d) + r * r + r)
        steps, signature = STEPS * (seat != whole(4)), 4 * 13 * d_ff
        assert (arrival.ledger.sent, arrival.ledger.received) == (
            steps * (2 * S + MASK) + near + signature,
            steps * 2 * S + near,
        ), arrival.client
