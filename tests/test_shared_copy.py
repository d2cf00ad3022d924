"""What all wear far, where a client fails, moves, is alone, or the run is resumed."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from toys import backbone, shard, toy_task

from flexp import checkpoint
from flexp.client.desk import Training
from flexp.dice import Dice
from flexp.engine.base import Arrival, assigned
from flexp.engine.flow import Flow, Pace
from flexp.engine.local import LocalEngine
from flexp.link.messages import Answer, Link, Message
from flexp.link.metered import Ledger
from flexp.model.adapter import Lora
from flexp.model.cut import Cut, Seat
from flexp.model.ops import Optim
from flexp.recipe import Recipe
from flexp.rounds import flow_of, waves_of
from flexp.strategies import build
from flexp.strategies.base import Scene, Strategy, Turn
from flexp.strategies.flexp import FlexP
from flexp.strategies.flexp_sfl import FlexPSfl
from flexp.strategies.splitfed_v3 import SplitFedV3
from flexp.tensors import Tensors

CLIENTS = ("a", "b")
NARROW: dict[str, Seat] = dict.fromkeys(CLIENTS, Seat(Cut(1, 1)))


@dataclass(frozen=True)
class Dead:
    """A line that breaks at the first forward."""

    inner: Link

    def send(self, message: Message) -> Answer:
        if message.key.phase == "forward":
            raise OSError("the line is dead")
        return self.inner.send(message)

    def close(self) -> None:
        self.inner.close()


@dataclass
class Site:
    """Two clients of an engine under a method, round by round."""

    strategy: Strategy[Any]
    seats: Mapping[str, Seat] = field(default_factory=lambda: NARROW)
    dead: set[str] = field(default_factory=set[str])

    def __post_init__(self) -> None:
        self.engine = LocalEngine(
            backbone(),
            toy_task(backbone()),
            {c: shard(n + 1) for n, c in enumerate(CLIENTS)},
            kind=Lora(rank=3, alpha=6.0),
            training=Training(Optim(lr=1e-2), batch=4, steps=2),
            dice=Dice(0),
            profile="open",
            wrap=lambda client, link: Dead(link) if client in self.dead else link,
        )
        scene = Scene(CLIENTS, self.seats, self.engine.initial, Dice(0))
        self.state: Any = self.strategy.start(scene)

    def turn(self, r: int, chosen: Sequence[str] = CLIENTS, alone: Sequence[str] = ()) -> Turn:
        body = backbone()
        places: Any = (body.block_of, body.depth, tuple(chosen), tuple(alone))
        return Turn(r, 9, 0, True, self.seats, {}, *places)

    def round(self, r: int, chosen: Sequence[str] = CLIENTS, alone: Sequence[str] = ()) -> None:
        turn, found = self.turn(r, chosen, alone), list[Arrival]()
        for client in alone:
            work = assigned(self.strategy, self.engine, self.state, client, turn)
            found.append(self.engine.alone(self.strategy, work, turn))
        flow = Flow({c: Pace(near=1.0 + n) for n, c in enumerate(chosen)})
        played: Callable[[], Any] = (
            (lambda: waves_of(self.strategy, self.engine, self.state, turn, Dice(0)))
            if self.strategy.barrier
            else (lambda: flow_of(self.strategy, self.engine, self.state, [turn], flow))
        )
        for _, arrivals, merged in played():
            self.state = merged
            found += arrivals
        failed = {a.client for a in found if a.failure}
        assert failed == self.dead & {*chosen, *alone}

    def served(self, client: str, turn: Turn) -> Tensors:
        work = assigned(self.strategy, self.engine, self.state, client, turn)
        with self.engine.visit(self.strategy, work, turn, Ledger()) as (desk, offer):
            adapter = self.strategy.personal(desk, offer).adapter
            assert adapter is not None
            return desk.whole(adapter)


@contextmanager
def sites(*strategies: Strategy[Any]) -> Generator[list[Site]]:
    with ExitStack() as stack:
        made = [Site(strategy) for strategy in strategies]
        for site in made:
            stack.callback(site.engine.close)
        yield made


def lengths(adapter: Mapping[str, Any]) -> list[float]:
    """What each block has learned: the length of its B matrices."""
    out = [0.0] * backbone().depth
    for name, value in adapter.items():
        if "lora_B" in name:
            out[backbone().block_of(name)] += float(value.norm())
    return out


def equal(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(bool((a[k] == b[k]).all()) for k in a)


@pytest.mark.parametrize("fails", [False, True])
def test_a_failed_turn_takes_no_block_of_another_client_away(fails: bool) -> None:
    with sites(FlexP(server="sequential", align=0.0)) as (site,):
        site.seats = dict.fromkeys(CLIENTS, Seat(Cut(3, 0)))
        site.round(0)
        site.seats = {"a": Seat(Cut(3, 0)), "b": Seat(Cut(1, 0))}  # b hands two blocks in
        site.dead = {"a"} if fails else set()
        site.round(1)
        assert min(lengths(site.served("b", site.turn(2)))) > 0.1


@pytest.mark.parametrize("name", ["flexp", "splitlora", "splitfed_v2"])
def test_who_is_alone_at_the_end_does_not_reset_a_resumed_trunk(name: str, tmp_path: Path) -> None:
    options = {"server": "sequential"} if name == "flexp" else {}
    with sites(build(name, options), build(name, options)) as (site, again):
        site.round(0)
        site.round(1, ["b"], ["a"])
        path = checkpoint.write(tmp_path, 2, Recipe(), site.state, site.engine)
        again.state = checkpoint.read(path, again.strategy, again.engine)
        end = site.turn(2, ["b"], ["a"])
        for client in CLIENTS:
            assert equal(site.served(client, end), again.served(client, end))
        assert min(lengths(again.served("b", end))[1:3]) > 0.1


def test_a_clients_pace_is_that_of_the_round() -> None:
    """Who moves to a slower device is slower from then on, though no round ends for all."""
    with sites(FlexP(server="sequential")) as (site,):
        begun = [site.turn(0), site.turn(1)]

        def paces(r: int) -> dict[str, Pace]:
            return {"a": Pace(near=100.0 if r else 1.0), "b": Pace(near=1.0)}

        flow, ends = Flow(paces(0)), dict[tuple[str, int], float | None]()
        played = flow_of(site.strategy, site.engine, site.state, begun, flow, paces=paces)
        for turn, (arrival,), _ in played:
            ends[arrival.client, turn.round] = arrival.clock
    assert ends == {("a", 0): 2.0, ("b", 0): 2.0, ("b", 1): 4.0, ("a", 1): 202.0}  # two steps each


def test_frozen_blocks_of_who_is_alone_stay_what_they_are() -> None:
    with sites(FlexP(form="freeze")) as (site,):
        site.seats = {"a": Seat(Cut(2, 1)), "b": Seat(Cut(1, 1))}
        site.round(0)
        site.round(1)
        site.round(2, ["b"], ["a"])
        kept = site.engine.memories["a"].slots["slot/personal"]
        assert lengths(site.served("a", site.turn(2, ["b"], ["a"]))) == lengths(kept)
        assert min(lengths(kept)[1:3]) > 0.05


def test_who_goes_alone_takes_the_present_trunk_along() -> None:
    with sites(FlexP(server="sequential", align=0.0)) as (site,):
        site.round(0)
        site.round(1, ["b"])
        before = site.served("a", site.turn(2))
        turn = site.turn(2, ["b"], ["a"])
        site.round(2, ["b"], ["a"])
        after = site.served("a", turn)
    start, alone = lengths(before)[1], lengths(after)[1]
    assert alone > 0.9 * start  # it went on from what all had learned, not from its last turn


def test_a_client_that_begins_alone_has_the_head_of_all() -> None:
    with sites(FlexP()) as (site,):
        site.round(0, ["b"], ["a"])
        heads = [
            {
                k: v
                for k, v in site.engine.memories[c].slots["slot/personal"].items()
                if "class" in k
            }
            for c in CLIENTS
        ]
    assert heads[0]
    assert equal(heads[0], heads[1])


@pytest.mark.parametrize(
    "strategy",
    [FlexP(align=0.0), FlexP(align=0.0, server="sequential"), FlexP(), SplitFedV3()],
    ids=["parallel", "sequential", "aligned", "splitfed_v3"],
)
def test_a_block_that_becomes_near_is_the_one_that_was_worn(strategy: Strategy[Any]) -> None:
    """Others have gone on with it since the client's last turn."""
    with sites(strategy) as (site,):
        site.round(0)
        for r in (1, 2, 3):
            site.round(r, ["b"])
        before = site.served("a", site.turn(4))
        site.seats = {**site.seats, "a": Seat(Cut(3, 1))}
        assert equal(site.served("a", site.turn(4)), before)


def test_frozen_blocks_are_served_as_they_were_trained_with() -> None:
    """From ``until`` on nothing is offered to freeze them to."""
    with sites(FlexPSfl(form="freeze"), FlexPSfl(form="freeze", until=2)) as both:
        for site in both:
            site.seats = {"a": Seat(Cut(2, 1)), "b": Seat(Cut(1, 1))}
            site.round(0)
            site.round(1)
        served = [site.served("a", site.turn(2)) for site in both]
    assert min(lengths(served[1])[1:3]) > 0.05
    assert lengths(served[0])[2] == lengths(served[1])[2]
