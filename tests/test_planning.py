"""`flexp plan`: a recipe's seats with time and bytes, and every cut of a model on devices."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flexp import assets, planning, recipe_file
from flexp.model.adapter import Lora
from flexp.model.backbone import Backbone
from flexp.model.quantize import Quantize
from flexp.plan import PROFILES
from flexp.plan import devices as measuring
from flexp.terminal.plans import selection

Flexp = Callable[..., tuple[int, str, str]]
Recipe = Callable[..., Path]
FAST = {"gflops": 10, "up_mbit": 80, "down_mbit": 80}


@pytest.fixture
def only_config(tiny_model: Path, tmp_path: Path) -> Path:
    """A folder with a model's config and nothing else, for rows of up to 4096 tokens."""
    folder = tmp_path / "config-only"
    folder.mkdir()
    config = json.loads((tiny_model / "config.json").read_text("utf-8"))
    config["max_position_embeddings"] = 4096
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def asked(flexp: Flexp, model: Path, *more: str) -> dict[str, Any]:
    code, out, err = flexp("plan", "--model", str(model), *more, "--json")
    assert code == 0, err
    return json.loads(out)


def test_every_cut_of_a_model_without_its_weights(flexp: Flexp, only_config: Path) -> None:
    found = asked(
        flexp, only_config, "--device", "laptop", "--device", "phone-4gb", "--length", "16"
    )
    assert found["blocks"] == 4
    assert found["goal"] == "optimized"
    assert found["task"] == "classification"
    assert [d["name"] for d in found["devices"]] == ["laptop", "phone-4gb"]
    assert found["devices"][0]["source"] == PROFILES["laptop"].source
    for name in ("laptop", "phone-4gb"):
        rows = [row for row in found["cuts"] if row["device"] == name]
        cuts = [(row["front"], row["back"]) for row in rows]
        assert sorted(cuts) == [(a, b) for a in range(1, 5) for b in range(5 - a)]
        [chosen] = [row for row in rows if row["chosen"]]
        [device] = [d for d in found["devices"] if d["name"] == name]
        assert (chosen["front"], chosen["back"]) == (
            device["chosen"]["front"],
            device["chosen"]["back"],
        )
        assert chosen["bytes"]["total"] == device["chosen"]["bytes"]
        assert chosen["seconds"] == device["chosen"]["seconds"]
        for row in rows:
            assert row["missing"] == 0
            assert row["front"] + row["server_blocks"] + row["back"] == 4
            assert sum(v for k, v in row["bytes"].items() if k != "total") == row["bytes"]["total"]
            # Four hidden states of 8 x 16 x 32 numbers, or none if all runs at the client.
            assert row["step_bytes"] == (4 * 8 * 16 * 32 * 4 if row["server_blocks"] else 0)
    slow, fast = (
        next(r for r in found["cuts"] if r["device"] == n and (r["front"], r["back"]) == (2, 1))
        for n in ("phone-4gb", "laptop")
    )
    assert slow["seconds"] > fast["seconds"]
    assert slow["bytes"] == fast["bytes"]


