"""ZooPFL, once by hand and by the oracles of its specification."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from strategies import bowls
from strategies.bowls import HEAD, Bench, Bowl
from strategies.prices import MASK, SGD, STEPS, S
from torch import Tensor
from toys import Played, at_desk, backbone, play, same, whole

from flexp.client.desk import Desk, Training
from flexp.data.examples import Batch
from flexp.dice import Dice
from flexp.link.messages import Answer, Backward, Forward, Link, Message
from flexp.model.adapter import Head, Lora
from flexp.model.cut import Cut, Seat
from flexp.model.ops import Optim
from flexp.model.surgery import EVERY, NAMES, NUDGE, Surgery, coded, decoded
from flexp.parcel import Parcel
from flexp.server.compute import Compute
from flexp.strategies import build, queries
from flexp.strategies.base import Setting
from flexp.strategies.local import Local
from flexp.strategies.operated import ENCODER, OWN
from flexp.strategies.queries import worn_by
from flexp.strategies.zoopfl import WORN, ZooPfl
from flexp.tensors import Tensors, Wear

CUTS = (Seat(Cut(1, 1)), Seat(Cut(2, 0)))
SEATS = (*CUTS, whole(4))
SMALL: dict[str, Any] = {"code": 2, "embedding": 1, "width": 4}
NOW: dict[str, Any] = {**SMALL, "rebuild": 0, "warm": 0, "share": 1.0}  # surgery alone
INPUT = NAMES["input"]
Z, E = INPUT["encoder_out"], INPUT["own"]


def zoo(**options: Any) -> ZooPfl:
    """The method with a small code."""
    return ZooPfl(**{**SMALL, **options})


# ---- by hand


class Oracle(Bowl):
    """Says W (z + e + n) of a row: here z is one number, the last of the encoder's second layer."""

    past = None
    backbone = SimpleNamespace(head=("head",))

    def logits(self, batch: Batch, wear: Wear = "personal", *, near: Any = None) -> Tensor:
        model = cast("Any", self)
        code = coded(torch.zeros(batch.rows, 1), worn_by(model, wear), "input")
        if near is not None:
            code = code.repeat(len(near[NUDGE]) // batch.rows, 1) + near[NUDGE]
        return code.sum(1, keepdim=True) * (
            self.view("personal")[HEAD] + self.view("surgery")[HEAD]
        )

    def loss(self, batch: Batch, wear: Wear = "personal") -> Tensor:
        return self.task.loss(self.logits(batch, wear), batch.labels)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two clients that want 8 and 16 of one number, W = 1 and z = e = 0, rate 1/8."""

    def begin(**options: Any) -> Bench:
        for name in EVERY:
            monkeypatch.setitem(bowls.BLOCKS, name, -1)
        monkeypatch.setattr(bowls, "Bowl", Oracle)
        monkeypatch.setattr(queries, "mean_of", lambda _, batch, *__: torch.zeros(batch.rows, 1))
        start = {INPUT["encoder_in"]: torch.zeros(1, 2), Z: torch.zeros(1, 2), E: torch.zeros(1)}
        start[HEAD] = torch.full((1, 1), 0.5)  # in both slots, which are worn as their sum
        method = build("zoopfl", {"rebuild": 0, "warm": 0, "form": "plain", **options})
        how: dict[str, Any] = {"rows": {"a": [(8,)], "b": [(16,)] * 3}, "start": start}
        return Bench(method, optim=Optim("sgd", lr=0.125), **how)

    return begin


def test_zoopfl_asks_on_two_sides_and_then_re_maps(bench: Any) -> None:
    # a's loss (W (z + e) - 8)^2 / 2 at c = (n, 0) is (n - 8)^2 / 2: at n = 1/2 28.125, at -1/2
    # 36.125, so the slope is -8, and alike along e. z and e go to 1; b's go to 2, and z becomes
    # (1 + 3 * 2) / 4 = 1.75. W was not asked for, and stays.
    one = bench(sides="two", rho=0.5, share=1 / 9)
    one.round()
    assert float(one.replies["a"].adapters["surgery"][Z][0, -1]) == 1
    assert float(one.state.shared[Z][0, -1]) == 1.75
    assert [float(one.kept[c]["surgery"][E]) for c in "ab"] == [1, 2]
    assert E not in one.replies["a"].adapters["surgery"]
    # Now a's c is 1.75 + 1, so the slope of W is (2.75 - 8) 2.75 = -14.4375; an eighth: 1.8046875.
    one.round()
    assert float(one.kept["a"]["personal"][HEAD]) == 0.5 + 1.8046875
    assert one.replies["a"].adapters == {}
    assert float(one.state.shared[Z][0, -1]) == 1.75


def test_on_one_side_slopes_are_off_by_half_of_rho(bench: Any) -> None:
    # (28.125 - 32) / 0.5 = -7.75 instead of -8.
    one = bench(rho=0.5, share=1.0)
    one.round()
    assert float(one.kept["a"]["surgery"][E]) == 7.75 / 8


def test_alternating_turns_re_map_first(bench: Any) -> None:
    # At c = 0 W has no slope, so the first round is surgery's alone; in the second W moves first.
    one = bench(sides="two", rho=0.5, order="alternate")
    one.round()
    assert float(one.kept["a"]["personal"][HEAD]) == 0.5
    one.round()
    assert float(one.kept["a"]["personal"][HEAD]) == 0.5 + 1.8046875
    w = 1 + 1.8046875  # slope of e: W (W 2.75 - 8)
    assert float(one.kept["a"]["surgery"][E]) == pytest.approx(1 - w * (2.75 * w - 8) / 8)


# ---- slopes of a real model


@contextmanager
def opened(seat: Seat, **options: Any) -> Generator[tuple[Desk, Batch, ZooPfl]]:
    """A desk whose encoder has left its anchor, and a batch with padding."""
    method = zoo(**options)
    with at_desk(backbone(), seat, slots=dict(method.specs())) as (desk, _):
        stream = torch.Generator().manual_seed(1)
        for name, value in desk.model.near["surgery"].items():
            if "_anchor_" not in name:
                value.add_(torch.randn(value.shape, generator=stream), alpha=0.3)
        yield desk, desk.task.collate(desk.shard.train, range(4)), method


def exact(desk: Desk, batch: Batch) -> Tensor:
    """The slopes of rows' losses at their codes, by autograd through everything."""
    nudge = torch.zeros(batch.rows, 3, requires_grad=True)
    with desk.model.training({}, None):
        logits = desk.model.logits(batch, WORN, near={NUDGE: nudge})
        (desk.task.loss(logits, batch.labels) * batch.rows).backward()
    assert nudge.grad is not None
    return nudge.grad


def estimated(desk: Desk, batch: Batch, method: ZooPfl) -> Tensors:
    """What the estimate becomes in the encoder and in the own code."""
    desk.grad(queries.asked(desk, WORN, method.at, method.queries())(desk.model, batch),
              ["surgery"], ["slope"])  # fmt: skip
    return desk.model.near["slope"]


@pytest.mark.parametrize(
    ("seat", "at"), [(Seat(Cut(1, 1)), "input"), (Seat(Cut(1, 1)), "cut"), (whole(4), "input")]
)
@pytest.mark.parametrize("form", ["residual", "plain"])
def test_an_exact_slope_at_the_code_is_autograd_from_end_to_end(
    seat: Seat, at: Any, form: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(seat, at=at, form=form) as (desk, batch, method):
        desk.grad(desk.model.loss(batch, WORN), ["surgery"], ["true"])
        true, slope = desk.model.near["true"], exact(desk, batch)
        value = torch.zeros(batch.rows)
        monkeypatch.setattr(queries.Queries, "slope", lambda *_: (value, slope))
        found = estimated(desk, batch, method)
    for name in true:
        moves = "_encoder_" in name or "_own" in name
        assert bool(true[name].any()) == (moves or "_decoder_" in name or "_anchor_" in name), name
        if moves:
            assert torch.allclose(found[name], true[name], atol=1e-7, rtol=1e-4), name
        else:
            assert not found[name].any(), name


@pytest.mark.parametrize(("sides", "within"), [("one", 0.2), ("two", 0.01)])
def test_slopes_from_losses_are_those_of_the_model(sides: Any, within: float) -> None:
    with opened(Seat(Cut(1, 1)), sides=sides, rho=5e-2) as (desk, batch, method):
        desk.grad(desk.model.loss(batch, WORN), ["surgery"], ["true"])
        true, found = desk.model.near["true"], estimated(desk, batch, method)
        for name in (Z, E):
            size = float(true[name].norm())
            assert float((found[name] - true[name]).norm()) < within * size, name


def test_queries_in_several_forwards_are_those_of_one() -> None:
    slopes, counts = list[Tensor](), list[int]()
    for at_once in (None, 3):
        with opened(Seat(Cut(1, 1)), at_once=at_once) as (desk, batch, method):
            before = desk.session.call
            slopes.append(estimated(desk, batch, method)[Z])
            counts.append(desk.session.call - before)
    assert torch.allclose(slopes[0], slopes[1], atol=1e-4)
    assert counts == [1, 2]


def test_a_loss_that_is_no_number_takes_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(Seat(Cut(1, 1))) as (desk, _, method):
        before = {k: v.clone() for k, v in desk.model.near["surgery"].items()}
        slope = torch.tensor([[0.0, torch.inf, 0.0]]).expand(4, 3)
        monkeypatch.setattr(queries.Queries, "slope", lambda *_: (torch.zeros(4), slope))
        loss = queries.asked(desk, WORN, method.at, method.queries())
        facts = desk.fit(loss, wear=WORN, train={"surgery": ENCODER | OWN}, steps=2)
        assert facts["skipped"] == 2
        assert same(before, desk.model.near["surgery"])


# ---- nothing but forwards


@dataclass(frozen=True)
class Heard:
    """A link that notes what goes through it."""

    inner: Link
    into: list[Message]

    def send(self, message: Message) -> Answer:
        self.into.append(message)
        return self.inner.send(message)

    def close(self) -> None:
        self.inner.close()


def test_the_server_hears_forwards_alone_and_keeps_no_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heard, graphs, compute = list[Message](), list[Tensor](), Compute.graph

    def watched(self: Compute, job: Any) -> Any:
        graph = compute(self, job)
        graphs.append(graph.out)
        return graph

    monkeypatch.setattr(Compute, "graph", watched)
    wrap = lambda _, link: Heard(link, heard)  # noqa: E731
    method = zoo(warm=0, order="alternate")
    found = play(method, CUTS, seeds=(1, 2), wrap=wrap)
    assert all(a.failure is None for a in found.arrivals)
    forwards = [m for m in heard if isinstance(m, Forward)]
    assert forwards
    assert not any(isinstance(m, Backward) for m in heard)
    assert not any(m.keep or m.wants for m in forwards)
    assert len(graphs) == len(forwards)
    assert not any(out.requires_grad or out.grad_fn for out in graphs)
    assert not any(p.requires_grad for p in found.engine.backbone.model.parameters())


# ---- surgery, re-mapping, and who has what


def probed(method: Any, **more: Any) -> Played:
    return play(method, SEATS, kind=Head(), **more)


def heads(found: Played) -> dict[str, Tensors]:
    return {c: memory.slots["slot/personal"] for c, memory in found.engine.memories.items()}


def test_without_surgery_it_is_linear_probing_of_each_client() -> None:
    # `local` of a head alone: the same rows, batches and steps on the features of frozen blocks.
    plain = heads(probed(Local()))
    found = heads(probed(zoo(rebuild=0, share=0.0)))
    assert all(same(found[c], plain[c]) for c in plain)
    operated = heads(probed(zoo(rebuild=0, warm=1, share=1.0)))
    assert not all(same(operated[c], plain[c]) for c in plain)


@pytest.mark.parametrize(("form", "alike"), [("residual", True), ("plain", False)])
def test_after_stage_0_a_residual_model_is_what_it_was(form: Any, alike: bool) -> None:
    method = zoo(form=form)
    shared = play(method, SEATS, rounds=1).state.shared
    offer, slots = Parcel({"surgery": shared}), dict(method.specs())
    with at_desk(backbone(), whole(4), slots=slots, offer=offer) as (desk, _):
        batch = desk.task.collate(desk.shard.train, range(4))
        logits = [desk.model.logits(batch, wear) for wear in ("personal", WORN)]
    assert torch.equal(*logits) == alike


def test_stage_0_learns_the_means_of_rows_and_asks_nobody() -> None:
    method = zoo(width=16, code=8, rebuild=2)
    training, missed = Training(Optim(lr=2e-2), batch=4, steps=20), list[float]()
    for rounds in (0, 2):
        found = play(method, SEATS, rounds=rounds, training=training)
        assert all(not {"hidden", "mask"} & {k for _, k in a.ledger.kinds} for a in found.arrivals)
        offer, slots = Parcel({"surgery": found.state.shared}), dict(method.specs())
        with at_desk(backbone(), whole(4), slots=slots, offer=offer) as (desk, _):
            batch, worn = desk.task.collate(desk.shard.train, range(12)), worn_by(desk.model, WORN)
            mean = queries.mean_of(desk.model, batch, WORN, "input")
            gap = decoded(coded(mean, worn, "input"), worn, "input") - mean
            missed.append(float(gap.detach().square().mean()))
    assert missed[1] < 0.7 * missed[0]


def test_the_decoder_is_frozen_after_stage_0_and_own_codes_never_leave() -> None:
    method = zoo(warm=0, share=1.0)
    first, last = (play(method, SEATS, rounds=n, keep_crossings=True) for n in (1, 3))
    for name, value in last.state.shared.items():
        moves = "_encoder_" in name
        assert torch.equal(value, first.state.shared[name]) != moves, name
        assert "_own" not in name
    codes = [m.slots["slot/surgery"] for m in last.engine.memories.values()]
    assert len({tuple(held[E].tolist()) for held in codes}) == 3
    for arrival in last.arrivals:
        names = {c.name for c in arrival.ledger.crossings or ()}
        assert {n for n in names if "surgery" in n}
        assert not any("_own" in n or "head" in n or "classifier" in n for n in names)


def test_all_wear_one_encoder_and_their_own_codes() -> None:
    found, held = play(method := ZooPfl(**NOW), SEATS), list[Tensors]()
    assert method.owns().holds(E, backbone().place(E, whole(4)))
    for client, seat in zip(found.engine.memories, SEATS, strict=True):
        mine = found.engine.memories[client].slots["slot/surgery"]
        offer = Parcel({"surgery": {**mine, **found.state.shared}})
        with at_desk(backbone(), seat, slots=dict(method.specs()), offer=offer) as (desk, _):
            held.append(desk.model.near["surgery"])
    for name in held[0]:
        equal = all(torch.equal(held[0][name], other[name]) for other in held[1:])
        assert equal != name.endswith("_own"), name


def test_the_encoder_is_averaged_by_the_rows_that_clients_tell() -> None:
    replies = {
        c: Parcel({"surgery": {Z: torch.full((1, 1), value)}}, facts={"rows": rows})
        for c, value, rows in (("a", 4.0, 1), ("b", 8.0, 3))
    }
    state = play(ZooPfl(**NOW), SEATS, rounds=0).state
    for told, wanted in ((3, 7.0), ("many", 4.0), (-3, 4.0)):
        one = Parcel(replies["b"].adapters, facts={"rows": told})
        assert float(state.averaged({**replies, "b": one}).shared[Z]) == wanted
    blank = {c: Parcel(r.adapters) for c, r in replies.items()}
    assert float(state.averaged(blank).shared[Z]) == 6


def test_who_comes_late_is_sent_the_decoder_once() -> None:
    method, bench = zoo(warm=0, share=1.0), play(zoo(), SEATS, rounds=0)
    given = {k: v + 1 for k, v in bench.state.shared.items() if "anchor" not in k}
    reply, turn = Parcel({"surgery": given}, facts={"rows": 1}), SimpleNamespace(round=0)
    state = method.merge(bench.state, {"a": reply}, cast("Any", turn))
    assert (state.version, state.settled) == (1, 1)
    assert state.lacking("a") == state.lacking("b")  # the mean is another than a's own
    encoder = {k: v for k, v in given.items() if "_encoder_" in k}
    turn.round, reply = 1, Parcel({"surgery": encoder}, facts={"rows": 1})
    state = method.merge(state, {"a": reply}, cast("Any", turn))
    assert (state.lacking("a"), state.settled) == (ENCODER, 1)
    assert state.lacking("b").words() == "everything"
    turn.round = 2
    state = method.merge(state, {"a": Parcel(), "b": Parcel()}, cast("Any", turn))
    assert {state.lacking(c).words() for c in "ab"} == {"nothing"}


# ---- what it costs, and what is refused

SIZES = {k: 4 * torch.Size(shape).numel() for k, shape in Surgery(2, 1, 4).layout(32).items()}
THETA, DEC = (sum(v for k, v in SIZES.items() if f"_{of}_" in k) for of in ("encoder", "decoder"))


@pytest.mark.parametrize(
    ("more", "asked"),
    [
        ({}, 2 + 1 + 1),
        ({"sides": "two"}, 2 * (2 + 1)),
        ({"along": "signs", "directions": 3}, 3 + 1),
        ({"along": "normal", "directions": 2, "sides": "two"}, 4),
    ],
)
def test_a_round_of_zoopfl_costs_what_the_formula_says(more: dict[str, Any], asked: int) -> None:
    # Rounds: stage 0, surgery, surgery, re-mapping twice. A query is a row's hidden state each way
    # and its mask, a step of re-mapping one query; nothing comes backward. Everybody has what all
    # begin with; then the encoder, its anchor and the decoder go down, then the encoder alone.
    method = zoo(warm=0, **more)
    assert method.queries().count(3) == asked
    costs = {
        1: (0, THETA + DEC, 0),
        2: (asked, THETA, 2 * THETA + DEC),
        3: (asked, THETA, THETA),
        4: (1, 0, THETA),
        5: (1, 0, 0),
    }
    for rounds in (1, 2, 3, 4, 5) if not more else (2,):
        method = replace(method, share=[1.0, 1.0, 1.0, 0.67, 0.5][rounds - 1])
        queries, up, down = costs[rounds]
        for arrival in play(method, SEATS, rounds=rounds, training=SGD).arrivals:
            assert arrival.failure is None
            steps = 0 if arrival.client == "c2" else STEPS
            assert (arrival.ledger.sent, arrival.ledger.received) == (
                steps * queries * (S + MASK) + up,
                steps * queries * S + down,
            ), (rounds, arrival.client)


def test_zoopfl_refuses_what_has_no_head_at_the_client_or_no_cut() -> None:
    text = Setting(
        "classification", Lora(), {"a": whole(4), "b": Seat(Cut(1), rank=2)}, 4, head=True
    )
    assert ZooPfl().refuses(text) == ""
    assert "adapter.head=true" in ZooPfl().refuses(replace(text, head=False))
    assert "adapter.head=true" in ZooPfl().refuses(replace(text, task="causal-lm"))
    behind = replace(text, seats={"a": Seat(Cut(1), "logits")})
    assert "Set plan.labels=keep" in ZooPfl().refuses(behind)
    assert "Set strategy.at=input" in ZooPfl(at="cut").refuses(text)
    assert ZooPfl(at="cut").refuses(replace(text, seats={"b": Seat(Cut(1))})) == ""


@pytest.mark.parametrize("remap", ["linear", "head"])
def test_the_re_mapping_is_the_heads_last_map_or_all_of_it(remap: Any) -> None:
    method = zoo(rebuild=0, share=0.0, remap=remap)
    found = heads(play(method, Seat(Cut(1, 1)), family="roberta-cls", rounds=1))
    begun = backbone("roberta-cls").initial(Head(), Dice(0)("initial"))
    for held in found.values():
        for name, value in held.items():
            last = "out_proj" in name
            assert torch.equal(value, begun[name]) == (remap == "linear" and not last), name
