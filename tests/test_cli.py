"""The commands as a person uses them: results, JSON, and errors before anything starts."""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

Recipe = Callable[..., Path]


Flexp = Callable[..., tuple[int, str, str]]


def test_run_then_predict_with_the_adapter(flexp: Flexp, recipe_of: Recipe) -> None:
    recipe = recipe_of()
    code, out, _ = flexp("run", str(recipe), "--json")
    assert code == 0
    document = json.loads(out)
    assert {row["client"] for row in document["rows"]} == {"anna", "ben", "carl dee", "all"}
    assert set(document["rows"][0]) == {"method", "client", "cell", "metric", "value", "seed"}
    assert document["rows"][0]["metric"] == "accuracy"
    adapter = next(path for path in document["adapters"] if path.endswith("anna"))
    code, out, _ = flexp("predict", adapter, "a lovely day", "a sad film", "--json")
    assert code == 0
    predictions = json.loads(out)["predictions"]
    assert [set(p["probabilities"]) for p in predictions] == [{"negative", "positive"}] * 2
    assert sum(predictions[0]["probabilities"].values()) == pytest.approx(1.0)


@pytest.mark.parametrize("targets", [[], ["query", "output.dense"]], ids=["all", "named"])
def test_blocks_are_fine_tuned_in_full(
    targets: list[str], flexp: Flexp, recipe_of: Recipe, tmp_path: Path
) -> None:
    dense: dict[str, Any] = {"kind": "dense", **({"targets": targets} if targets else {})}
    recipe = str(recipe_of(adapter=dense))
    code, out, err = flexp("plan", recipe, "--json")
    assert code == 0, err
    numbers = 2 * (32 * 32 + 32) + (48 * 32 + 32)  # query and the two that are named output.dense
    numbers += 0 if targets else 2 * (32 * 32 + 32) + (32 * 48 + 48)
    # Of two near blocks and the head: beginning, present value, gradient and two moments.
    expected = 5 * 4 * (2 * numbers + 2 * 32 + 2)
    assert {s["bytes"]["adapters"] for s in json.loads(out)["seats"]} == {expected}
    code, out, err = flexp("run", recipe, "--json")
    assert code == 0, err
    adapter = next(path for path in json.loads(out)["adapters"] if path.endswith("anna"))
    code, out, err = flexp("predict", adapter, "lovely", "sad film", "--json")
    assert code == 0, err
    predicted = [p["probabilities"] for p in json.loads(out)["predictions"]]
    merged = tmp_path / "merged"
    assert flexp("export", adapter, str(merged), "--merged")[0] == 0
    base = json.loads((Path(adapter) / "flexp.json").read_text("utf-8"))["base"]
    model: Any = hf.AutoModelForSequenceClassification.from_pretrained(merged)
    plain: Any = hf.AutoModel.from_pretrained(base)
    moved = {
        k
        for k, v in plain.named_parameters()
        if not v.equal(model.get_parameter(f"bert.{k}")) and not k.startswith("pooler.")
    }
    assert len(moved) == 4 * 2 * (3 if targets else 6)
    tokenizer: Any = hf.AutoTokenizer.from_pretrained(merged)
    logits = model.eval()(**tokenizer(["lovely", "sad film"], padding=True, return_tensors="pt"))
    for found, row in zip(predicted, logits.logits.softmax(-1).tolist(), strict=True):
        assert [found["negative"], found["positive"]] == pytest.approx(row, abs=1e-5)


def test_an_unknown_target_is_said_before_anything_starts(flexp: Flexp, recipe_of: Recipe) -> None:
    code, _, err = flexp("run", str(recipe_of(adapter={"kind": "dense", "targets": ["quer"]})))
    assert code == 2
    assert (
        'adapter.targets: no module with weights "quer" in the blocks. Did you mean "query"?' in err
    )


