"""PAC-PFL, once by hand and by the oracles of its specification."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from strategies.prices import MASK, SEATS, S, body
from torch import Tensor
from toys import LENGTH, H, Played, at_desk, backbone, batches_for, play, whole

from flexp.client.desk import Desk, Training
from flexp.client.features import features_of, kept
from flexp.client.memory import Memory
from flexp.data.examples import Batch, Examples, Shard
from flexp.dice import Dice
from flexp.model.adapter import Lora
from flexp.model.cut import Cut, Seat
from flexp.parcel import Parcel
from flexp.strategies import build
from flexp.strategies.base import Scene, Setting, Turn
from flexp.strategies.pac_pfl import Cloud, PacPfl
from flexp.strategies.priors import Family

TURN = Turn(0, 9, 0, True, {}, {}, lambda name: 0, 4)


class Seen:
    """Stands in for model and task: a row of a batch is the two numbers that its features are."""

    backbone = SimpleNamespace(sizes=(2, 2))

    def collate(self, examples: Examples, indices: Any) -> Batch:
        picked = examples.pick(indices)
        return Batch({"x": torch.tensor(picked.ids)}, torch.tensor(picked.labels))

    def hidden(self, batch: Batch, wear: object) -> Tensor:
        return batch.inputs["x"].double()


def desk(client: str, *rows: tuple[int, int, int]) -> Desk:
    """A desk at which rows are two numbers, and then a label."""
    shard = Shard(
        Examples(tuple(r[:2] for r in rows), tuple(r[2] for r in rows), ("",) * len(rows))
    )
    told: dict[str, Any] = {"client": client, "shard": shard, "model": Seen(), "task": Seen()}
    told |= {
        "memory": Memory(),
        "dice": Dice(3),
        "training": Training(batch=2),
        "reply": Parcel,
    }
    return cast("Desk", SimpleNamespace(**told))


A, B = desk("a", (2, 0, 0)), desk("b", (2, 0, 1), (0, 2, 0), (2, 0, 1))


def cloud(method: PacPfl, clients: Any = ("a", "b")) -> Cloud:
    return method.start(Scene(clients, {}, cast("Any", None), Dice(0), (2, 2)))


def turned(method: PacPfl, state: Cloud, *desks: Desk) -> dict[str, Parcel]:
    """The replies of a round."""
    return {d.client: method.train(d, method.offer(state, d.client, TURN)) for d in desks}


# ---- by hand


def test_pac_pfl_by_hand() -> None:
    # One prior: noise and scale are softplus(0) = ln 2 (and 1/1000 more), mean m = 1. All that a
    # has is one row, so its codes (1, -1) are N(m, V) with V = 2 ln 2 + 0.001, and its slope along
    # m is (1 - m + -1 - m) / V = -2 / V. Along the scale: dV = 1/2, and of log Z = -(0 + 4) / (2 V)
    # - ln(2 pi V) it is (2 / V^2 - 1 / V) / 2; along the noise it is the same.
    method = PacPfl(particles=1, hidden=0, kappa=0.5)
    begun = cloud(method)
    assert list(begun.family.pieces()) == ["scale", "noise", "mean", "length"]
    state = replace(begun, particles=torch.tensor([[0.0, 0.0, 1.0, -2.0]]))
    size = 2 * math.log(2) + 0.001
    wide = (2 / size**2 - 1 / size) / 2
    (reply,) = turned(method, state, A).values()
    assert reply.facts["rows"] == 1
    assert reply.facts["loss"] == pytest.approx(2 / size + math.log(2 * math.pi * size))
    slopes = reply.tensors["slopes"]
    assert slopes.dtype == torch.float32
    assert slopes[0].tolist() == pytest.approx([wide, wide, -2 / size, 0], abs=1e-6)
    # Rows are 1 and 3: their harmonic mean is 2 / (1 + 1/3) = 3/2, so c = 1.5 / (1.5 + 2) = 3/7.
    # Half of the hyper-prior pulls the scale from 0 to 1, noise and mean to 0, and the length, of
    # variance 9, from -2 to 1.
    other = Parcel(tensors={"slopes": torch.tensor([[7.0, 14.0, 0.0, 21.0]])}, facts={"rows": 3})
    merged = method.merge(state, {"a": reply, "b": other}, TURN)
    climbed = [
        0.5 + 3 / 7 * (wide + 7),
        3 / 7 * (wide + 14),
        -0.5 - 3 / 7 * 2 / size,
        9 + 3 / 9 / 2,
    ]
    moments = merged.memory["psi@m"]["particles"]  # a tenth of the first slope, downhill
    assert (-10 * moments[0]).tolist() == pytest.approx(climbed, abs=1e-5)
    assert merged.rows == {"a": 1, "b": 3}
    # Adam's first step is of its rate, whatever the slope.
    assert (merged.particles - state.particles)[0].tolist() == pytest.approx(
        [1e-3, 1e-3, -1e-3, 1e-3], abs=1e-6
    )


def test_steps_get_shorter_by_decay() -> None:
    method = PacPfl(particles=1, hidden=0, rate=0.1, decay=0.5)
    state = cloud(method)
    replies = turned(method, state, B)
    sizes = [
        (method.merge(state, replies, replace(TURN, round=r)).particles - state.particles).abs()
        for r in (0, 2)
    ]
    assert [float(size.max()) for size in sizes] == pytest.approx([0.1, 0.025], rel=1e-3)


def test_a_part_of_the_clients_stands_for_all() -> None:
    method = PacPfl(particles=1, hidden=0, kappa=0.0)
    state = replace(cloud(method), rows={"a": 1, "b": 3})
    one = {"b": Parcel(tensors={"slopes": torch.ones(1, 4)}, facts={"rows": 3})}
    moments = method.merge(state, one, TURN).memory["psi@m"]["particles"]
    assert (-10 * moments[0]).tolist() == pytest.approx([3 / 7 * 2] * 4)  # c N


def test_replies_of_another_shape_and_of_nobody_count_for_nothing() -> None:
    method = PacPfl(particles=2, hidden=0)
    state = cloud(method)
    odd = {
        "a": Parcel(tensors={"slopes": torch.ones(1, 4)}, facts={"rows": 3}),
        "b": Parcel(facts={"rows": 3}),
    }
    assert method.merge(state, odd, TURN) is state
    assert method.merge(state, {}, TURN) is state
    good = Parcel(tensors={"slopes": torch.ones(2, 4)}, facts={"rows": "many"})
    assert method.merge(state, {"a": good}, TURN) is state


# ---- oracles


def climbed(method: PacPfl, begun: Cloud, rounds: int, *desks: Desk) -> Cloud:
    state = begun
    for _ in range(rounds):
        state = method.merge(state, turned(method, state, *desks), TURN)
    return state


@pytest.mark.parametrize(
    ("prior", "likelihood"), [("gp", "codes"), ("linear", "softmax")], ids=["gp", "linear"]
)
def test_one_particle_is_the_mode_by_gradient_ascent(prior: Any, likelihood: Any) -> None:
    method = PacPfl(1, prior, likelihood, hidden=2, kappa=0.3, rate=0.05)
    begun = cloud(method)
    found = climbed(method, begun, 8, A, B)
    xi = begun.particles[0].clone().requires_grad_()
    adam = torch.optim.Adam([xi], lr=0.05)
    mean, std = begun.family.moments()
    for _ in range(8):
        log_q = 0.3 * torch.distributions.Normal(mean, std).log_prob(xi).sum().double()
        for one in (A, B):
            seen, labels = kept(one)
            log_z = begun.family.posterior(xi.double(), seen, labels).log_z
            log_q = log_q + 3 / 7 * log_z / len(labels)
        adam.zero_grad()
        (-log_q).backward()
        adam.step()
    assert torch.allclose(found.particles[0], xi.detach(), rtol=0, atol=1e-5)
    assert not torch.allclose(found.particles, begun.particles, atol=0.1)


def test_without_a_hyper_prior_one_client_finds_the_prior_of_most_evidence() -> None:
    rows = [(4, 0, 0), (5, 0, 0), (4, 1, 1), (0, 4, 1), (0, 5, 1), (2, 2, 1), (3, 3, 1)]
    alone, method = desk("a", *rows), PacPfl(1, hidden=0, kappa=0.0, rate=0.1)
    begun = cloud(method, ("a",))
    end = climbed(method, begun, 120, alone)
    seen, labels = kept(alone)

    def evidence(xi: Tensor) -> float:
        return float(begun.family.posterior(xi.double(), seen, labels).log_z)

    best = evidence(end.particles[0])
    assert best > evidence(begun.particles[0]) + 0.1
    for n in range(len(end.particles[0])):  # nothing near it is better
        for step in (-0.3, 0.3):
            other = end.particles[0].clone()
            other[n] += step
            assert evidence(other) < best + 1e-4, (n, step)


def test_what_clients_give_adds_up_to_the_slope_of_all_together() -> None:
    method = PacPfl(3, hidden=2)
    state = cloud(method)
    replies = turned(method, state, A, B)
    at = state.particles.double().requires_grad_()
    pooled = torch.zeros(()).double()
    for one in (A, B):
        seen, labels = kept(one)
        for xi in at:
            pooled = pooled + state.family.posterior(xi, seen, labels).log_z / len(labels)
    (slope,) = torch.autograd.grad(pooled, at)
    given = sum(r.tensors["slopes"] for r in replies.values())
    assert torch.allclose(torch.as_tensor(given).double(), slope, rtol=1e-5, atol=1e-6)


def test_particles_stay_apart_and_equal_ones_stay_equal() -> None:
    # Where h is the median's, K = 4 in four dimensions stay about as far apart as the mode is wide.
    method = PacPfl(4, hidden=0, kappa=1.0, rate=0.1)
    begun = cloud(method)
    end = climbed(method, begun, 40, A, B)
    assert float(torch.pdist(end.particles).min()) > 0.3
    twins = replace(begun, particles=begun.particles[:1].repeat(2, 1))
    same = climbed(PacPfl(2, hidden=0), twins, 3, A, B).particles
    assert torch.equal(same[0], same[1])
    assert not torch.equal(same, twins.particles)


# ---- who gives what


def test_newcomers_give_nothing_and_serve_their_posterior() -> None:
    method = PacPfl(3, hidden=0, newcomers=("b",), rate=0.1)
    state = cloud(method)
    replies = turned(method, state, A, B)
    assert not replies["b"].tensors
    assert not replies["b"].facts
    merged = method.merge(state, replies, TURN)
    assert torch.equal(merged.particles, climbed(method, state, 1, A).particles)
    served = method.personal(B, method.offer(merged, "b", TURN))
    assert served.adapter is None
    told = served.predict(Seen().collate(B.shard.train, [0, 1])).exp()
    assert told.sum(1).tolist() == pytest.approx([1, 1])
    assert told.argmax(1).tolist() == [1, 0]


def test_noise_is_added_to_what_is_clipped() -> None:
    plain, clipped = (PacPfl(2, hidden=0, clip=c) for c in (None, 0.1))
    state = cloud(plain)
    (raw,), (cut,) = ([*turned(m, state, B).values()] for m in (plain, clipped))
    norms = cut.tensors["slopes"].norm(dim=1)
    assert norms.tolist() == pytest.approx([0.1, 0.1])
    lengths = raw.tensors["slopes"].norm(dim=1, keepdim=True)
    assert torch.allclose(cut.tensors["slopes"], raw.tensors["slopes"] * 0.1 / lengths, atol=1e-6)
    noisy = PacPfl(2, hidden=0, clip=0.1, epsilon=2.0, delta=1.25 * math.exp(-2))
    far = replace(state, particles=state.particles + 1.0)
    added = [
        turned(noisy, at, B)["b"].tensors["slopes"] - turned(clipped, at, B)["b"].tensors["slopes"]
        for at in (state, far)
    ]
    assert torch.allclose(added[0], added[1], rtol=0, atol=1e-6)  # it does not grow with particles
    drawn = torch.randn(4, generator=Dice(3)("noise", particle=0).generator(), dtype=torch.float64)
    assert torch.allclose(added[0][0].double(), 0.1 * drawn, atol=1e-6)  # 2 * 0.1 / 2
    assert not torch.allclose(added[0][0], added[0][1], atol=1e-3)


def test_pac_pfl_refuses_what_it_cannot_do() -> None:
    seats = {"a": whole(4), "b": Seat(Cut(1), rank=2)}
    setting = Setting("classification", Lora(), seats, 4, head=True)
    assert PacPfl().refuses(setting) == ""
    assert PacPfl().refuses(replace(setting, task="images")) == ""
    assert "Set task.kind" in PacPfl().refuses(replace(setting, task="causal-lm"))
    prior = replace(setting, training=Training(label_prior=True))
    assert "Remove train.label_prior" in PacPfl().refuses(prior)
    assert "Set strategy.clip" in PacPfl(epsilon=1.0).refuses(setting)
    assert PacPfl(epsilon=1.0, clip=1.0).refuses(setting) == ""
    assert 'newcomer "c" is no client' in PacPfl(newcomers=("c",)).refuses(setting)
    assert "Shorten strategy.newcomers" in PacPfl(newcomers=("a", "b")).refuses(setting)
    heads = {"a": ("classification", "x", "y"), "b": ("classification", "x", "z")}
    own = replace(setting, heads=heads, head=False)
    assert "learn other labels" in PacPfl().refuses(own)


# ---- features, and what crosses


def test_features_are_means_over_what_is_no_padding() -> None:
    with at_desk(body(), whole(4)) as (here, _):
        data = here.shard.train
        both, alone = (here.task.collate(data, rows) for rows in ([0, 1], [1]))
        hidden = here.model.hidden(both)[1][both.inputs["attention_mask"][1].bool()]
        middle = hidden.double().mean(0)
        wanted = (middle - middle.mean()) / (middle.var(correction=0) + 1e-5).sqrt()
        found = features_of(here.model, both)
        assert torch.allclose(found[1].double(), wanted, rtol=0, atol=1e-6)
        assert alone.rows == 1
        assert not found.requires_grad


@pytest.mark.parametrize("family", ["vit", "cnn"])
def test_images_have_features_as_well(family: str) -> None:
    net = backbone(family)
    with at_desk(net, whole(4)) as (here, _):
        (batch,) = batches_for(net, 1)
        assert features_of(here.model, batch).shape == (3, net.sizes[0])


def bytes_of(method: Mapping[str, Any]) -> Played:
    return play(build("pac_pfl", method), SEATS, rounds=2, body=body())


@pytest.mark.parametrize("options", [{"particles": 2, "hidden": 4}, {"prior": "linear"}])
def test_a_round_of_pac_pfl_costs_what_the_formula_says(options: dict[str, Any]) -> None:
    # K |xi| numbers each way. Before, each of twelve rows has crossed forward once: 3 S.
    found = bytes_of({**options, "newcomers": ("c1",)})
    count = found.state.particles.shape[0]
    size = sum(math.prod(p.shape) for p in found.state.family.pieces().values())
    wide = 5 + 4 * H + 4 + 16 if "hidden" in options else 2 + 3 * (H + 1)
    assert size == wide - ("hidden" in options)
    assert count == options.get("particles", 10)
    for arrival in found.arrivals:
        new = arrival.client == "c1"
        assert arrival.failure is None
        up = 0 if new else count * size * 4
        assert (arrival.ledger.sent, arrival.ledger.received) == (up, count * size * 4)


def test_rows_cross_forward_once_and_nothing_comes_back() -> None:
    first = play(build("pac_pfl", {"particles": 1}), SEATS, rounds=1, body=body())
    size = first.state.particles.numel() * 4
    for arrival in first.arrivals:
        crossed = 0 if arrival.client == "c2" else 3
        assert arrival.ledger.sent == size + crossed * (S + MASK)
        assert arrival.ledger.received == size + crossed * S
        assert not {way for way in arrival.ledger.kinds if way[1] == "grad"}
    assert 12 * LENGTH * H * 4 == 3 * S


def test_state_has_the_sizes_of_the_model() -> None:
    state = cloud(PacPfl(5, hidden=3))
    assert state.family == Family("gp", "codes", 2, 2, hidden=3)
    assert state.particles.shape == (5, 4 + 6 + 3 + 9)
    assert state.particles.dtype == torch.float32
