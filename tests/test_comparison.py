"""Several methods on the same clients: the same runs as alone, resumable, honest statistics."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from flexp import assets, commands, comparison, recipe_file
from flexp.comparison import runs, table
from flexp.comparison.runs import Comparison, Plan, Share
from flexp.errors import FlexpError, RecipeError, StrategyError
from flexp.events import SeatTaken, TurnEnded, read

Flexp = Callable[..., tuple[int, str, str]]
Recipe = Callable[..., Path]

DEVICES = [
    {"name": "watch", "memory": "100MB", "gflops": 1, "up_mbit": 8, "down_mbit": 16},
    {"name": "phone", "memory": "200MB", "gflops": 2, "up_mbit": 8, "down_mbit": 16},
]
SPEEDS = {"plan__devices": DEVICES, "plan__server": {"gflops": 10}, "plan__cut": [1, 1]}
METHODS: dict[str, dict[str, Any]] = {"local": {}, "pooled": {}, "splitfed_v2": {"train.lr": 0.02}}


@pytest.fixture
def nowhere(tmp_path: Path) -> assets.Cache:
    return assets.Cache(tmp_path / "no-assets")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[Share]:
    """Runs of a comparison in this process, one after another; the shares that were asked for."""
    seen: list[Share] = []

    def carry_out(whole: Comparison, todo: Any, jobs: int, root: Path, say: Any) -> None:
        seen.append(Share(whole, tuple(todo), root, 1))
        runs.work(seen[-1], say)

    monkeypatch.setattr(runs, "carry_out", carry_out)
    return seen


# ---- runs


def test_every_run_is_the_run_that_it_would_be_alone(
    recipe_of: Recipe, nowhere: assets.Cache, here: list[Share], tmp_path: Path
) -> None:
    recipe = recipe_file.read(recipe_of(**SPEEDS))
    found = comparison.compare(recipe, nowhere, Plan(METHODS, (0, 3)))
    assert [run for share in here for run in share.runs] == [
        (seed, label) for seed in (0, 3) for label in METHODS
    ]
    pairs = ["seed=3", "strategy.name=splitfed_v2", "train.lr=0.02", f"out={tmp_path / 'alone'}"]
    alone = commands.run(recipe_file.read(recipe_of(**SPEEDS), pairs), nowhere, [])
    for one in alone["rows"]:
        cell = one["cell"].split("/")[1]
        if one["metric"] in (found["metric"], "loss"):
            cell += "" if one["metric"] == found["metric"] else "_loss"
            (row,) = (
                r
                for r in found["rows"]
                if (r["method"], r["seed"], r["client"]) == ("splitfed_v2", 3, one["client"])
            )
            assert row[cell] == one["value"]
    seats = {
        tuple(e for e in read(path) if isinstance(e, SeatTaken))
        for path in Path(found["out"]).glob("*/seed-*/events.jsonl")
        if "pooled" not in path.parts[-3]
    }
    assert len(seats) == 1  # all methods sit alike
    assert comparison.frame(found).shape == (2 * 3 * 4, 14)


def test_the_table_adds_up(recipe_of: Recipe, nowhere: assets.Cache, here: list[Share]) -> None:
    recipe = recipe_file.read(recipe_of(**SPEEDS))
    found = comparison.compare(recipe, nowhere, Plan(METHODS, (0,)))
    folder = Path(found["out"]) / "splitfed_v2" / "seed-0"
    turns = [e for e in read(folder / "events.jsonl") if isinstance(e, TurnEnded)]
    rows = {r["client"]: r for r in found["rows"] if r["method"] == "splitfed_v2"}
    everybody = rows.pop("all")
    assert everybody["sent_bytes"] == sum(t.sent_bytes for t in turns) > 0
    assert everybody["client_flops"] == sum(r["client_flops"] for r in rows.values()) > 0
    assert everybody["peak_bytes"] == max(r["peak_bytes"] for r in rows.values()) > 0
    assert everybody["worst_decile"] == min(r["own"] for r in rows.values())
    # Client after client: the time is the sum of all turns, by hand from the events.
    speeds = {"anna": 1e9, "ben": 2e9, "carl dee": 1e9}
    seconds = 0.0
    for t in turns:
        took: Any = t.measured
        seconds += took["near_flops"] / speeds[t.client] + took["far_flops"] / 1e10
        seconds += t.sent_bytes / 1e6 + t.received_bytes / 2e6
    assert everybody["simulated_seconds"] == pytest.approx(seconds)
    for row in (r for r in found["rows"] if r["method"] == "pooled"):
        assert all(row[name] is None for name in table.COSTS)
        assert row["own"] is not None
    local = found["summary"]["local"]
    assert local["gain"] is None
    assert local["own"]["deviation"] is None  # of one seed there is none
    assert found["summary"]["pooled"]["gain"]["low"] <= found["summary"]["pooled"]["gain"]["high"]


def test_without_a_barrier_nobody_waits_for_the_slowest(
    recipe_of: Recipe, nowhere: assets.Cache, here: list[Share]
) -> None:
    methods = {"flexp": {"strategy.server": "sequential"}}
    near = {**DEVICES[1], "up_mbit": 80, "down_mbit": 160}  # ben is rounds ahead of the others
    recipe = recipe_of(**{**SPEEDS, "plan__devices": [DEVICES[0], near]}, rounds=4)
    found = comparison.compare(recipe_file.read(recipe), nowhere, Plan(methods, (0,)))
    speeds = {"anna": 1e9, "ben": 2e9, "carl dee": 1e9}
    alone = dict.fromkeys(speeds, 0.0)
    for t in read(Path(found["out"]) / "flexp" / "seed-0" / "events.jsonl"):
        if isinstance(t, TurnEnded):
            took: Any = t.measured
            alone[t.client] += took["near_flops"] / speeds[t.client] + took["far_flops"] / 1e10
            crossed = t.sent_bytes / 1e6 + t.received_bytes / 2e6
            alone[t.client] += crossed / 10 if t.client == "ben" else crossed
    (everybody,) = (r for r in found["rows"] if r["client"] == "all")
    assert everybody["simulated_seconds"] == pytest.approx(max(alone.values()), rel=0.02)


def test_what_a_client_has_no_score_of_is_blank(
    recipe_of: Recipe, nowhere: assets.Cache, here: list[Share], mine: Path
) -> None:
    file = mine / "ben.jsonl"
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    told = [json.dumps({"text": r["text"], "mood": "abc"[n % 3]}) for n, r in enumerate(rows)]
    file.write_text("\n".join(told) + "\n", encoding="utf-8")
    plain = recipe_of(
        clients={"ben": {"label": "mood"}},
        participation={"carl dee": {"absent": [0, 1, 2]}},
        **SPEEDS,
    )
    methods = {name: {"strategy.name": name} for name in ("flexp", "local")}
    found = comparison.compare(recipe_file.read(plain), nowhere, Plan(methods, (0,)))
    by_client = {r["client"]: r for r in found["rows"] if r["method"] == "flexp"}
    assert set(by_client) == {"anna", "ben", "all"}  # the third never came
    assert by_client["ben"]["global"] is None
    both = [by_client[c]["own"] for c in ("anna", "ben")]
    assert by_client["all"]["own"] == pytest.approx(sum(both) / 2)
    assert found["summary"]["flexp"]["gain"] is not None
    comparison.frame(found)


def test_what_is_done_is_not_done_again(
    recipe_of: Recipe, nowhere: assets.Cache, here: list[Share]
) -> None:
    recipe = recipe_file.read(recipe_of(**SPEEDS))
    first = comparison.compare(recipe, nowhere, Plan(METHODS, (0,)))
    with pytest.raises(FlexpError, match="Continue it with --resume"):
        comparison.compare(recipe, nowhere, Plan(METHODS, (0,)))
    # As if it had been killed in the middle of one run: no result, a checkpoint of round 2.
    folder = Path(first["out"]) / "splitfed_v2" / "seed-0"
    (folder / "result.json").unlink()
    (folder / "checkpoint" / "000003" / "state.parcel").write_bytes(b"torn")
    here.clear()
    again = comparison.compare(recipe, nowhere, Plan(METHODS, (0,), resume=True))
    assert [share.runs for share in here] == [((0, "splitfed_v2"),)]
    assert again["rows"] == first["rows"]
    more = Plan({**METHODS, "fedavg": {}}, (0,), resume=True)
    comparison.compare(recipe, nowhere, more)
    assert here[-1].runs == ((0, "fedavg"),)
    other = recipe.model_copy(update={"rounds": 2})
    with pytest.raises(FlexpError, match="made by another recipe"):
        comparison.compare(other, nowhere, Plan(METHODS, (0,), resume=True))


@pytest.mark.slow
def test_processes_side_by_side(flexp: Flexp, recipe_of: Recipe, tmp_path: Path) -> None:
    path = recipe_of(rounds=1, **SPEEDS)
    code, out, err = flexp(
        *("compare", str(path), "--methods", "local,fedavg", "--seeds", "0"),
        *("--jobs", "2", "--json"),
    )
    assert code == 0, err
    document = json.loads(out)
    assert set(document["summary"]) == {"local", "fedavg"}
    assert "2 runs, 2 at a time" in err
    assert "local, seed 0: accuracy" in err
    code, out, err = flexp(
        "compare", str(path), "--methods", "local,fedavg", "--seeds", "0", "--resume"
    )
    assert code == 0, err
    assert "2 of 2 runs are done already" in out
    assert "worst tenth" in out
    assert "[" in out.partition("Gain over local")[2]


def test_memory_bounds_what_runs_side_by_side(recipe_of: Recipe, nowhere: assets.Cache) -> None:
    found = runs.survey(recipe_file.read(recipe_of()), nowhere)
    assert runs.side_by_side(found, 1) == 1
    assert runs.side_by_side(found, 10**12) == (runs.os.cpu_count() or 1)


# ---- what is asked for


def test_methods_come_from_names_a_file_or_beside_the_recipe(
    recipe_of: Recipe, tmp_path: Path
) -> None:
    path = recipe_of(strategy__name="ditto")
    recipe = recipe_file.read(path)
    assert list(comparison.asked(recipe, path, None)) == ["base", "local", "fedavg", "ditto"]
    assert "splitlora" in comparison.asked(recipe, path, "all")
    beside = {"fedavg": {"train.lr": 0.5}, "ditto-1": {"strategy.name": "ditto", "strategy.lam": 1}}
    path.with_suffix(".methods.yaml").write_text(yaml.safe_dump(beside))
    assert comparison.asked(recipe, path, None) == beside
    assert comparison.asked(recipe, path, "fedavg, local") == {
        "fedavg": {"train.lr": 0.5},
        "local": {},
    }
    whole = Comparison(recipe, Plan(beside, (4,)))
    made = whole.recipe((4, "ditto-1"))
    assert (made.strategy.name, made.strategy.options, made.seed) == ("ditto", {"lam": 1}, 4)
    assert whole.recipe((4, "fedavg")).train.lr == 0.5
    with pytest.raises(RecipeError, match="No such file"):
        comparison.asked(recipe, path, "missing.yaml")
    (tmp_path / "odd.yaml").write_text("fedavg: 3")
    with pytest.raises(RecipeError, match="fedavg is no mapping"):
        comparison.asked(recipe, path, str(tmp_path / "odd.yaml"))


def test_options_of_the_recipe_are_those_of_its_own_method(recipe_of: Recipe) -> None:
    path = recipe_of(strategy={"name": "fedprox", "mu": 0.5})
    whole = Comparison(recipe_file.read(path), Plan({"fedprox": {}, "fedavg": {}}))
    assert whole.recipe((0, "fedprox")).strategy.options == {"mu": 0.5}
    assert whole.recipe((0, "fedavg")).strategy.options == {}


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ("fedavgg", 'Did you mean "fedavg"?'),
        ("local,fedper", "nobody trains one here. Set strategy.blocks"),
        (",", "There is no method to compare"),
    ],
)
def test_nothing_starts_that_cannot_run(
    flexp: Flexp, recipe_of: Recipe, tmp_path: Path, methods: str, message: str
) -> None:
    path = recipe_of(adapter__head=False)
    code, _, err = flexp("compare", str(path), "--methods", methods, "--seeds", "0")
    assert code == 2
    assert message in err
    assert not (tmp_path / "runs").exists()


LORA_ONLY = {
    "feddpa",
    "fedsa_lora",
    "ffa_lora",
    "flexlora",
    "flora",
    "hetlora",
    "hsplitlora",
    "pfedlora",
    "splitlora",
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plan.ranks": {"anna": 3}}, "plan.ranks is the same for all methods of a comparison"),
        ({"data.rows": 9}, "data.rows is the same for all"),
        ({"adapter": {"kind": "dense", "targets": ["quer"]}}, 'Did you mean "query"?'),
    ],
)
def test_a_method_changes_nothing_that_all_share(
    flexp: Flexp, recipe_of: Recipe, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """It would be left aside without a word, or end the comparison in the middle."""
    file = tmp_path / "some.yaml"
    file.write_text(yaml.safe_dump({"local": {}, "fedavg": changes}))
    code, _, err = flexp("compare", str(recipe_of()), "--methods", str(file), "--seeds", "0")
    assert code == 2
    assert message in err
    assert not (tmp_path / "runs").exists()


def test_all_methods_leaves_out_what_cannot_run(recipe_of: Recipe, nowhere: assets.Cache) -> None:
    recipe = recipe_file.read(recipe_of(adapter={"kind": "ia3"}))
    methods = comparison.asked(recipe, recipe_of(adapter={"kind": "ia3"}), "all")
    whole = Comparison(recipe, Plan(methods, (0,), lenient=True))
    refused = runs.refusals(whole, runs.survey(recipe, nowhere))
    # They need norms, SGD, a prompt, SGD and Co-LoRA.
    others = {"fedbn", "scaffold", "pfedpg", "fed_influence", "fedmosaic"}
    assert set(refused) == LORA_ONLY | others
    assert "adapter.kind=lora" in refused["ffa_lora"]
    with pytest.raises(StrategyError, match="scaffold"):
        runs.refusals(Comparison(recipe, Plan(methods, (0,))), runs.survey(recipe, nowhere))


def test_an_option_that_no_compared_method_has(flexp: Flexp, recipe_of: Recipe) -> None:
    code, _, err = flexp("compare", str(recipe_of()), "--methods", "fedprox", "strategy.mux=1")
    assert code == 2
    assert 'strategy.mux: method "flexp" has no such option.' in err
    assert "Its options: align, compare, conflicts, distil, feature, form, front," in err


@pytest.mark.parametrize("text", ["", "a", "1,-2", "1.5"])
def test_seeds_that_are_none(text: str) -> None:
    with pytest.raises(RecipeError, match="is no list of seeds"):
        comparison.seeds_of(text)
    assert comparison.seeds_of("3, 1") == (3, 1)


def test_a_seed_counts_once(recipe_of: Recipe, nowhere: assets.Cache) -> None:
    with pytest.raises(FlexpError, match="only once"):
        comparison.compare(recipe_file.read(recipe_of()), nowhere, Plan(METHODS, (1, 1)))


# ---- statistics by hand


def test_gains_by_hand() -> None:
    # Accuracy: +0.2, 0, +0.1; the interval of equal pairs is a point.
    found = comparison.gains([0.7, 0.5, 0.6], [0.5, 0.5, 0.5], higher=True)
    assert found["mean"] == pytest.approx(0.1)
    assert 0 <= found["low"] < 0.1 < found["high"] <= 0.2
    same = comparison.gains([0.7, 0.6], [0.5, 0.4], higher=True)
    assert [same[k] for k in ("mean", "low", "high")] == pytest.approx([0.2] * 3)
    # Perplexity: 8 instead of 10, so ln 10 - ln 8.
    fall = comparison.gains([8.0], [10.0], higher=False)
    assert fall["mean"] == pytest.approx(math.log(10 / 8))


def test_a_bootstrap_interval_covers_as_often_as_it_says() -> None:
    import numpy as np

    stream, hits = np.random.default_rng(1), 0
    for _ in range(300):
        pairs = stream.normal(0.3, 1.0, 40)
        found = comparison.gains(list(pairs), [0.0] * 40, higher=True, draws=400)
        hits += found["low"] <= 0.3 <= found["high"]
    assert 0.90 < hits / 300 < 0.98


def test_the_worst_tenth_by_hand() -> None:
    twenty = [n / 20 for n in range(20)]
    assert comparison.worst_decile(twenty, higher=True) == pytest.approx(0.025)  # 0 and 0.05
    assert comparison.worst_decile(twenty, higher=False) == pytest.approx(0.925)
    assert comparison.worst_decile([0.4, 0.9], higher=True) == 0.4


def test_a_summary_by_hand() -> None:
    def row(method: str, seed: int, client: str, own: float) -> dict[str, Any]:
        costs: dict[str, Any] = dict.fromkeys(table.COSTS, 1.0)
        return {
            "method": method,
            "seed": seed,
            "client": client,
            **dict.fromkeys(table.SCORES, own),
            **costs,
        }

    rows = [
        *(row("local", s, c, 0.5) for s in (0, 1) for c in ("a", "b", "all")),
        *(row("x", s, c, 0.6 + s / 10) for s in (0, 1) for c in ("a", "b", "all")),
    ]
    found = table.summary(rows, higher=True)
    assert found["x"]["own"]["mean"] == pytest.approx(0.65)
    assert found["x"]["own"]["deviation"] == pytest.approx(math.sqrt(0.005))  # of 0.6 and 0.7
    assert found["x"]["gain"]["mean"] == pytest.approx(0.15)
    assert found["x"]["seeds"] == 2
    rows[0]["simulated_seconds"] = None
    assert table.summary(rows, higher=True)["x"]["simulated_seconds"]["mean"] == 1.0