def test_a_report_of_two_methods(flexp: Flexp, recipe_of: Recipe, tmp_path: Path) -> None:
    recipe = str(recipe_of(rounds=1))
    for method in ("local", "flexp"):
        assert flexp("run", recipe, f"strategy.name={method}", f"name={method}")[0] == 0
    folders = [str(tmp_path / "runs" / method) for method in ("local", "flexp")]
    code, out, err = flexp("report", *folders, "--out", str(tmp_path / "two.html"), "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["metric"] == "accuracy"
    assert len(document["runs"]) == 2
    page = Path(document["out"]).read_text(encoding="utf-8")
    for client in ("anna", "ben", "carl dee"):
        assert client in page
    code, out, err = flexp("report", str(tmp_path), "--out", str(tmp_path / "none.html"))
    assert code == 2
    assert "events.jsonl" in err
    assert not (tmp_path / "none.html").exists()


def test_people_see_a_table_and_where_things_are(flexp: Flexp, recipe_of: Recipe) -> None:
    code, out, _ = flexp("run", str(recipe_of()), "strategy.name=local")
    assert code == 0
    assert "carl dee" in out
    assert "adapters" in out


def test_plan_names_blocks_and_bytes_per_client(flexp: Flexp, recipe_of: Recipe) -> None:
    recipe = recipe_of(
        plan__cut=None,
        plan__devices=[{"name": "watch", "memory": "20.3MB"}, {"name": "phone", "memory": "21MB"}],
    )
    code, out, err = flexp("plan", str(recipe), "--json")
    assert code == 0, err
    seats = json.loads(out)["seats"]
    assert [seat["device"] for seat in seats] == ["watch", "phone", "watch"]
    assert seats[0]["front"] + seats[0]["back"] < seats[1]["front"] + seats[1]["back"]
    for seat in seats:
        parts = {k: v for k, v in seat["bytes"].items() if k != "total"}
        assert sum(parts.values()) == seat["bytes"]["total"]


def test_doctor_shows_every_client(flexp: Flexp, recipe_of: Recipe) -> None:
    code, out, _ = flexp("doctor", str(recipe_of()), "--json")
    assert code == 0
    clients = json.loads(out)["clients"]
    assert [(c["client"], c["train"]) for c in clients] == [
        ("anna", 12),
        ("ben", 12),
        ("carl dee", 12),
    ]
    assert all(sum(c["labels"].values()) == c["train"] for c in clients)


def test_methods_and_assets_are_listed(flexp: Flexp) -> None:
    code, out, _ = flexp("methods", "--json")
    assert code == 0
    methods = {row["method"]: row for row in json.loads(out)}
    assert {"base", "local", "fedavg", "flexp"} <= set(methods)
    assert methods["flexp"]["reconstruction"]
    assert methods["flexp"]["leaves"] == []
    code, out, _ = flexp("assets", "list", "--json")
    assert code == 0
    assert {"minilm", "vader"} <= {row["name"] for row in json.loads(out)["assets"]}
    assert flexp("methods")[0] == flexp("assets")[0] == 0


# ---- bad input: one clear message, exit code 2, nothing started


def refused(flexp: Flexp, recipe: Path, *overrides: str) -> str:
    code, out, err = flexp("run", str(recipe), *overrides)
    assert code == 2, (out, err)
    assert "Traceback" not in err
    runs = recipe.parent / "runs"
    assert not list(runs.glob("*")), "nothing was started"
    return err


def test_unknown_key(flexp: Flexp, recipe_of: Recipe) -> None:
    err = refused(flexp, recipe_of(train__stepz=3))
    assert 'unknown key "train.stepz"' in err
    assert 'Did you mean "steps"?' in err


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"clients": {"anna": {"tsak": {}}}}, 'Did you mean "task"?'),
        (
            {"clients": {"anna": {"rows": 3}}},
            "Known: image, label, model, objective, prompt, task, text.",
        ),
        ({"plan__devices": [{"names": "phone"}]}, 'Did you mean "name"?'),
        ({"plan__server": {"gflop": 3}}, 'Did you mean "gflops"?'),
    ],
)
def test_unknown_key_of_a_part_in_a_container(
    flexp: Flexp, recipe_of: Recipe, changes: dict[str, Any], hint: str
) -> None:
    assert hint in refused(flexp, recipe_of(**changes))


def test_all_problems_at_once(flexp: Flexp, recipe_of: Recipe) -> None:
    err = refused(flexp, recipe_of(rounds=0, train__lr=-1.0, sead=3))
    assert "rounds" in err
    assert "train.lr" in err
    assert 'Did you mean "seed"?' in err


