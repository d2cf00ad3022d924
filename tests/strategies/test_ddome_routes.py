"""Who gets which expert of DDOME, how they specialise, and who counts."""

from __future__ import annotations

import functools
import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from strategies.pairs import SGD
from strategies.test_ddome import KIND, opened
from torch import Tensor
from toys import LENGTH, H, Played, at_desk, backbone, play, whole

from flexp.client.desk import Desk, Training
from flexp.data.examples import Examples, Shard
from flexp.dice import Dice
from flexp.model.cut import Cut, Seat
from flexp.model.ops import Optim
from flexp.parcel import Parcel
from flexp.strategies.base import Turn
from flexp.strategies.ddome import Ddome
from flexp.strategies.experts import Experts, expert, share
from flexp.strategies.gating import names_of
from flexp.tensors import Tensors

DOMAINS, ANCHORS = 3, ("c0", "c1", "c2")
MAPS = ((0, 1, 2), (1, 2, 0), (2, 0, 1))  # what a word of each kind means in each domain


def rows(domain: int, count: int, seed: int, *, hard: bool = False) -> Examples:
    """Rows with words of their domain alone. Their label is the domain, or, if that is ``hard``,
    what their words mean there: all of a row are of one kind."""
    stream, first = random.Random(10 * seed + domain), 3 + 20 * domain
    ids, labels = list[tuple[int, ...]](), list[int]()
    for n in range(count):
        some = range(20) if not hard else range(6 * (n % 3), 6 * (n % 3) + 6)
        ids.append(tuple(first + stream.choice(some) for _ in range(LENGTH)))
        labels.append(MAPS[domain][n % 3] if hard else domain)
    return Examples(tuple(ids), tuple(labels), ("toy",) * count)


def both(*held: Examples) -> Examples:
    """All of them."""
    ids = tuple(row for one in held for row in one.ids)
    labels: Any = tuple(label for one in held for label in one.labels)
    return Examples(ids, labels, ("toy",) * len(ids))


def shards(count: int = 12, *, hard: bool = False) -> dict[str, Shard]:
    """A client per domain; newcomers with one domain, with two of them, and with all."""
    made = functools.partial(rows, hard=hard)
    out = {f"c{d}": Shard(made(d, count, 1), test=made(d, 9, 2)) for d in range(DOMAINS)}
    for name, domains in {"n0": (1,), "n1": (0, 2), "n2": (0, 1, 2)}.items():
        parts = [[made(d, size, seed) for d in domains] for size, seed in ((4, 3), (9, 4))]
        out[name] = Shard(both(*parts[0]), test=both(*parts[1]))
    return out


NEW = ("n0", "n1", "n2")
EASY = Ddome(DOMAINS, anchors=ANCHORS, newcomers=NEW, rate=0.05, hidden=0)


@functools.cache
def trained(method: Ddome = EASY, rounds: int = 4, *, hard: bool = False) -> Played:
    """A run in which each anchor has a domain."""
    held = shards(36 if hard else 12, hard=hard)
    how: dict[str, Any] = {"body": backbone(depth=2), "shards": held}
    how["training"] = Training(Optim(lr=1e-2), batch=6, steps=3)
    if hard:
        how["training"] = Training(Optim(lr=2e-2), batch=12, steps=6)
    found = play(method, whole(2), rounds=rounds, **how)
    assert all(arrival.failure is None for arrival in found.arrivals)
    return found


def at(played: Played, method: Ddome) -> Any:
    """A desk with the experts on it, whole."""
    turn: Any = None
    offer = method.offer(played.state, "n2", turn)
    return at_desk(backbone(depth=2), whole(2), slots=method.specs(), offer=offer), offer


def confusion(played: Played, method: Ddome, *, soft: bool = False, hard: bool = False) -> Tensor:
    """[experts, domains]: what part of the test rows of each domain each expert gets."""
    there, offer = at(played, method)
    with there as (desk, _), torch.no_grad():
        gate, held, found = method.gate(offer), shards(hard=hard), list[Tensor]()
        for d in range(DOMAINS):
            says = gate.says(desk.model, everything(desk, held[f"c{d}"].test))
            found.append(says.softmax(1) if soft else one_hot(says))
    return torch.stack([part.mean(0) for part in found], 1)


