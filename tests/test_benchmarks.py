"""The numbers of README and docs are those of the committed results, and hold what is claimed."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from flexp.strategies import BUILT_IN

ROOT = Path(__file__).parents[1]


def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def quick(name: str = "quick") -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text("utf-8"))


def test_the_readme_shows_the_committed_results() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert tables().rendered(text) == text
    assert "<!-- quick:begin -->" in text


def test_the_page_on_cuts_shows_the_committed_results() -> None:
    text = (ROOT / "docs" / "how-to" / "cuts.md").read_text("utf-8")
    assert tables().rendered(text) == text
    for name in ("quantized", "quantized-scores"):
        assert f"<!-- {name}:begin -->\n<!--" not in text


def test_quantized_weights_save_what_is_said() -> None:
    """A quarter and a seventh of the bytes in blocks, and no client needs more than is planned."""
    for held in quick("quantized")["models"].values():
        wide = held["step"]["none"]["bytes"]["blocks"]
        assert held["step"]["int8"]["bytes"]["blocks"] / wide == pytest.approx(1 / 4, rel=0.05)
        assert held["step"]["nf4"]["bytes"]["blocks"] / wide == pytest.approx(1 / 7, rel=0.05)
        for cases in held["memory"].values():
            assert all(case["peak"] <= 1.15 * case["predicted"] for case in cases.values())
            assert cases["nf4"]["peak"] < cases["none"]["peak"]


def test_the_page_on_the_network_shows_the_committed_results() -> None:
    text = (ROOT / "docs" / "explanation" / "network.md").read_text("utf-8")
    assert tables().rendered(text) == text
    for name in ("loopback", "bytes", "far", "clock"):
        assert f"<!-- network-{name}:begin -->" in text


def test_the_page_on_all_methods_shows_the_committed_results() -> None:
    text = (ROOT / "docs" / "explanation" / "methods-compared.md").read_text("utf-8")
    assert tables().rendered(text) == text
    assert "<!-- methods:begin -->" in text


def test_methods_are_compared_and_equal_ones_are_equal() -> None:
    found = quick("methods")
    assert found["summary"].keys() <= {m.name for m in BUILT_IN}
    assert len(found["summary"]) >= 34
    assert not found["refused"]
    for one, other in (("splitfed_v1", "fedavg"), ("splitlora", "splitfed_v2")):
        for score in ("own", "global", "own_loss", "global_loss"):
            held = [[r[score] for r in found["rows"] if r["method"] == m] for m in (one, other)]
            assert held[0] == pytest.approx(held[1], abs=1e-6), (one, score)


def test_the_page_on_speed_shows_the_committed_results() -> None:
    text = (ROOT / "docs" / "explanation" / "speed.md").read_text("utf-8")
    assert tables().rendered(text) == text
    for name in ("peers", "program", "anatomy"):
        assert f"<!-- speed-{name}:begin -->" in text


def test_every_row_on_speed_is_right_or_told_to_be_invalid() -> None:
    for part in quick("speed")["parts"].values():
        assert re.fullmatch("[0-9a-f]{40}", part["commit"])
        for row in part["rows"]:
            gate = row["details"].get("gate")
            if gate is not None and not gate["holds"]:
                assert row["ok"] is not True
                assert tables()._measured(row)[-1] == "**invalid**"


def test_the_page_on_security_shows_the_last_run_of_the_fuzzer() -> None:
    text = (ROOT / "SECURITY.md").read_text("utf-8")
    assert tables().rendered(text) == text
    assert "<!-- fuzz:begin -->" in text


def test_the_fuzzer_tried_every_target_and_found_nothing() -> None:
    from fuzz.targets import TARGETS

    found = quick("suite-fuzz")
    assert list(found["targets"]) == list(TARGETS)
    for name, row in found["targets"].items():
        assert row["promise"] == TARGETS[name].promise
        assert row["inputs"] > 0
        assert row["findings"] == 0
    assert re.fullmatch("[0-9a-f]{40}", found["commit"])


def test_flexp_beats_local_on_everybodys_data_at_equal_own_accuracy() -> None:
    flexp, local = (quick()["summary"][name] for name in ("flexp", "local"))
    assert flexp["global"] >= local["global"] + 0.01
    assert flexp["own"] >= local["own"] - 0.01
    seeds = [str(seed) for seed in quick()["seeds"]]
    better = [flexp["seeds"][s]["global"] > local["seeds"][s]["global"] for s in seeds]
    assert sum(better) >= 2


def test_flexp_beats_local_on_everybodys_text_at_no_cost_of_its_own() -> None:
    found = quick("shakespeare")
    flexp, local = (found["summary"][name] for name in ("flexp", "local"))
    assert flexp["global"] <= 0.98 * local["global"]
    assert flexp["own"] <= 1.01 * local["own"]
    seeds = [str(seed) for seed in found["seeds"]]
    better = [flexp["seeds"][s]["global"] <= 0.98 * local["seeds"][s]["global"] for s in seeds]
    assert sum(better) >= 2


@pytest.mark.parametrize("name", ["quick", "spam", "shakespeare"])
def test_every_method_was_searched_alike_and_took_the_same_steps(name: str) -> None:
    found = quick(name)
    tried = {
        method: sorted({t["train.lr"] for t in found["search"]["trials"] if t["method"] == method})
        for method in found["chosen"]
    }
    assert {"local", "fedavg", "flexp-free", "flexp", "flexp-pulled"} <= tried.keys()
    assert all(rates == sorted(found["search"]["lr"]) for rates in tried.values())
    assert found["recipe"]["train"]["steps"] * found["recipe"]["rounds"] > 0


@pytest.mark.parametrize("name", ["quick", "shakespeare"])
def test_the_demo_runs_what_was_tuned(name: str) -> None:
    from flexp import demonstration

    for method, recipe in demonstration.variants(name, 0).items():
        if method != "base":
            assert recipe.train.lr == quick(name)["chosen"][method]["train.lr"]


HOLDS = {
    ("quick", "flexp"): "yes",
    ("quick", "flexp-sequential"): "yes",
    ("spam", "flexp"): "no",
    ("spam", "flexp-sequential"): "yes",
    ("shakespeare", "flexp"): "no room",
}


@pytest.mark.parametrize(("name", "method"), HOLDS)
def test_the_readme_says_where_holds_what_the_protocol_asks(name: str, method: str) -> None:
    """benchmarks/protocol.yaml says what must be, where the room is large enough."""
    found = quick(name)
    told, v = HOLDS[name, method], found["verdict"][method]
    assert tables().held(found, method) == told
    if told == "yes":
        assert v["room"] >= 10
        assert v["closed"] >= 0.6
        assert v["own_cost"] <= 1
        assert v["own_over_best_of_local_and_fedavg"] >= -0.5
        assert v["global_gain"]["low"] > 0


def test_an_optimised_plan_is_the_quickest_on_every_fleet() -> None:
    fleets = quick("splits")["fleets"]
    assert list(fleets) == ["phones", "mixed", "household"]
    for held in fleets.values():
        for found in held["reached"].values():
            seconds = dict(found["seconds"])
            best = seconds.pop("optimized")
            assert all(best < other for other in seconds.values())


def test_no_row_of_flexp_uploads_weights_but_the_first_versions() -> None:
    for name in ("quick", "spam", "shakespeare"):
        for row in quick(name)["costs"]:
            if row["method"].startswith("flexp") and row["method"] != "flexp_sfl":
                assert row["adapters_sent"] == 0, row


def test_int8_saves_what_is_claimed_at_the_gradient_and_accuracy_that_are_claimed() -> None:
    found = quick("wire")
    assert found["milliseconds_per_mib"]
    summary = found["summary"]
    least = {"bf16": 0.5, "fp16": 0.5, "int8": 386 / 1536, "int8-group": 396 / 1536}
    for wire, ratio in least.items():
        held = summary[wire]
        assert held["packed_bytes_ratio"] == pytest.approx(ratio)
        assert min(held[f"{side}_cosine"]["median"] for side in ("near", "far")) > 0.999
    assert sum(run["failures"] for run in found["runs"]) == 0