def test_the_table_fits_eighty_columns_and_says_why(
    flexp: Flexp, only_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    devices = ("--device", "phone-4gb", "--device", "phone-4gb", "--goal", "memory_only")
    code, out, err = flexp("plan", "--model", str(only_config), *devices)
    assert code == 0, err
    lines = [line.rstrip() for line in out.splitlines()]
    assert max(map(len, lines)) <= 80
    assert "phone-4gb 2: 2 GB for training, 19 GFLOP/s" in lines
    head = [line.split() for line in lines if "front|server|back" in line]
    assert head == [["front|server|back", "memory", "parts", "link", "time"]] * 2
    cells = [line.split() for line in lines if line.endswith((" fits", " chosen"))]
    assert [row[:5] for row in cells[:4]] == [
        ["1", "|", "3", "|", "0"],
        ["2", "|", "2", "|", "0"],
        ["2", "|", "1", "|", "1"],
        ["3", "|", "0", "|", "1"],
    ]
    assert cells[3][-1] == "chosen"
    assert "Chosen: 3 front, 1 back. 4 of 4 blocks fit into 2 GB" in out
    assert "4 of 10 cuts are shown; --all shows the others." in lines
    _, full, _ = flexp("plan", "--model", str(only_config), *devices, "--all")
    rows = [line for line in full.splitlines() if line.rstrip().endswith((" fits", " chosen"))]
    assert len(rows) == 20
    assert "--all" not in full


def test_a_device_that_is_too_small_among_others(
    only_config: Path, monkeypatch: pytest.MonkeyPatch, flexp: Flexp
) -> None:
    # This machine has 1 MB left; a row of 4096 tokens needs more.
    monkeypatch.setattr(planning, "measure", lambda: measuring.Device("here", 10**6))
    monkeypatch.setattr(planning, "measure_flops", lambda *args, **more: 3e9)
    long = ("--length", "4096", "--batch", "2")
    found = asked(flexp, only_config, "--device", "here", "--device", "laptop", *long)
    here, laptop = found["devices"]
    assert here["chosen"] is None
    assert here["problem"].startswith('Client "here" on "here" has 1 MB (1000000 bytes), but a ')
    assert "are missing" in here["problem"]
    assert 'the smallest that would do is "laptop"' in here["problem"]
    assert laptop["chosen"] is not None
    assert all(row["missing"] > 0 for row in found["cuts"] if row["device"] == "here")
    code, out, _ = flexp("plan", "--model", str(only_config), "--device", "here", *long)
    assert code == 2
    assert out.count("chosen") == 0
    code, out, _ = flexp(
        "plan", "--model", str(only_config), "--device", "here", "--device", "laptop", *long
    )
    assert code == 0
    assert "too much" in out


def test_this_machine_is_measured_on_a_block_of_the_model(
    flexp: Flexp, only_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "measure_flops", lambda *args, **more: 3e9)
    found = asked(flexp, only_config, "--device", "here", "--server", "here", "--length", "16")
    [here] = found["devices"]
    assert here["flops"] == found["server"]["flops"] == 3e9
    assert here["memory"] == found["server"]["memory"] > 10**6
    assert here["uplink"] == PROFILES["laptop"].device().uplink
    assert "measured now" in here["source"]


def test_the_v_shape_and_a_language_model(flexp: Flexp, only_config: Path, tiny_lm: Path) -> None:
    found = asked(flexp, only_config, "--device", "laptop", "--labels", "logits", "--length", "16")
    assert [(row["front"], row["back"]) for row in found["cuts"]] == [(n, 0) for n in (1, 2, 3, 4)]
    speaks = asked(flexp, tiny_lm, "--device", "laptop", "--dtype", "bfloat16", "--length", "16")
    assert speaks["task"] == "causal-lm"
    assert speaks["cuts"][0]["step_bytes"] == 4 * 8 * 16 * 32 * 2
    code, _, err = flexp(
        "plan", "--model", str(tiny_lm), "--device", "laptop", "--labels", "logits"
    )
    assert code == 2
    assert "would show the server the text itself" in err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "Give a recipe, or --model with --device"),
        (("--model", "X"), "Name devices: phone-4gb, phone-8gb,"),
        (("--model", "X", "--device", "phone-4g"), 'profile "phone-4g". Did you mean "phone-4gb"?'),
        (("--model", "X", "--device", "laptop", "--server", "gpu"), 'no device profile "gpu"'),
        (("--model", "X", "--device", "laptop", "--goal", "best"), "plan.goal: Input should be"),
        (("--model", "X", "--device", "laptop", "--task", "images"), 'for task.kind "images"'),
        (("--model", "X", "--device", "laptop", "--task", "sound"), "task.kind: Input should be"),
        (("--model", "X", "--device", "laptop", "--labels", "no"), "plan.labels: Input should be"),
        (
            ("--model", "X", "--device", "laptop", "--length", "4097"),
            "has 4096 positions. Set task.",
        ),
        (("--model", "nowhere", "--device", "laptop"), '"nowhere" cannot be opened as a model'),
    ],
)
def test_what_cannot_be_planned_is_said(
    flexp: Flexp, only_config: Path, more: tuple[str, ...], message: str
) -> None:
    args = [str(only_config) if one == "X" else one for one in more]
    code, out, err = flexp("plan", *args)
    assert code == 2
    assert message in err
    assert not out