def one_hot(says: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(says.argmax(1), says.shape[1]).float()


def everything(desk: Desk, examples: Examples) -> Any:
    return desk.task.collate(examples, range(len(examples)))


def test_anchors_make_each_expert_one_domains() -> None:
    assert float(confusion(trained(), EASY).diagonal().mean()) > 0.9


def test_a_random_frozen_gate_is_near_uniform() -> None:
    method = replace(EASY, rate=0.0, hidden=64)
    shares = confusion(trained(method, rounds=1), method, soft=True)
    assert float((shares - 1 / DOMAINS).abs().max()) < 0.1
    assert float(confusion(trained(), EASY, soft=True).diagonal().min()) > 0.6


@pytest.mark.parametrize("client", NEW)
def test_who_never_trains_is_served_as_well_as_by_the_best_expert(client: str) -> None:
    served, best = accuracies(trained(), shards()[client].test)
    assert served >= best - 0.02
    if client != "n0":  # no expert knows more than one domain
        assert served > best + 0.2


def accuracies(played: Played, test: Examples) -> tuple[float, float]:
    """What is served, row by row, and what is best of the experts alone."""
    there, offer = at(played, EASY)
    with there as (desk, _), torch.no_grad():
        batch = everything(desk, test)
        served = EASY.personal(desk, offer).predict(batch)
        alone = [desk.model.logits(batch, expert(k)) for k in range(DOMAINS)]
    right = [float((one.argmax(1) == batch.labels).float().mean()) for one in (served, *alone)]
    return right[0], max(right[1:])


@pytest.mark.slow
def test_experts_specialise_where_the_same_kind_of_word_means_other_things() -> None:
    found = trained(rounds=12, hard=True)
    assert float(confusion(found, EASY, hard=True).diagonal().mean()) > 0.9
    held = shards(36, hard=True)
    for client in NEW:
        served, best = accuracies(found, held[client].test)
        assert served >= best - 0.02, client
    served, best = accuracies(found, held["n2"].test)
    assert served > best + 0.1


# ---- how clients are served


@pytest.mark.parametrize("seat", [Seat(Cut(1, 1)), whole(4)], ids=["cut", "whole"])
def test_rows_of_one_batch_are_served_by_their_own_experts(seat: Seat) -> None:
    # A gate that reads the sign of one feature: rows go to the first expert or to the third.
    method = Ddome(3, hidden=0)
    slots, offer = opened(3)
    weight = torch.zeros(3, H)
    weight[0, 0], weight[2, 0] = 1.0, -1.0
    gate = {"gate/0/weight": weight, "gate/0/bias": torch.zeros(3)}
    offer = replace(offer, tensors=gate, facts={"seed": 0})
    with at_desk(backbone(), seat, kind=KIND, slots=slots, offer=offer) as (desk, _):
        rows = desk.task.collate(desk.shard.train, range(12))
        with torch.no_grad():
            says = method.gate(offer).says(desk.model, rows)
            served = method.personal(desk, offer)
            found, each = served.predict(rows), [desk.model.logits(rows, expert(k)) for k in (0, 2)]
    first = says[:, 0] > 0
    assert 0 < int(first.sum()) < 12
    assert torch.allclose(found, torch.where(first[:, None], *each), atol=1e-6)
    assert served.adapter is None


def test_a_client_can_be_served_by_its_first_expert_or_by_the_mixture() -> None:
    slots, offer = opened(3)
    gate = {"gate/0/weight": torch.zeros(3, H), "gate/0/bias": torch.tensor([1.0, 3.0, 2.0]).log()}
    offer = replace(offer, tensors=gate, facts={"seed": 0})
    with at_desk(backbone(), whole(4), kind=KIND, slots=slots, offer=offer) as (desk, _):
        rows = desk.task.collate(desk.shard.train, range(12))
        with torch.no_grad():
            one = Ddome(3, hidden=0, serve="client").personal(desk, offer)
            two = Ddome(3, hidden=0, serve="mixture").personal(desk, offer)
            anchor = Ddome(3, 1, anchors=("me",), hidden=0, serve="mixture").personal(desk, offer)
            parts = [desk.model.logits(rows, expert(k)).softmax(1) for k in (1, 2)]
            found = two.predict(rows).exp()
    assert one.adapter == "expert/1"
    assert two.adapter is None
    assert torch.allclose(found, 3 / 5 * parts[0] + 2 / 5 * parts[1], atol=1e-6)
    assert anchor.adapter == "expert/0"


# ---- which experts


def choices(method: Ddome, shares: list[float], dice: int = 0) -> list[int]:
    desk: Any = SimpleNamespace(client="me", dice=Dice(dice))
    return method.chosen(desk, torch.tensor(shares), method.explore)


def test_an_anchors_expert_comes_first_and_what_is_for_no_row_stays() -> None:
    shares = [0.1, 0.2, 0.4, 0.2995, 0.0005]
    assert choices(Ddome(5, 2), shares) == [2, 3]
    assert choices(Ddome(5, 9), shares) == [2, 3, 1, 0]
    assert choices(Ddome(5, 2, anchors=("x", "me")), shares) == [1, 2]
    assert choices(Ddome(5, 1, anchors=("x", "me")), shares) == [1]
    five = ("a", "b", "c", "d", "me")
    assert choices(Ddome(5, 2, anchors=five), shares) == [4, 2]
    assert choices(Ddome(2, 2), [1.0, 0.0]) == [0]


def test_exploring_finds_other_experts_and_repeats() -> None:
    shares = [0.9, 0.025, 0.025, 0.025, 0.025]
    found = [choices(Ddome(5, 1, explore=100.0), shares, n) for n in range(20)]
    assert found == [choices(Ddome(5, 1, explore=100.0), shares, n) for n in range(20)]
    assert {k for one in found for k in one} == {*range(5)}
    assert {k for n in range(20) for k in choices(Ddome(5, 1), shares, n)} == {0}


# ---- who counts


def test_experts_are_means_over_who_trained_them() -> None:
    # a has 1 row, b 3: the second expert is (8 + 3 * 16) / 4 = 14, or, with shares 3/4 and 1/4, is
    # (3 * 8 + 3 * 16) / 6 = 12. The first is a's 4, the third stays 0. Gates are (1 + 3 * 5) / 4.
    state = Experts(0, tuple({"w": torch.zeros(1)} for _ in range(3)), names_of(0))
    a = Parcel({"expert/0": one(4), "expert/1": one(8)}, {"gate/0/bias": torch.ones(3)})
    b = Parcel({"expert/1": one(16)}, {"gate/0/bias": torch.full((3,), 5.0)})
    told = {"a": replace(a, facts={"shares": [0.25, 0.75, 0.0]})}
    told["b"] = replace(b, facts={"shares": [0.75, 0.25, 0.0]})
    turn = Turn(0, 1, 0, True, {}, {"a": 1, "b": 3, "c": 0}, len, 2)
    found = state.averaged({"a": a, "b": b, "c": Parcel()}, turn)
    assert [float(held["w"]) for held in found.held] == [4, 14, 0]
    assert found.held[2] is state.held[2]
    assert found.gate["gate/0/bias"].tolist() == [4, 4, 4]
    assert [float(held["w"]) for held in state.averaged(told, turn).held] == [4, 12, 0]


def one(value: float) -> Tensors:
    return {"w": torch.tensor([float(value)])}


def test_a_gate_of_another_shape_or_name_does_not_count() -> None:
    state = Experts(0, (one(0),), names_of(0), {"gate/0/bias": torch.zeros(3)})
    sound = Parcel({}, {"gate/0/bias": torch.ones(3)})
    odd = Parcel({}, {"gate/0/bias": torch.ones(4), "gate/7/bias": torch.ones(3)})
    turn = Turn(0, 1, 0, True, {}, {"a": 1, "b": 1}, len, 2)
    found = state.averaged({"a": odd, "b": sound}, turn).gate
    assert found.keys() == {"gate/0/bias"}
    assert found["gate/0/bias"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("odd", [None, 1.0, "ab", [0.5], [2.0, 2.0], [0, float("nan")], [1, "x"]])
def test_what_is_no_share_counts_as_all(odd: Any) -> None:
    assert share(Parcel(facts={"shares": odd}), 1) == 1.0
    assert share(Parcel(facts={"shares": [0.25, 0.75]}), 1) == 0.75


def test_the_first_who_train_tell_the_centre_and_it_stays() -> None:
    first, second = ended(EXTRA, 1), ended(EXTRA, 2)
    for played, there in ((first, True), (second, False)):
        told = [one.reply.tensors for one in played.arrivals if one.reply is not None]
        assert ["gate/centre" in tensors for tensors in told] == [there, there]
    centres = [played.state.gate["gate/centre"] for played in (first, second)]
    assert torch.equal(*centres)
    layers = [played.state.gate["gate/0/weight"] for played in (first, second)]
    assert not torch.equal(*layers)
    assert "gate/centre" not in ended(replace(EXTRA, centre=False), 1).state.gate


EXTRA = Ddome(2, hidden=0, differ=0.1)


@functools.cache
def ended(method: Ddome, rounds: int, parts: int = 1) -> Played:
    """What a run leaves behind."""
    how: dict[str, Any] = {"training": SGD, "seeds": (1, 2), "body": backbone(depth=2)}
    found = play(method, Seat(Cut(1), accumulate=parts), rounds=rounds, **how)
    assert all(arrival.failure is None for arrival in found.arrivals)
    return found