@pytest.mark.parametrize(
    "changes", [{"train__lr": math.inf}, {"strategy__align": math.nan}, {"data__alpha": math.inf}]
)
def test_numbers_that_are_not_finite(
    flexp: Flexp, recipe_of: Recipe, changes: dict[str, Any]
) -> None:
    name = next(iter(changes)).replace("__", ".")
    err = refused(flexp, recipe_of(**changes))
    assert name in err
    assert "finite number" in err


def test_missing_recipe(flexp: Flexp, tmp_path: Path) -> None:
    assert "absent.yaml" in refused(flexp, tmp_path / "absent.yaml")


def test_missing_data(flexp: Flexp, recipe_of: Recipe, mine: Path) -> None:
    err = refused(flexp, recipe_of(data__path=str(mine.parent / "minne")))
    assert "minne" in err
    assert "mine" in err


def test_broken_json_line(flexp: Flexp, recipe_of: Recipe, mine: Path) -> None:
    file = mine / "ben.jsonl"
    lines = file.read_text().splitlines()
    lines[4] = '{"text": "a", "label" "positive"}'
    file.write_text("\n".join(lines))
    err = refused(flexp, recipe_of())
    assert "ben.jsonl, line 5, byte 23" in err


def test_empty_client(flexp: Flexp, recipe_of: Recipe, mine: Path) -> None:
    (mine / "dora.jsonl").write_text("")
    assert "dora.jsonl" in refused(flexp, recipe_of())


def test_one_class_client(flexp: Flexp, recipe_of: Recipe, mine: Path) -> None:
    line = json.dumps({"text": "happy day", "label": "positive"})
    (mine / "dora.jsonl").write_text(f"{line}\n" * 10)
    err = refused(flexp, recipe_of())
    assert '"dora"' in err
    assert "one_class: allow" in err
    code, _, err = flexp("run", str(recipe_of(data__one_class="allow", rounds=1)))
    assert code == 0, err


def test_label_out_of_range(flexp: Flexp, recipe_of: Recipe, mine: Path) -> None:
    with (mine / "anna.jsonl").open("a") as file:
        file.write(json.dumps({"text": "happy day", "label": 7}) + "\n")
    err = refused(flexp, recipe_of(task__labels=["negative", "positive"], data__split=[1, 0, 0]))
    assert "anna.jsonl:21" in err
    assert "label out of range in column" in err


def test_cut_out_of_range(flexp: Flexp, recipe_of: Recipe) -> None:
    err = refused(flexp, recipe_of(plan__cut=[3, 2]))
    assert "3 front and 2 back blocks, but the model has 4" in err
    assert "embeddings would leave" in refused(flexp, recipe_of(plan__cut=[0, 1]))


def test_device_too_small(flexp: Flexp, recipe_of: Recipe) -> None:
    devices = [{"name": "thimble", "memory": "10kB"}]
    err = refused(flexp, recipe_of(plan__cut=None, plan__devices=devices))
    assert 'Device "thimble" has memory 10000. Give a number of bytes from 1 MB on.' in err


def test_unknown_client_in_plan(flexp: Flexp, recipe_of: Recipe) -> None:
    assert '"zoe"' in refused(flexp, recipe_of(plan__cuts={"zoe": [1, 0]}))


def test_unknown_model(flexp: Flexp, recipe_of: Recipe) -> None:
    err = refused(flexp, recipe_of(model__source="minilmm"))
    assert "minilmm" in err
    assert 'Did you mean "minilm"?' in err


def test_model_without_a_block_list(flexp: Flexp, recipe_of: Recipe, tmp_path: Path) -> None:
    folder = _saved(tmp_path, recipe_of, num_hidden_layers=1)
    err = refused(flexp, recipe_of(model__source=str(folder)))
    assert "blocks_at" in err