def test_of_a_deep_model_a_selection_is_shown() -> None:
    rows = [
        {
            "front": d - b,
            "back": b,
            "missing": max(0, d - 13),
            "chosen": (d - b, b) == (5, 4),
        }
        for d in range(1, 31)
        for b in range(d)
    ]
    some = [(r["front"], r["back"]) for r in selection(rows)]
    assert [sum(cut) for cut in some] == [1, 2, 4, 8, 9, 12, 13, 14, 16, 20, 24, 28, 30]
    assert (5, 4) in some
    assert (9, 4) in some  # the deepest that fits
    assert (10, 4) in some  # the first that does not


# ---- a recipe's plan


def seats_of(flexp: Flexp, recipe: Path, *more: str) -> list[dict[str, Any]]:
    code, out, err = flexp("plan", str(recipe), *more, "--json")
    assert code == 0, err
    return json.loads(out)["seats"]


def test_a_recipes_seats_have_seconds_where_speeds_are_known(
    flexp: Flexp, recipe_of: Recipe
) -> None:
    devices = [
        {"name": "slow", "memory": "1GB", **FAST, "gflops": 0.001},
        {"name": "quick", "profile": "laptop", "gflops": 100},
    ]
    changes: dict[str, Any] = {"plan__cut": None, "plan__devices": devices}
    seats = seats_of(flexp, recipe_of(**changes, plan__server={"profile": "gpu-server"}))
    assert [seat["device"] for seat in seats] == ["slow", "quick", "slow"]
    assert all(seat["seconds"] > 0 for seat in seats)
    assert " a step; " in seats[0]["reason"]  # both speeds are known: optimized
    assert (seats[0]["front"], seats[0]["back"]) == (1, 0)
    plain = seats_of(flexp, recipe_of(**changes))  # the server's speed is not
    assert "fit into" in plain[0]["reason"]
    assert plain[0]["front"] + plain[0]["back"] == 4
    cut = seats_of(
        flexp, recipe_of(plan__devices=devices, plan__server={"gflops": 1}, plan__cut=[1, 1])
    )
    assert cut[0]["reason"] == "as the recipe says"
    assert cut[0]["seconds"] > cut[1]["seconds"] > 0
    assert cut[0]["step_bytes"] == 4 * 4 * 16 * 32 * 4


def test_a_straggler_is_slower_than_its_device(flexp: Flexp, recipe_of: Recipe) -> None:
    changes: dict[str, Any] = {
        "plan__devices": [{"profile": "phone-4gb"}],
        "plan__server": {"profile": "gpu-server"},
    }
    seats = seats_of(flexp, recipe_of(**changes, plan__slow={"anna": 10}))
    assert seats[0]["seconds"] == pytest.approx(10 * seats[1]["seconds"], rel=1e-3)


def test_the_static_cut_the_floor_and_the_weights(flexp: Flexp, recipe_of: Recipe) -> None:
    base: dict[str, Any] = {
        "plan__cut": None,
        "plan__devices": [{"profile": "laptop"}],
        "plan__server": {"profile": "gpu-server"},
    }

    def cuts(**more: Any) -> set[tuple[int, int]]:
        seats = seats_of(flexp, recipe_of(**base, **more))
        return {(seat["front"], seat["back"]) for seat in seats}

    assert cuts(plan__goal="static", plan__static=[2, 1]) == {(2, 1)}
    assert cuts(plan__goal="static") == {(1, 1)}
    assert {a for a, _ in cuts(plan__min_front=3)} == {3}
    points = {0.25: 0.1, 1.0: 0.9}
    deep = cuts(plan__accuracy=points, plan__weights={"accuracy": 100})
    assert {a + b for a, b in deep} == {4}


