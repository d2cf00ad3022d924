"""What people do that nobody planned for: a run goes on, and who asked hears what is wrong."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from network.cluster import CLIENTS, CUTS, Cluster, Program, Recipe, alone, same
from network.fake import Fake, hello
from network.test_faults import ended
from safetensors.torch import load_file, save_file

from flexp.link.control import Measured, Proposal, Refused, Welcome


def join(cluster: Cluster, client: str, mine: Path, *argv: str, log: str = "") -> Program:
    return cluster.join(client, mine / f"{client}.jsonl", "--name", client, *argv, log=log)


@pytest.mark.slow
def test_a_late_joiner_with_another_label_is_refused(
    cluster: Cluster, recipe_of: Recipe, mine: Path, tmp_path: Path
) -> None:
    """The head has as many rows as there were labels at the beginning; nobody else is hurt."""
    changes: dict[str, Any] = {"train__steps": 60, "rounds": 4, "strategy": {"name": "fedavg"}}
    recipe = recipe_of(out=str(tmp_path / "served"), **changes)
    server = cluster.serve(recipe, "--quorum", "2")
    first = [join(cluster, c, mine) for c in CLIENTS[:2]]
    server.wait_for("round 1 of 4")
    file = mine / "carl dee.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[0]["label"] = "neutral"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    last = join(cluster, CLIENTS[2], mine)
    assert last.wait() == 2, last.text()
    assert '"neutral"' in last.text()
    first[0].kill()
    first[0] = join(cluster, "anna", mine, log="anna again")
    ended(*first, server)


@pytest.mark.slow
def test_the_only_client_may_leave_and_come_back(
    cluster: Cluster, recipe_of: Recipe, mine: Path, tmp_path: Path
) -> None:
    """A round in which nobody was there is lost; the run is not."""
    recipe = recipe_of(out=str(tmp_path / "served"), train__steps=300, rounds=3)
    server = cluster.serve(recipe, "--quorum", "1", "--patience", "0.5")
    anna = join(cluster, "anna", mine)
    anna.wait_for("round 1 of 3")
    time.sleep(0.5)  # it is in the next round
    anna.kill(signal.SIGINT)
    assert anna.wait() == 130
    server.wait_for("anna failed: has left")
    anna = join(cluster, "anna", mine, log="anna again")
    ended(anna, server)


@pytest.mark.slow
def test_who_is_away_holds_up_nobody_where_one_trains_after_another(
    cluster: Cluster, recipe_of: Recipe, mine: Path, tmp_path: Path
) -> None:
    """A wave of one client that has left is over at once, as long as somebody is there."""
    changes: dict[str, Any] = {"train__steps": 60, "rounds": 4, "strategy": {"name": "sl"}}
    recipe = recipe_of(out=str(tmp_path / "served"), **changes)
    server = cluster.serve(recipe, "--clients", "anna,ben", "--patience", "0.5")
    anna, ben = (join(cluster, c, mine) for c in CLIENTS[:2])
    anna.wait_for("round 1 of 4")
    anna.kill(signal.SIGINT)
    assert ben.wait(40) == 0, ben.text() + server.text()
    server.kill(signal.SIGINT)


@pytest.mark.slow
def test_a_folder_that_held_another_model_is_not_taken_for_this_one(
    cluster: Cluster, recipe_of: Recipe, mine: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """The same names and shapes, other weights."""
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    values = load_file(other / "model.safetensors")
    values = {name: value * 1.5 for name, value in values.items()}
    save_file(values, other / "model.safetensors", {"format": "pt"})
    for client in CLIENTS[1:]:
        (mine / f"{client}.jsonl").unlink()
    recipe = recipe_of()
    for n, model in enumerate((tiny_model, other)):
        name = f"run {n}"
        recipe = recipe_of(out=str(tmp_path / "served"), name=name, model__source=str(model))
        server = cluster.serve(recipe, "--quorum", "1", name=f"server {n}")
        accept = server.wait_for(r"recipe ([0-9a-f]{64})").group(1)
        ended(join(cluster, "anna", mine, "--accept", accept, log=f"anna {n}"), server)
    same(cluster, alone(recipe, tmp_path / "alone"), ("anna",))


@pytest.mark.slow
def test_two_clients_need_two_folders(
    cluster: Cluster, recipe_of: Recipe, mine: Path, tmp_path: Path
) -> None:
    """What one keeps would else be taken for what the other does."""
    recipe = recipe_of(out=str(tmp_path / "served"))
    server = cluster.serve(recipe, "--quorum", "2")
    folder = ("--folder", str(tmp_path / "joined"))
    anna = join(cluster, "anna", mine, *folder)
    server.wait_for("anna is here")
    ben = join(cluster, "ben", mine, *folder)
    assert ben.wait() == 2, ben.text()
    assert '"anna"' in ben.text()
    ben = join(cluster, "ben", mine, log="ben again")
    ended(anna, ben, server)


@pytest.mark.slow
def test_who_is_killed_in_turns_of_its_own_goes_on_with_them(
    cluster: Cluster, recipe_of: Recipe, mine: Path, tmp_path: Path
) -> None:
    """After the end, and the server ends when it has said that it would."""
    recipe = recipe_of(out=str(tmp_path / "served"), train__steps=60, rounds=1)
    server = cluster.serve(recipe, "--quorum", "1", "--stay", "6", "--patience", "20")
    ended(join(cluster, "anna", mine))
    more = join(cluster, "anna", mine, "--more", "4", log="more")
    more.wait_for("round 1 of 4")
    more.kill()
    ended(join(cluster, "anna", mine, "--more", "4", log="more again"))
    ended(server)


@pytest.mark.slow
def test_who_came_in_the_last_round_learns_after_it(
    cluster: Cluster, recipe_of: Recipe, mine: Path, tmp_path: Path
) -> None:
    """There is no next round to wait for."""
    recipe = recipe_of(out=str(tmp_path / "served"), train__steps=400, rounds=1)
    server = cluster.serve(recipe, "--quorum", "1")
    anna = join(cluster, "anna", mine)
    server.wait_for("anna on ")
    carl = join(cluster, "carl dee", mine)
    ended(anna, carl, server)
    assert "1 turns" in carl.text()
    assert cluster.adapter("carl dee").is_dir()


@pytest.mark.slow
def test_of_an_error_at_a_client_only_its_kind_leaves_it(
    cluster: Cluster, recipe_of: Recipe, mine: Path, tmp_path: Path
) -> None:
    """Its text names folders here, and may speak of rows."""
    recipe = recipe_of(out=str(tmp_path / "served"), train__steps=60, rounds=4)
    server = cluster.serve(recipe, "--clients", "anna,ben")
    anna, ben = (join(cluster, client, mine) for client in CLIENTS[:2])
    anna.wait_for("round 1 of 4")
    server.wait_for("round 1 of 4")
    anna.kill()
    folder = tmp_path / "devices" / "anna"
    shutil.rmtree(folder / "memory")
    anna = join(cluster, "anna", mine, log="anna again")
    ended(ben, server)
    assert anna.wait() == 2
    assert "The run is over, without an adapter: CheckpointError" in " ".join(anna.text().split())
    assert "anna failed: CheckpointError" in server.text()
    events = (tmp_path / "served" / "mine" / "events.jsonl").read_text()
    assert "goes on after turn" not in events + server.text()


@pytest.mark.slow
def test_a_folder_that_cannot_be_used_is_an_error_of_one_line(
    cluster: Cluster, recipe_of: Recipe, mine: Path, tmp_path: Path
) -> None:
    """On both sides: a file in its place, no room, or a run that was not served."""
    recipe = recipe_of(out=str(tmp_path / "served"))
    server = cluster.serve(recipe, "--quorum", "1")
    anna = join(cluster, "anna", mine, "--folder", str(mine / "anna.jsonl"))
    assert anna.wait() == 2, anna.text()
    assert "Traceback" not in anna.text()
    server.kill()
    alone(recipe, tmp_path / "alone")
    again = cluster.start("over", "serve", str(recipe), f"out={tmp_path / 'alone'}")
    assert again.wait() == 2
    assert "holds a run already, which was not served" in " ".join(again.text().split())


def test_a_folder_knows_whose_it_is(
    cluster: Cluster, recipe_of: Recipe, mine: Path, tmp_path: Path
) -> None:
    """So who has joined need not say its name again to talk."""
    recipe = recipe_of(out=str(tmp_path / "served"))
    server = cluster.serve(recipe, "--quorum", "1", "--stay", "60")
    ended(join(cluster, "anna", mine))
    via = ("--via", f"127.0.0.1:{cluster.port}", "--folder", str(tmp_path / "devices" / "anna"))
    said = cluster.start("predict", "predict", "a lovely day", *via)
    assert said.wait() == 0, said.text()
    server.kill()


@pytest.mark.slow
def test_a_server_with_a_late_joiner_may_be_killed(
    cluster: Cluster, recipe_of: Recipe, mine: Path, tmp_path: Path
) -> None:
    """Twice, with clients that measure their devices anew; the recipe it leaves has them all."""
    recipe = recipe_of(out=str(tmp_path / "served"), train__steps=60, rounds=8, plan__cut=None)
    server = cluster.serve(recipe, "--quorum", "2")
    joined = [join(cluster, client, mine) for client in CLIENTS[:2]]
    server.wait_for("round 1 of 8")
    joined.append(join(cluster, CLIENTS[2], mine))
    joined[-1].wait_for(r"round \d of 8")
    for n in range(2):
        server.kill()
        server = cluster.serve(recipe, "--quorum", "2", name=f"server {n}")
        server.wait_for(r"round \d of 8")
    ended(*joined, server)
    same(cluster, alone(tmp_path / "served" / "mine" / "recipe.yaml", tmp_path / "alone"))


@pytest.mark.slow
def test_seats_change_over_the_network(
    cluster: Cluster, recipe_of: Recipe, mine: Path, tmp_path: Path
) -> None:
    """Clients come one after another, and the recipe speaks of some that are not there yet."""
    changes = [
        {"round": 1, "client": "anna", "cut": [2, 1]},
        {"round": 2, "client": "ben", "cut": [1, 0]},
    ]
    plan: dict[str, Any] = {"plan__cut": None, "plan__cuts": CUTS, "plan__changes": changes}
    recipe = recipe_of(out=str(tmp_path / "served"), adapter__dropout=0.1, rounds=4, **plan)
    server = cluster.serve(recipe, "--clients", ", ".join(CLIENTS))
    ended(*[join(cluster, client, mine) for client in CLIENTS], server)
    same(cluster, alone(recipe, tmp_path / "alone"))


@pytest.mark.slow
def test_who_has_not_agreed_yet_takes_nobodys_place(
    cluster: Cluster, recipe_of: Recipe, mine: Path, tmp_path: Path
) -> None:
    """A second process as anna reads the terms in the middle of a round, and says nothing."""
    recipe = recipe_of(out=str(tmp_path / "served"), train__steps=60)
    server = cluster.serve(recipe, "--clients", ",".join(CLIENTS[:2]))
    working = [join(cluster, client, mine) for client in CLIENTS[:2]]
    server.wait_for("round 1 of 3")
    with Fake(cluster.port) as second:
        assert isinstance(second.ask(hello("anna")), Welcome)
        assert isinstance(second.ask(Measured(1 << 30)), Proposal)
        ended(*working, server)
        assert second.told(Refused).text == "The run is over, and its server has ended."
    assert "takes its place" not in server.text()


@pytest.mark.slow
def test_who_cannot_learn_from_its_rows_is_not_counted_on(
    cluster: Cluster, recipe_of: Recipe, mine: Path, tmp_path: Path
) -> None:
    """All its training rows have one label: it hears of it before the run begins with it."""
    server = cluster.serve(recipe_of(out=str(tmp_path / "served")), "--quorum", "2")
    anna = join(cluster, "anna", mine)
    server.wait_for("anna is here")
    rows = [json.loads(line) for line in (mine / "ben.jsonl").read_text().splitlines()]
    alike = [json.dumps({**row, "label": "positive"}) + "\n" for row in rows]
    (mine / "carl dee.jsonl").write_text("".join(alike), encoding="utf-8")
    carl = join(cluster, "carl dee", mine)
    assert carl.wait() == 2
    assert "has one class only" in carl.text()
    assert "carl dee is here" not in server.text()
    ended(join(cluster, "ben", mine), anna, server)


@pytest.mark.slow
def test_two_servers_do_not_share_a_folder(
    cluster: Cluster, recipe_of: Recipe, mine: Path, tmp_path: Path
) -> None:
    """Nor do a server and a run in one process; a folder whose server was killed is free."""
    recipe = recipe_of(out=str(tmp_path / "served"))
    server = cluster.serve(recipe, "--quorum", "1")
    for name, command in {"second": ("serve", "--listen", "127.0.0.1:0"), "run": ("run",)}.items():
        program = cluster.start(name, command[0], str(recipe), *command[1:])
        assert program.wait() == 2
        assert "is in use by another process" in program.text()
    server.kill()
    server = cluster.serve(recipe, "--quorum", "1")
    ended(join(cluster, "anna", mine), server)
