"""Through a link that does something to a third of all packets, every step counts exactly once."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import suites
from faults import league
from faults.league import CLIENTS, Digests, League
from network.cluster import Cluster, Nursery
from network.fake import Fake, hello
from network.proxy import Proxy, Touch

from flexp.link.control import Order, Welcome

LOSSES = "reset", "drop"


@dataclass(frozen=True)
class Outcome:
    """What a server has carried out, and what everybody had in the end."""

    counts: Mapping[str, int]
    committed: Digests
    adapters: Digests


@dataclass(frozen=True)
class Passed:
    """What a link has done."""

    packets: int
    touched: Mapping[str, int]
    connections: int


def played(
    cluster: Cluster, rounds: int, steps: int, touch: Touch | None = None, seed: int = 0
) -> tuple[Outcome, Passed]:
    """A run through a proxy, which is touched from the second round on; counted at the server."""
    counts = cluster.folder / "counts.json"
    recipe = league.recipe(cluster.folder, rounds=rounds, steps=steps)
    env = {"LIGHT_COUNT": str(counts), "LIGHT_KEEP": "1"}
    made = League(cluster, recipe, env=env)
    made.start("server", "--stay", "1")  # who has lost its way hears the end
    with Proxy(("127.0.0.1", cluster.port), seed=seed) as proxy:
        made.at = f"127.0.0.1:{proxy.port}"
        for client in CLIENTS:
            made.start(client)
        # Before its first order is heard a client that loses its way comes in anew, and measures
        # the link with a megabyte, which would hardly ever come through.
        made.programs["server"].wait_for("round 1 of")
        before = proxy.up.packets + proxy.down.packets
        if touch is not None:
            proxy.touch(touch)
        made.ended(patience=100 + rounds * steps)
        packets = proxy.up.packets + proxy.down.packets - before
        done = Passed(packets, proxy.up.touched + proxy.down.touched, proxy.connections)
    found = json.loads(counts.read_text("utf-8"))
    assert league.leftovers(cluster.folder) == []
    return Outcome(found, made.committed(), made.adapters()), done


@pytest.fixture(scope="module")
def clean_of(
    light: Nursery, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int, int], Outcome]:
    """The outcome over a link that does nothing to anything."""
    known: dict[tuple[int, int], Outcome] = {}

    def of(rounds: int, steps: int) -> Outcome:
        if (rounds, steps) not in known:
            cluster = Cluster(light, tmp_path_factory.mktemp("clean"))
            try:
                known[rounds, steps], _ = played(cluster, rounds, steps)
            finally:
                cluster.reap()
        return known[rounds, steps]

    return of


def storm(
    cluster: Cluster,
    clean_of: Callable[[int, int], Outcome],
    rounds: int,
    steps: int,
    seed: int,
) -> tuple[Outcome, Passed]:
    clean, asked = clean_of(rounds, steps), rounds * steps * len(CLIENTS)
    assert clean.counts["Backward"] == asked
    found, link = played(cluster, rounds, steps, Touch(), seed)
    exact = {k: v for k, v in found.counts.items() if k != "repeated"}
    assert exact == {k: v for k, v in clean.counts.items() if k != "repeated"}
    assert exact["twice"] == 0
    assert exact["Backward"] == asked
    assert found.committed == clean.committed
    assert found.adapters == clean.adapters
    assert link.connections > len(CLIENTS)
    assert all(link.touched[what] for what in Touch().odds)
    return found, link


def test_a_hundred_steps_count_once_each(
    cluster: Cluster, clean_of: Callable[[int, int], Outcome]
) -> None:
    storm(cluster, clean_of, rounds=2, steps=18, seed=5)


def test_who_lost_its_way_goes_on_only_if_it_has_heard_an_order(cluster: Cluster) -> None:
    """What the server tells unasked may be lost with a connection: the seat, and the first order.

    The process that was there at the beginning is known at once, not only after a first break.
    """
    made = League(cluster, league.recipe(cluster.folder, rounds=1, steps=2), ("anna", "ben"))
    made.start("server")
    with Fake(cluster.port) as first:
        server = first.come_in("anna").server
        made.start("ben")
        order = first.told(Order)
    with Fake(cluster.port) as again:
        said = again.ask(hello("anna", server=server, order=order.number))
        assert isinstance(said, Welcome)
        assert said.resumed
    with Fake(cluster.port) as deaf:
        said = deaf.ask(hello("anna", server=server, order=0))
        assert isinstance(said, Welcome)
        assert not said.resumed


@pytest.mark.faults
def test_ten_thousand_steps_count_once_each(
    cluster: Cluster, clean_of: Callable[[int, int], Outcome], case: suites.Case
) -> None:
    case.begin(seed=11)
    told(case, *storm(cluster, clean_of, rounds=21, steps=125, seed=11))


@pytest.mark.soak
def test_a_hundred_thousand_steps_count_once_each(
    cluster: Cluster, clean_of: Callable[[int, int], Outcome], case: suites.Case, duration: float
) -> None:
    """So many from twenty minutes on; fewer in less."""
    case.begin(seed=12, **{"for": f"{duration:.0f}s"})
    rounds = 1 + max(1, min(200, round(duration / 6)))
    told(case, *storm(cluster, clean_of, rounds=rounds, steps=125, seed=12))


def told(case: suites.Case, found: Outcome, link: Passed) -> None:
    """What was counted, for the result."""
    assert found.counts["repeated"], "no message was ever sent twice: this storm proves nothing"
    case.count(
        steps=found.counts["Backward"],
        repeated=found.counts["repeated"],
        packets=link.packets,
        touched=dict(link.touched),
        connections=link.connections,
    )