def test_people_see_time_only_where_it_is_known(
    flexp: Flexp, recipe_of: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    devices = [{"name": "phone", "memory": "10MB", **FAST}]
    timed = recipe_of(plan__devices=devices, plan__server={"gflops": 10})
    _, out, _ = flexp("plan", str(timed))
    assert "total" in out
    assert " time" in out.splitlines()[3]
    assert "phone: as the recipe says" in out
    _, out, _ = flexp("plan", str(recipe_of()))
    assert " time" not in out.splitlines()[3]
    assert " link" in out.splitlines()[3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices": [{"memory": "1GB"}]}, "a device has no name. Give name, or profile"),
        ({"devices": [{"name": "p"}]}, 'Device "p" has no memory. Give memory, or profile'),
        ({"devices": [{"name": "p", "memory": "1 GX"}]}, "Device \"p\", memory: '1 GX' is not a"),
        ({"devices": [{"name": "p", "memory": "4kB"}]}, 'Device "p" has memory 4000. Give'),
        ({"devices": [{"profile": "fone"}]}, 'no device profile "fone"'),
        ({"devices": [{"profile": "laptop"}, {"profile": "laptop"}]}, 'there are two "laptop"'),
        ({"devices": [{"profile": "laptop", "gflops": 0}]}, "plan.devices.0.gflops"),
        ({"devices": [{"profile": "laptop", "gflops": -3}]}, "plan.devices.0.gflops"),
        ({"devices": [{"profile": "laptop", "up_mbit": ".nan"}]}, "plan.devices.0.up_mbit"),
        ({"devices": [{"profile": "laptop", "gflops": float("inf")}]}, "plan.devices.0.gflops"),
        ({"devices": [{"profile": "laptop", "latency_ms": -1}]}, "plan.devices.0.latency_ms"),
        ({"server": {"profile": "gpu"}}, 'no device profile "gpu"'),
        ({"slow": {"zoe": 2}}, 'plan.slow: there is no client "zoe"'),
        ({"slow": {"anna": 0.5}}, "plan.slow.anna"),
        ({"accuracy": {2: 0.5}, "devices": [{"profile": "laptop"}]}, "plan.accuracy has 2.0: 0.5"),
        ({"weights": {"speed": 1}}, "plan.weights.speed"),
        ({"goal": "optimized", "devices": [{"profile": "laptop"}]}, "speed of the server is not"),
        ({"goal": "static", "static": [4, 1]}, "plan.static is (4, 1)"),
        ({"max_depth": 9}, "plan.max_depth is 9, but the model has 4 blocks"),
        ({"min_front": 2, "cut": [1, 1]}, 'client "anna" asked for 1 front blocks, but plan.min_'),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(
    flexp: Flexp, recipe_of: Recipe, changes: dict[str, Any], message: str
) -> None:
    given = {"cut": None, **changes}
    code, _, err = flexp("plan", str(recipe_of(**{f"plan__{k}": v for k, v in given.items()})))
    assert code == 2, err
    assert message in err


def test_doctor_measures_the_model_of_a_recipe(flexp: Flexp, recipe_of: Recipe) -> None:
    code, out, _ = flexp("doctor", str(recipe_of()), "--json")
    assert code == 0
    assert json.loads(out)["block_gflops"] > 0


def test_a_plan_counts_what_a_device_would_hold_as_codes(
    recipe_of: Recipe, tiny_model: Path, tmp_path: Path
) -> None:
    recipe = recipe_file.read(recipe_of(model__quantize="nf4"))
    told = planning.of_recipe(recipe, assets.Cache(tmp_path))
    body = Backbone.open(
        tiny_model,
        task="classification",
        blocks=frozenset({0, 3}),
        quantize=Quantize("nf4", Lora()),
    )
    codes = [b for n, b in body.model.named_buffers() if n.endswith((".codes", ".scales"))]
    held = sum(t.nbytes for t in (*body.model.parameters(), *codes))
    assert len(codes) == 2 * 2 * 6
    assert told["quantize"] == "nf4"
    assert {seat["bytes"]["weights"] for seat in told["seats"]} == {held}