def _saved(tmp_path: Path, recipe_of: Recipe, **config: Any) -> Path:
    import yaml

    plain = yaml.safe_load(recipe_of().read_text())
    tokenizer = hf.AutoTokenizer.from_pretrained(plain["model"]["source"])
    folder = tmp_path / "odd"
    made = hf.BertConfig(
        vocab_size=20, hidden_size=32, intermediate_size=48, num_attention_heads=2, **config
    )
    hf.BertForMaskedLM(made).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_encoder_decoder(flexp: Flexp, recipe_of: Recipe, tmp_path: Path) -> None:
    folder = _saved(tmp_path, recipe_of, num_hidden_layers=2)
    hf.T5Config(vocab_size=20, d_model=16, num_layers=2, num_heads=2).save_pretrained(folder)
    assert "encoder-decoder" in refused(flexp, recipe_of(model__source=str(folder)))


def test_no_such_method_and_no_such_option(flexp: Flexp, recipe_of: Recipe) -> None:
    err = refused(flexp, recipe_of(), "strategy.name=fedavgg")
    assert 'Did you mean "fedavg"?' in err
    err = refused(flexp, recipe_of(), "strategy.aligm=0.5")
    assert 'Did you mean "align"?' in err
    assert "strategy.align" in refused(flexp, recipe_of(), "strategy.align=lots")


def test_unwritable_output(flexp: Flexp, recipe_of: Recipe, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    assert "cannot be written" in refused(flexp, recipe_of(out=str(blocked)))


def test_a_read_only_folder(flexp: Flexp, recipe_of: Recipe, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(stat.S_IREAD | stat.S_IEXEC)
    try:
        (locked / "probe").mkdir()
    except OSError:
        assert "cannot be written" in refused(flexp, recipe_of(out=str(locked)))
    finally:
        locked.chmod(stat.S_IRWXU)


def test_text_would_be_shown(flexp: Flexp, recipe_of: Recipe) -> None:
    changes: dict[str, Any] = {"task__kind": "causal-lm", "plan__labels": "logits"}
    err = refused(flexp, recipe_of(plan__cut=[1, 0], **changes))
    assert "privacy.profile" in err


def test_a_run_is_not_overwritten_nor_resumed_with_another_recipe(
    flexp: Flexp, recipe_of: Recipe
) -> None:
    recipe = recipe_of()
    assert flexp("run", str(recipe))[0] == 0
    code, _, err = flexp("run", str(recipe))
    assert code == 2
    assert "--resume" in err
    code, _, err = flexp("run", str(recipe), "--resume", "train.lr=0.5")
    assert code == 2
    assert "train.lr differs" in err


def test_a_new_strategy_is_written_where_it_is_told(flexp: Flexp, tmp_path: Path) -> None:
    code, out, _ = flexp("new-strategy", "my_method", "--folder", str(tmp_path))
    assert code == 0
    assert str(tmp_path / "my_method" / "my_method.py") in out
    assert "flexp run RECIPE strategy.name=my_method" in out
    code, out, _ = flexp("new-strategy", "other", "--folder", str(tmp_path), "--json")
    assert json.loads(out)["method"] == "other"
    code, _, err = flexp("new-strategy", "my_method", "--folder", str(tmp_path))
    assert code == 2
    assert "is there already" in err


def test_methods_say_what_each_does(flexp: Flexp) -> None:
    code, out, _ = flexp("methods")
    assert code == 0
    plain = " ".join(out.split())
    for words in ("federated LoRA", "personal: the near part", "options: mu=0.1", "not federated"):
        assert words in plain
    code, out, _ = flexp("methods", "--json")
    rows = {row["method"]: row for row in json.loads(out)}
    assert rows["fedper"]["personal"] == "the head"
    assert rows["fedper"]["leaves"][0]["part"] == "all but the head"
    assert rows["splitlora"]["reconstruction"]
    assert rows["pooled"]["kind"] == "centralised"


def test_ranks_of_single_clients(flexp: Flexp, recipe_of: Recipe) -> None:
    assert "all clients need one rank" in refused(
        flexp, recipe_of(plan__ranks={"anna": 3}), "strategy.name=fedavg"
    )
    assert 'no client "nobody"' in refused(flexp, recipe_of(plan__ranks={"nobody": 3}))
    code, out, err = flexp(
        "run", str(recipe_of(plan__ranks={"anna": 3}, rounds=1)), "strategy.name=local", "--json"
    )
    assert code == 0, err
    configs = [Path(p) / "adapter_config.json" for p in json.loads(out)["adapters"]]
    assert [json.loads(c.read_text())["r"] for c in configs] == [3, 2, 2]
