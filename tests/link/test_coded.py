"""Runs whose messages are rounded on their way: they train, repeat, and count what crosses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from toys import H, Played, gap, play, same

from flexp import assets, planning, recipe_file
from flexp.client.desk import Training
from flexp.engine.flow import Pace
from flexp.errors import LinkError, PlanError, RecipeError
from flexp.link.coded import CodedLink, coded
from flexp.link.messages import Answer, Backward, Forward, Leave, Message, StepKey
from flexp.link.metered import Ledger, MeteredLink
from flexp.link.wire import PACKED, Wire, pack, unpack
from flexp.model.cut import Cut, Labels, Seat
from flexp.model.ops import Optim
from flexp.stage import prepare, survey
from flexp.strategies.fedavg import FedAvg
from flexp.strategies.local import Local

Recipe = Callable[..., Path]
WIRES: tuple[Wire, ...] = get_args(Wire)
ROUNDED = WIRES[1:]
SEAT = Seat(Cut(1, 1))
CLIENTS = ("c0", "c1", "c2")


def wired(wire: Wire, **more: Any) -> Any:
    return play(
        more.pop("strategy", Local()),
        more.pop("seat", SEAT),
        wires=dict.fromkeys(CLIENTS, wire),
        **more,
    )


def share(width: int, wire: Wire) -> float:
    """Bytes of an fp32 tensor of that width under a wire, of its own."""
    groups = {"int8": 1, "int8-group": -(-width // 64)}.get(wire, 0)
    value = {"fp32": 4, "bf16": 2, "fp16": 2}.get(wire, 1)
    return (value * width + 2 * groups) / (4 * width)


# ---- what arrives


@dataclass
class Far:
    """The other end of a link: keeps what came and answers with what it is given."""

    answer: dict[str, Tensor]
    came: list[Message] = field(default_factory=list[Message])
    closed: bool = False

    def send(self, message: Message) -> Answer:
        self.came.append(message)
        return Answer(dict(self.answer), facts={"a": 1})

    def close(self) -> None:
        self.closed = True


def key(phase: Any) -> StepKey:
    return StepKey("run", 0, 0, 0, 0, phase)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize("wire", ROUNDED)
def test_both_ends_get_what_a_network_would_bring(wire: Wire) -> None:
    hidden, mask, coef = noise(2, 3, 8), torch.ones(2, 3), noise(6)
    answer = {"grad": noise(2, 3, 8), "coef/0": noise(6), "slot/a/b": noise(4, 4)}
    far = Far(answer)
    link = CodedLink(far, wire)
    sent = Forward(
        key("forward"), "personal", None, "hidden", hidden, (coef,), {}, mask, None, None, True
    )
    got = link.send(sent)
    [came] = far.came
    assert isinstance(came, Forward)
    assert torch.equal(came.hidden, unpack(pack(hidden, wire), wire, hidden.dtype))
    assert not torch.equal(came.hidden, hidden)
    assert came.mask is mask
    assert came.coefs[0] is coef
    assert torch.equal(sent.hidden, noise(2, 3, 8))
    assert torch.equal(got.tensors["grad"], unpack(pack(answer["grad"], wire), wire, coef.dtype))
    assert all(got.tensors[k] is answer[k] for k in ("coef/0", "slot/a/b"))
    assert got.facts == {"a": 1}
    link.send(Backward(key("backward"), hidden, True))
    assert torch.equal(far.came[1].tensors()["grad"], came.hidden)
    link.send(Leave(key("leave")))
    link.close()
    assert far.closed


def test_under_fp32_there_is_no_link_between() -> None:
    far = Far({})
    assert coded(far, "fp32") is far
    assert coded(far, "int8") == CodedLink(far, "int8")


@pytest.mark.parametrize("wire", WIRES)
def test_the_ledger_counts_the_parts(wire: Wire) -> None:
    hidden, answer = noise(2, 5, 100), {"hidden": noise(2, 5, 100), "coef/0": noise(6)}
    ledger = Ledger(crossings=[])
    MeteredLink(coded(Far(answer), wire), ledger, wire).send(
        Backward(key("backward"), hidden, True)
    )
    parts = sum(p.numel() * p.element_size() for p in pack(hidden, wire).values())
    assert (ledger.sent, ledger.received) == (parts, parts + 24)
    assert ledger.kinds == {("up", "grad"): parts, ("down", "hidden"): parts, ("down", "coef"): 24}
    assert ledger.crossings is not None
    first = ledger.crossings[0]
    assert (first.name, first.dtype, first.bytes) == ("grad", "float32", parts)


# ---- runs


@pytest.fixture(scope="module")
def exact() -> Played:
    """A run whose messages travel as they are."""
    return play(FedAvg(), SEAT, seeds=(1, 2))


@pytest.mark.parametrize("wire", WIRES)
def test_a_run_is_near_the_exact_one_and_repeats(wire: Wire, exact: Played) -> None:
    one, two = (wired(wire, strategy=FedAvg(), seeds=(1, 2)) for _ in range(2))
    for client, adapter in exact.adapters.items():
        assert same(one.adapters[client], two.adapters[client])
        off = gap(one.adapters[client], adapter)
        assert (off == 0) == (wire == "fp32")
        assert off < max(float(v.abs().max()) for v in adapter.values())


@pytest.mark.parametrize("wire", WIRES)
def test_a_run_trains(wire: Wire) -> None:
    training = Training(Optim(lr=2e-2), batch=6, steps=6)
    more: dict[str, Any] = {"training": training, "rows": 6, "seeds": (1,)}

    def loss(rounds: int) -> float:
        [arrival] = wired(wire, rounds=rounds, **more).arrivals
        return float(arrival.reply.facts["loss"])

    assert loss(5) < 0.6 * loss(1)


@pytest.mark.parametrize("form", get_args(Labels))
@pytest.mark.parametrize("wire", ROUNDED)
def test_bytes_of_a_run_are_those_of_the_parts(wire: Wire, form: Labels) -> None:
    seat = SEAT if form == "keep" else Seat(Cut(2), form)
    more: dict[str, Any] = {"seat": seat, "profile": "open", "keep_crossings": True, "rounds": 1}
    more["seeds"] = (1,)
    plain, found = wired("fp32", **more), wired(wire, **more)
    for whole, less in zip(plain.arrivals, found.arrivals, strict=True):
        assert less.failure is None
        pairs = list(zip(whole.ledger.crossings, less.ledger.crossings, strict=True))
        assert pairs
        for a, b in pairs:
            assert (a.way, a.phase, a.name, a.shape) == (b.way, b.phase, b.name, b.shape)
            packed = a.name in PACKED and a.shape
            assert b.bytes == (share(a.shape[-1], wire) * a.bytes if packed else a.bytes), b
        assert less.ledger.sent == sum(c.bytes for c in less.ledger.crossings if c.way == "up")
        names = {c.name for c in less.ledger.crossings}
        assert ("labels" in names, "logits" in names) == (form == "loss", form == "logits")


def test_a_client_may_have_a_wire_of_its_own() -> None:
    plain = play(Local(), SEAT, rounds=1)
    found = play(Local(), SEAT, rounds=1, wires={"c1": "int8"})
    assert [same(found.adapters[c], plain.adapters[c]) for c in CLIENTS] == [True, False, True]
    sent = [a.ledger.kinds["up", "hidden"] for a in found.arrivals]
    whole = [a.ledger.kinds["up", "hidden"] for a in plain.arrivals]
    assert [a / b for a, b in zip(sent, whole, strict=True)] == [1, share(H, "int8"), 1]


@dataclass(frozen=True)
class Exploding:
    """A server whose gradients are not finite."""

    inner: Any

    def send(self, message: Message) -> Answer:
        answer = self.inner.send(message)
        odd = {k: v * torch.nan if k == "grad" else v for k, v in answer.tensors.items()}
        return Answer(odd, answer.scalars, answer.facts)

    def close(self) -> None:
        self.inner.close()


def test_a_turn_that_int8_cannot_carry_fails_alone_and_says_why() -> None:
    def wrap(client: str, link: Any) -> Any:
        return Exploding(link) if client == "c1" else link

    found = wired("int8", wrap=wrap, rounds=1)
    errors = {a.client: a.failure and a.failure.error for a in found.arrivals}
    assert errors["c0"] is errors["c2"] is None
    assert LinkError.__name__ in str(errors["c1"])
    assert '"grad" has NaN or infinity' in str(errors["c1"])


def test_the_clock_of_clients_without_a_barrier_knows_the_wire() -> None:
    tensors = {"hidden": noise(2, 5, 64), "mask": torch.ones(2, 5)}
    assert Pace().bytes_of(tensors) == 2 * 5 * 64 * 4 + 40
    assert Pace(wire="int8").bytes_of(tensors) == 2 * 5 * (64 + 2) + 40


# ---- recipes

SPEEDS = {"memory": "1GB", "gflops": 10, "up_mbit": 80, "down_mbit": 80, "latency_ms": 0}


def read(recipe_of: Recipe, **changes: Any) -> Any:
    return recipe_file.read(recipe_of(**changes), [])


def test_a_recipe_says_how_each_client_travels(recipe_of: Recipe, tmp_path: Path) -> None:
    """In exact mode too: what is rounded is the same each time."""
    link = {"wire": "bf16", "wires": {"anna": "int8", "ben": "bf16"}}
    found = read(recipe_of, link=link, mode="exact")
    stage = prepare(found, assets.Cache(tmp_path / "none"))
    stage.engine.close()
    assert stage.engine.wires == {"anna": "int8", "ben": "bf16", "carl dee": "bf16"}


def test_a_plan_counts_what_crosses(recipe_of: Recipe, tmp_path: Path) -> None:
    plan: dict[str, Any] = {
        "plan__devices": [{"name": "phone", **SPEEDS}],
        "plan__server": {"gflops": 1000},
        "plan__slow": {"ben": 2.0, "anna": 1.5},
    }
    cache = assets.Cache(tmp_path / "none")
    link = {"wire": "bf16", "wires": {"anna": "int8-group", "ben": "int8-group"}}
    plain, less = (survey(read(recipe_of, **plan, **more), cache) for more in ({}, {"link": link}))
    before, after = (
        {row["client"]: row for row in planning.fleet(s)["seats"]} for s in (plain, less)
    )
    wires: dict[str, Wire] = {"anna": "int8-group", "ben": "int8-group", "carl dee": "bf16"}
    for client, wire in wires.items():
        a, b = before[client], after[client]
        assert b["step_bytes"] == share(32, wire) * a["step_bytes"]
        slow = plan["plan__slow"].get(client, 1.0)
        saved = slow * (a["step_bytes"] - b["step_bytes"]) / 1e7
        assert a["seconds"] - b["seconds"] == pytest.approx(saved)
        pace = less.placed[client].pace
        assert pace is not None
        assert pace.wire == wire
    assert less.own_costs["anna"] is less.own_costs["ben"]


def test_a_wire_of_nobody_is_refused(recipe_of: Recipe, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r'link\.wires: no client "ann".*anna'):
        survey(read(recipe_of, link={"wires": {"ann": "int8"}}), assets.Cache(tmp_path / "none"))


def test_a_wire_that_does_not_exist_is_refused(recipe_of: Recipe) -> None:
    with pytest.raises(RecipeError, match=r"link\.wire"):
        read(recipe_of, link={"wire": "int4"})
