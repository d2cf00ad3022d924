"""Whatever is killed or cut, the run ends with the adapters of a run that nothing happened to."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from network.cluster import CLIENTS, CUTS, Cluster, Program, alone, same
from network.proxy import Proxy

Recipe = Callable[..., Path]


@pytest.fixture
def long(recipe_of: Recipe, tmp_path: Path) -> Path:
    """A recipe whose rounds last long enough to be interrupted; steps depend on dropout."""
    changes = {"plan__cut": None, "plan__cuts": CUTS, "adapter__dropout": 0.1, "train__steps": 40}
    return recipe_of(out=str(tmp_path / "served"), **changes)


def begin(
    cluster: Cluster, recipe: Path, mine: Path, at: str = ""
) -> tuple[Program, list[Program]]:
    server = cluster.serve(recipe, "--clients", ",".join(CLIENTS))
    joined = [join(cluster, c, mine, at) for c in CLIENTS]
    return server, joined


def join(cluster: Cluster, client: str, mine: Path, at: str = "") -> Program:
    return cluster.join(client, mine / f"{client}.jsonl", "--name", client, at=at)


def ended(*programs: Program) -> None:
    for program in programs:
        assert program.wait() == 0, program.text()


@pytest.mark.slow
def test_a_server_that_is_killed_in_mid_round_goes_on(
    cluster: Cluster, recipe_of: Recipe, mine: Path, tmp_path: Path
) -> None:
    """Rounds long enough that all are at work a little after the first one."""
    changes = {"plan__cut": None, "plan__cuts": CUTS, "adapter__dropout": 0.1}
    steps = {"train__steps": 100, "rounds": 2}
    long = recipe_of(out=str(tmp_path / "served"), **changes, **steps)
    server, joined = begin(cluster, long, mine)
    server.wait_for("round 1 of 2")
    time.sleep(0.3)
    server.kill()
    again = cluster.serve(long)
    ended(*joined, again)
    assert "going on with" in again.text()
    assert "resuming after round" in again.text()
    assert any("has begun this turn anew" in program.text() for program in joined)
    same(cluster, alone(long, tmp_path / "alone"))


def test_a_client_that_is_killed_in_mid_round_comes_back(
    cluster: Cluster, recipe_of: Recipe, mine: Path, tmp_path: Path
) -> None:
    changes = {"plan__cut": None, "plan__cuts": CUTS, "adapter__dropout": 0.1}
    steps = {"train__steps": 30, "rounds": 2}
    long = recipe_of(out=str(tmp_path / "served"), **changes, **steps)
    server, joined = begin(cluster, long, mine)
    joined[1].wait_for("round 1 of 2")
    time.sleep(0.2)
    joined[1].kill()
    back = join(cluster, CLIENTS[1], mine)
    ended(joined[0], joined[2], back, server)
    assert "is back" in server.text()
    same(cluster, alone(long, tmp_path / "alone"))


@pytest.mark.slow
def test_a_link_that_is_dark_for_a_while_costs_nothing_but_time(
    cluster: Cluster, long: Path, mine: Path, tmp_path: Path
) -> None:
    server = cluster.serve(long, "--clients", ",".join(CLIENTS))
    with Proxy(("127.0.0.1", cluster.port)) as proxy:
        joined = [join(cluster, c, mine) for c in CLIENTS[:2]]
        joined.append(join(cluster, CLIENTS[2], mine, at=f"127.0.0.1:{proxy.port}"))
        joined[2].wait_for("round 1 of 3")
        time.sleep(0.2)
        proxy.cut(5)
        ended(*joined, server)
        assert proxy.connections > 1
    assert "trying again" in joined[2].text()
    assert "carl dee is connected again" in server.text()
    assert "has begun this turn anew" not in joined[2].text()
    same(cluster, alone(long, tmp_path / "alone"))


@pytest.mark.slow
def test_connections_that_break_again_and_again(
    cluster: Cluster, long: Path, mine: Path, tmp_path: Path
) -> None:
    """Resets at odd places of a stream: within a frame, before an answer."""
    server = cluster.serve(long, "--clients", ",".join(CLIENTS))
    with Proxy(("127.0.0.1", cluster.port), pieces=700) as proxy:
        joined = [join(cluster, c, mine, at=f"127.0.0.1:{proxy.port}") for c in CLIENTS]
        joined[0].wait_for("round 1 of 3")
        for n in range(8):
            proxy.reset_after(3_000 + 1_777 * n, "up" if n % 2 else "down")
            time.sleep(0.4)
        ended(*joined, server)
        assert proxy.connections > len(CLIENTS)
    same(cluster, alone(long, tmp_path / "alone"))


@pytest.mark.slow
def test_who_stays_away_is_not_waited_for(
    cluster: Cluster, long: Path, mine: Path, tmp_path: Path
) -> None:
    server = cluster.serve(long, "--clients", ",".join(CLIENTS), "--patience", "1", "--stay", "0")
    joined = [join(cluster, c, mine) for c in CLIENTS]
    joined[2].wait_for("round 1 of 3")
    joined[2].kill()
    ended(joined[0], joined[1], server)
    assert re.search(r"carl dee failed: away for \d+ seconds", server.text())


@pytest.mark.slow
def test_a_stopped_machine_wakes_up_and_goes_on(
    cluster: Cluster, long: Path, mine: Path, tmp_path: Path
) -> None:
    """A laptop that sleeps: nothing is sent and nothing is answered for a while."""
    server, joined = begin(cluster, long, mine)
    joined[0].wait_for("round 1 of 3")
    joined[0].kill(signal.SIGSTOP)
    time.sleep(4)
    joined[0].kill(signal.SIGCONT)
    ended(*joined, server)
    same(cluster, alone(long, tmp_path / "alone"))


@pytest.mark.slow
def test_who_sleeps_for_too_long_is_back_in_a_later_round(
    cluster: Cluster, recipe_of: Recipe, mine: Path, tmp_path: Path
) -> None:
    changes = {"plan__cut": None, "plan__cuts": CUTS, "train__steps": 80, "rounds": 8}
    recipe = recipe_of(out=str(tmp_path / "served"), **changes)
    server = cluster.serve(recipe, "--clients", ",".join(CLIENTS), "--patience", "0.5")
    joined = [join(cluster, c, mine) for c in CLIENTS]
    joined[2].wait_for("round 1 of 8")
    joined[2].kill(signal.SIGSTOP)
    server.wait_for(r"carl dee failed: away for \d+ seconds")
    joined[2].kill(signal.SIGCONT)
    ended(*joined, server)
    assert "round 8 of 8" in joined[2].text()
    assert cluster.adapter("carl dee").is_dir()


@pytest.mark.slow
def test_who_is_asked_to_end_ends_well(
    cluster: Cluster, long: Path, mine: Path, tmp_path: Path
) -> None:
    """A service manager sends SIGTERM, to the server and then to a client, each within a round."""
    server, joined = begin(cluster, long, mine)
    joined[0].wait_for("round 1 of 3")
    server.kill(signal.SIGTERM)
    assert server.wait(60) == 0, server.text()
    assert "Stopped. Continue with the same command" in server.text()
    server = cluster.serve(long)
    server.wait_for("going on with(.|\n)*ben is (here|back)")
    joined[1].kill(signal.SIGTERM)
    assert joined[1].wait(60) == 0, joined[1].text()
    server.wait_for("ben has left")
    server.kill(signal.SIGTERM)
    assert server.wait(60) == 0
    server, back = cluster.serve(long), join(cluster, CLIENTS[1], mine)
    ended(joined[0], joined[2], back, server)
    same(cluster, alone(long, tmp_path / "alone"))
