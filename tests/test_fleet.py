"""Recipes whose clients move, come, go and work alone: checked first, told in events, resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from test_resume import Killed, outcome, run

from flexp import assets, checkpoint, commands, events, planning, recipe_file, report
from flexp.client.memory import Memory
from flexp.engine.base import Assignment
from flexp.errors import CutError, FlexpError, PlanError, RecipeError, StrategyError
from flexp.fleet import Fleet
from flexp.link.metered import Ledger
from flexp.recipe_clients import ParticipationRecipe
from flexp.run import after
from flexp.stage import prepare, seats_for, survey
from flexp.strategies.local import Local
from flexp.tensors import Tensors

Recipe = Callable[..., Path]
PHONE, LAPTOP = {"name": "phone", "memory": "20.3MB"}, {"name": "laptop", "memory": "1GB"}
MOVING = [
    {"round": 1, "client": "anna", "cut": [2, 1]},
    {"round": 2, "client": "ben", "cut": [1, 0]},
]


def told(folder: Path, kind: Any) -> list[Any]:
    return [e for e in events.read(folder / "events.jsonl") if isinstance(e, kind)]


def adapter(folder: Path, client: str) -> Tensors:
    return load_file(folder / "adapters" / client / "adapter_model.safetensors")


def bits(tensors: Tensors) -> dict[str, bytes]:
    return {k: v.numpy().tobytes() for k, v in tensors.items()}


# ---- moving


@pytest.mark.parametrize("method", ["local", "fedavg", "ditto"])
def test_a_run_with_changes_ends_as_one_without(recipe_of: Recipe, method: str) -> None:
    name = f"strategy.name={method}"
    still = outcome(run(recipe_of(), name))
    shutil.rmtree(recipe_of().parent / "runs")
    folder = run(recipe_of(plan__changes=MOVING), name)
    moved = outcome(folder)
    assert moved[:2] == still[:2]
    assert [(e.round, e.client, e.front, e.back) for e in told(folder, events.SeatMoved)] == [
        (1, "anna", 2, 1),
        (2, "ben", 1, 0),
    ]
    assert len(told(folder, events.SeatTaken)) == 3


@pytest.mark.parametrize("die_at", [2, 3, 5, 7])
@pytest.mark.parametrize("method", ["flexp", "splitlora"])
@pytest.mark.daily("flexp-2", "flexp-5", "splitlora-3", "splitlora-7")
def test_killed_around_a_change_and_resumed_ends_the_same(
    recipe_of: Recipe, method: str, die_at: int
) -> None:
    recipe, name = recipe_of(plan__changes=MOVING), f"strategy.name={method}"
    with pytest.raises(Killed):
        run(recipe, name, die_at=die_at)
    resumed = outcome(run(recipe, name, resume=True))
    shutil.rmtree(recipe.parent / "runs")
    assert resumed == outcome(run(recipe, name))


def test_another_device_gets_the_cut_that_fits_it(recipe_of: Recipe, tmp_path: Path) -> None:
    recipe = recipe_of(
        plan={
            "devices": [PHONE, LAPTOP],
            "assign": {"anna": "phone", "ben": "phone", "carl dee": "phone"},
            "changes": [{"round": 1, "client": "anna", "device": "laptop"}],
        }
    )
    found = survey(recipe_file.read(recipe), assets.Cache(tmp_path / "none"))
    first, later = found.fleet.placed_at(0), found.fleet.placed_at(1)
    assert first["anna"].seat.cut.front + first["anna"].seat.cut.back < 4
    assert later["anna"].seat.near_only(4)
    assert later["anna"].device == "laptop"
    assert {c: later[c] for c in ("ben", "carl dee")} == {c: first[c] for c in ("ben", "carl dee")}
    assert "laptop" in json.dumps(planning.fleet(found)["changes"])


REFUSED: list[tuple[dict[str, Any], type[FlexpError], str]] = [
    ({"client": "ann", "cut": [1, 1]}, PlanError, 'no client "ann".*anna'),
    ({"client": "anna", "device": "laptop"}, PlanError, 'no device "laptop"'),
    ({"client": "anna", "cut": [3, 2]}, CutError, 'client "anna" asked for 3 front and 2 back'),
    ({"client": "anna", "cut": [0, 2]}, CutError, "bare embeddings"),
    ({"client": "anna"}, RecipeError, "needs a device, a cut, or both"),
    ({"client": "anna", "cut": [1, 1], "round": 3}, RecipeError, "round 3 never comes"),
    ({"client": "anna", "cut": [1, 1], "round": 0}, RecipeError, "greater than or equal to 1"),
]


@pytest.mark.parametrize(("change", "error", "what"), REFUSED, ids=lambda v: str(v)[:30])
def test_changes_that_cannot_be_are_refused_before_anything_runs(
    recipe_of: Recipe, tmp_path: Path, change: dict[str, Any], error: type[FlexpError], what: str
) -> None:
    recipe = recipe_of(plan__changes=[{"round": 1, **change}])
    with pytest.raises(error, match=what):
        survey(recipe_file.read(recipe), assets.Cache(tmp_path / "none"))


def test_a_device_that_nothing_fits_is_refused(recipe_of: Recipe, tmp_path: Path) -> None:
    recipe = recipe_of(
        plan={
            "devices": [LAPTOP, {"name": "watch", "memory": "5MB"}],
            "assign": {"anna": "laptop", "ben": "laptop", "carl dee": "laptop"},
            "changes": [{"round": 1, "client": "ben", "device": "watch"}],
        }
    )
    with pytest.raises(PlanError, match='Client "ben" on "watch" has 5 MB'):
        survey(recipe_file.read(recipe), assets.Cache(tmp_path / "none"))


def test_two_changes_of_a_client_in_one_round_are_refused(recipe_of: Recipe) -> None:
    with pytest.raises(RecipeError, match="one change of a client in a round"):
        recipe_file.read(recipe_of(plan__changes=[MOVING[0], {**MOVING[0], "cut": [1, 2]}]))


def test_the_method_is_asked_about_every_seat(recipe_of: Recipe, tmp_path: Path) -> None:
    class Whole(Local):
        split = "no: it wants all blocks."

    recipe = recipe_of(plan={"cut": [4, 0], "changes": MOVING[1:]})
    found = survey(recipe_file.read(recipe), assets.Cache(tmp_path / "none"))
    with pytest.raises(StrategyError, match="it wants all blocks"):
        seats_for(Whole(), found, found.recipe)


def test_a_report_says_who_moved(recipe_of: Recipe, tmp_path: Path) -> None:
    folder = run(recipe_of(plan__changes=MOVING))
    commands.write_report([folder], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text("utf-8")
    assert "Round 2" in text
    moves = report.summary([folder])["runs"][0]["moves"]
    assert [(m["round"], m["client"], m["front"]) for m in moves] == [(1, "anna", 2), (2, "ben", 1)]


# ---- coming and going


def rounds_of(folder: Path) -> list[tuple[str, ...]]:
    return [e.clients for e in told(folder, events.RoundStarted)]


def test_clients_join_leave_and_pause(recipe_of: Recipe) -> None:
    there = {"anna": {"joins": 1}, "ben": {"leaves": 2}, "carl dee": {"absent": [1]}}
    folder = run(recipe_of(participation=there))
    assert rounds_of(folder) == [("ben", "carl dee"), ("anna", "ben"), ("anna", "carl dee")]
    assert len(list((folder / "adapters").iterdir())) == 3


def test_who_never_came_has_no_score_and_changes_nothing(recipe_of: Recipe, mine: Path) -> None:
    folder = run(recipe_of(participation={"ben": {"absent": [0, 1, 2]}}), "strategy.name=fedavg")
    found = outcome(folder)
    assert "ben" not in {row["client"] for row in found[1]}
    shutil.rmtree(folder)
    (mine / "ben.jsonl").unlink()
    without = outcome(run(recipe_of(), "strategy.name=fedavg"))
    assert found[:2] == without[:2]


def test_an_empty_round_is_recorded_and_changes_nothing(recipe_of: Recipe) -> None:
    names = ("anna", "ben", "carl dee")
    gone = {"participation": {name: {"absent": [1]} for name in names}}
    folder = run(recipe_of(**gone), "strategy.name=fedavg")
    assert rounds_of(folder) == [names, (), names]
    assert {e.round for e in told(folder, events.Merged)} == {0, 2}
    assert {e.round for e in told(folder, events.Checkpointed)} == {0, 1, 2}


def test_who_comes_back_goes_on_from_its_own_memory(recipe_of: Recipe) -> None:
    """Local-only with a pause is local-only with a round less: but for which batches it sees."""
    seen: dict[int, bytes] = {}
    folder = run(recipe_of(participation={"anna": {"absent": [1]}}), "strategy.name=local")
    for n in (2, 3):
        file = folder / "checkpoint" / f"{n:06d}" / "clients" / "anna.parcel"
        held = Memory.load(file).slots
        assert {float(t) for t in held["slot/personal@t"].values()} == {2.0 * (n - 1)}
        seen[n] = json.dumps({k: len(v) for k, v in held.items()}).encode()
    assert seen[2] == seen[3]


def test_sampling_chooses_among_those_who_are_there(recipe_of: Recipe) -> None:
    folder = run(recipe_of(sample=0.5, rounds=4, participation={"ben": {"joins": 3}}))
    chosen = rounds_of(folder)
    assert all("ben" not in clients for clients in chosen[:3])
    assert [len(clients) for clients in chosen] == [1, 1, 1, 2]


# ---- alone


@pytest.mark.parametrize("method", ["flexp", "ditto", "splitfed_v3", "fedper", "splitlora"])
def test_alone_is_local_only_from_where_the_client_was(recipe_of: Recipe, method: str) -> None:
    """The client's personal model after the round is local training's, whatever the method."""
    recipe = recipe_of(participation={"anna": {"alone": [2]}}, train__head_lr=0.02)
    folder = run(recipe, f"strategy.name={method}")
    after = bits(adapter(folder, "anna"))
    assert [(e.round, e.client) for e in told(folder, events.WentAlone)] == [(2, "anna")]
    assert [e.clients for e in told(folder, events.Merged) if e.round == 2][-1] != ()
    assert all("anna" not in e.clients for e in told(folder, events.Merged) if e.round == 2)
    assert after == bits(trained_by_hand(recipe, method))


def trained_by_hand(recipe: Path, method: str) -> Tensors:
    """The state after two rounds, then ``desk.fit()`` at the ordinary cut as local-only does."""
    plain = recipe_file.read(recipe, [f"strategy.name={method}"])
    stage = prepare(plain, assets.Cache(recipe.parent / "none"))
    saved = recipe.parent / "runs" / "mine" / "checkpoint" / "000002"
    state = checkpoint.read(saved, stage.strategy, stage.engine)
    turn = after(stage, 2)
    work = Assignment("anna", turn.seats["anna"], stage.strategy.offer(state, "anna", turn))
    with stage.engine.visit(stage.strategy, work, turn, Ledger()) as (desk, _):
        desk.fit(train=stage.strategy.moving())
        found = desk.whole("personal")
    stage.engine.close()
    return found


@pytest.mark.parametrize("method", ["flexp", "fedavg", "local", "splitfed_v2"])
def test_two_rounds_alone_and_back(recipe_of: Recipe, method: str) -> None:
    recipe = recipe_of(rounds=5, participation={"anna": {"alone": [1, 2]}}, evaluate__every=1)
    folder = run(recipe, f"strategy.name={method}")
    turns = {e.round: e for e in told(folder, events.TurnEnded) if e.client == "anna"}
    assert sorted(turns) == [0, 1, 2, 3, 4]
    assert turns[1].kinds.keys() <= {"down slot", "up slot"}  # only what it took along
    assert (turns[2].sent_bytes, turns[2].received_bytes) == (0, 0)
    assert turns[3].kinds["up hidden"] == turns[0].kinds["up hidden"]
    if method in ("flexp", "local"):
        assert turns[1].kinds["down slot"] > 0
    if method == "local":
        assert turns[3].kinds["up slot"] >= turns[1].kinds["down slot"] - turns[0].received_bytes
    if method == "flexp":  # the merged blocks are the server's already, and no moments are kept
        assert "up slot" not in turns[3].kinds
    memory = Memory.load(folder / "checkpoint" / "000005" / "clients" / "anna.parcel")
    assert "alone until" not in memory.facts
    assert ("slot/personal" in memory.slots) == (method in ("flexp", "local"))


def test_local_only_does_not_notice_who_is_alone(recipe_of: Recipe) -> None:
    still = outcome(run(recipe_of(), "strategy.name=local"))
    shutil.rmtree(recipe_of().parent / "runs")
    there = {"anna": {"alone": [1]}, "ben": {"alone": [0, 1, 2]}}
    assert outcome(run(recipe_of(participation=there), "strategy.name=local"))[:2] == still[:2]


def test_fedavg_goes_on_from_the_shared_state_and_comes_back_to_it(recipe_of: Recipe) -> None:
    """Alone, a client trains what it would have been offered; what it learned stays with it."""
    there = {"anna": {"alone": [1, 2]}}
    folder = run(recipe_of(participation=there), "strategy.name=fedavg")
    others = bits(adapter(folder, "ben"))
    assert bits(adapter(folder, "anna")) != others
    shutil.rmtree(folder)
    back = run(recipe_of(participation={"anna": {"alone": [1]}}), "strategy.name=fedavg")
    assert bits(adapter(back, "anna")) == bits(adapter(back, "ben"))
    shutil.rmtree(back)
    absent = run(recipe_of(participation={"anna": {"absent": [1, 2]}}), "strategy.name=fedavg")
    assert bits(adapter(absent, "ben")) == others


@pytest.mark.parametrize("die_at", [3, 5, 6])
def test_killed_while_a_client_is_alone_and_resumed(recipe_of: Recipe, die_at: int) -> None:
    recipe = recipe_of(participation={"anna": {"alone": [1, 2]}}, rounds=4, plan__changes=MOVING)
    with pytest.raises(Killed):
        run(recipe, die_at=die_at)
    resumed = outcome(run(recipe, resume=True))
    shutil.rmtree(recipe.parent / "runs")
    assert resumed == outcome(run(recipe))


def test_alone_needs_a_device_that_holds_the_whole_model(recipe_of: Recipe, tmp_path: Path) -> None:
    recipe = recipe_of(
        plan={"devices": [PHONE, LAPTOP], "assign": {"anna": "phone", "ben": "laptop"}},
        participation={"anna": {"alone": [1]}, "ben": {"alone": [1]}},
    )
    with pytest.raises(PlanError) as caught:
        survey(recipe_file.read(recipe), assets.Cache(tmp_path / "none"))
    found = str(caught.value)
    assert 'client "anna" cannot be alone in round 1' in found
    assert '"phone" has 20.3 MB' in found
    assert "bytes) too little" in found


@pytest.mark.parametrize("method", ["base", "pooled"])
def test_methods_without_personal_training_leave_who_is_alone_alone(
    recipe_of: Recipe, method: str
) -> None:
    folder = run(recipe_of(participation={"anna": {"alone": [1]}}), f"strategy.name={method}")
    assert told(folder, events.WentAlone) == []


def test_a_method_without_a_personal_slot_refuses(recipe_of: Recipe) -> None:
    other = type("Other", (Local,), {"slots": {"mine": Local.slots["personal"]}})
    recipe = recipe_of(participation={"anna": {"alone": [1]}})
    found = survey(recipe_file.read(recipe), assets.Cache(recipe.parent / "none"))
    with pytest.raises(StrategyError, match='no slot "personal" to train alone'):
        seats_for(other(), found, found.recipe)


# ---- the words of a recipe

SENSE: list[tuple[dict[str, Any], str]] = [
    ({"joins": 2, "leaves": 2}, "leaves: a round after"),
    ({"absent": [1], "alone": [1]}, "absent and alone in round 1"),
    ({"joins": 1, "alone": [0]}, "before it joins or after it leaves"),
    ({"alone": [7]}, "round 7 never comes"),
    ({"alnoe": [1]}, 'Did you mean "alone"'),
]


@pytest.mark.parametrize(("held", "what"), SENSE, ids=lambda v: str(v)[:30])
def test_participation_that_makes_no_sense_is_refused(
    recipe_of: Recipe, held: dict[str, Any], what: str
) -> None:
    with pytest.raises(RecipeError, match=what):
        recipe_file.read(recipe_of(participation={"anna": held}))


def test_participation_of_nobody_is_refused(recipe_of: Recipe, tmp_path: Path) -> None:
    recipe = recipe_of(participation={"dan": {"joins": 1}})
    with pytest.raises(PlanError, match='no client "dan"'):
        survey(recipe_file.read(recipe), assets.Cache(tmp_path / "none"))


def test_who_is_known_grows_with_the_rounds() -> None:
    there = {"a": ParticipationRecipe(joins=2), "b": ParticipationRecipe(alone=(0,))}
    placed: Any = dict.fromkeys("abc")
    fleet = Fleet(placed, presence=there)
    assert [fleet.known(n) for n in range(4)] == [[], ["b", "c"], ["b", "c"], ["a", "b", "c"]]
    assert [fleet.alone(n) for n in range(2)] == [["b"], []]
    assert Fleet(placed, presence=there, solo=False).known(1) == ["c"]


def test_seats_are_those_of_the_round() -> None:
    assert list(Fleet({}).seatings()) == [{}]


def test_who_comes_later_changes_nobody_elses_seat(recipe_of: Recipe, tmp_path: Path) -> None:
    """Its speed is not known, so beside it nobody's could be planned by speeds."""
    fast: dict[str, Any] = {"name": "fast", "memory": "1GB", "gflops": 0.5, "up_mbit": 1000}
    fast |= {"down_mbit": 1000, "latency_ms": 0.1}
    plan: dict[str, Any] = {
        "devices": [fast, PHONE],
        "assign": {"anna": "fast", "ben": "fast", "carl dee": "phone"},
        "server": {"gflops": 100, "memory": "8GB"},
    }

    def cuts(**more: Any) -> dict[str, tuple[int, int]]:
        found = survey(recipe_file.read(recipe_of(plan=plan, **more)), assets.Cache(tmp_path / "n"))
        return {c: (p.seat.cut.front, p.seat.cut.back) for c, p in found.placed.items()}

    together, later = cuts(), cuts(participation={"carl dee": {"joins": 1}})
    assert later["carl dee"] == together["carl dee"]
    assert later["anna"] == later["ben"] == (1, 0) != together["anna"]
