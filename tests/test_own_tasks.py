"""Clients with labels, a task or an objective of their own, around one trunk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from test_fleet import adapter, bits
from test_resume import outcome, run
from torch.nn import functional

from flexp import answers, assets, commands, events, planning, recipe_file
from flexp.client.desk import Training
from flexp.data.examples import Examples
from flexp.data.objectives import CrossEntropy, Focal, objective_of
from flexp.data.tasks import IGNORED
from flexp.errors import DataError, FlexpError, ModelError, RecipeError, StrategyError
from flexp.model.adapter import Dense, Kind, Lora
from flexp.model.cut import Cut, Seat
from flexp.model.kindred import join
from flexp.model.ops import Optim
from flexp.recipe import TaskRecipe
from flexp.recipe_clients import ObjectiveRecipe
from flexp.stage import opened, prepare, survey
from flexp.strategies import BUILT_IN
from flexp.strategies.base import Setting

Recipe = Callable[..., Path]
MOODS = ("calm", "glad", "low", "mad", "tired")
OWN = {"ben": {"label": "mood"}}
LM = TaskRecipe(kind="causal-lm", max_length=16)
FREE = {
    "base",
    "fedbabu",
    "fedper",
    "fedrep",
    "fedsa_lora",
    "flexp",
    "flexp_sft",
    "local",
    "pfedlora",
    "phsfl",
    "splitfed_v3",
    "splitfrozen",
}  # beside them pfedpg and fedmosaic, which want other adapters, and zoopfl, which serves none
OTHERS = {"pfedpg", "fedmosaic", "zoopfl"}


@pytest.fixture
def moods(mine: Path) -> Path:
    """Ben's rows have five moods in a column that the others lack."""
    file = mine / "ben.jsonl"
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    for n, row in enumerate(rows):
        del row["label"]
        row["mood"] = MOODS[n % 5]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return mine


def cells(folder: Path) -> dict[tuple[str, str, str], float]:
    rows = json.loads((folder / "result.json").read_text("utf-8"))["rows"]
    return {(r["client"], r["cell"], r["metric"]): r["value"] for r in rows}


# ---- labels


@pytest.mark.parametrize("method", sorted(FREE))
@pytest.mark.daily("base", "fedrep", "flexp", "local")
def test_a_client_with_labels_of_its_own(recipe_of: Recipe, moods: Path, method: str) -> None:
    folder = run(recipe_of(clients=OWN), f"strategy.name={method}")
    assert not [e for e in events.read(folder / "events.jsonl") if isinstance(e, events.TurnFailed)]
    heads = {client: adapter(folder, client) for client in ("anna", "ben")}
    shapes = {c: v["base_model.model.classifier.weight"].shape[0] for c, v in heads.items()}
    assert shapes == {"anna": 2, "ben": 5}
    cards = {c: json.loads((folder / "adapters" / c / "flexp.json").read_text()) for c in heads}
    assert cards["ben"]["labels"] == list(MOODS)
    assert cards["anna"]["labels"] == ["negative", "positive"]
    found = cells(folder)
    assert ("anna", "personal/global/after", "accuracy") in found
    assert ("ben", "personal/own/after", "accuracy") in found
    assert ("ben", "personal/global/after", "accuracy") not in found
    own = [found[c, "personal/own/after", "accuracy"] for c in ("anna", "ben", "carl dee")]
    assert found["all", "personal/own/after", "accuracy"] == sum(own) / 3
    said = answers.predict(folder / "adapters" / "ben", ["great film"], assets.Cache(moods))
    assert set(said["predictions"][0]["probabilities"]) == set(MOODS)


def test_the_others_do_not_notice_it_where_nothing_is_shared(
    recipe_of: Recipe, moods: Path
) -> None:
    mixed = outcome(run(recipe_of(clients=OWN), "strategy.name=local"))
    (moods / "ben.jsonl").unlink()
    apart = outcome(run(recipe_of(name="apart"), "strategy.name=local"))
    for name, held in apart[0].items():
        assert mixed[0][name] == held
    ours = [row for row in mixed[1] if row["client"] in ("anna", "carl dee")]
    assert ours == [row for row in apart[1] if row["client"] != "all"]


def test_its_cut_is_invisible_as_everybodys(recipe_of: Recipe, moods: Path) -> None:
    whole = run(recipe_of(clients=OWN, name="whole", plan={"cut": [4, 0]}), "strategy.name=local")
    cut = run(recipe_of(clients=OWN, plan={"cut": [1, 1]}), "strategy.name=local")
    for client in ("anna", "ben", "carl dee"):
        assert bits(adapter(whole, client)) == bits(adapter(cut, client))


def test_labels_may_be_named(recipe_of: Recipe, moods: Path, tmp_path: Path) -> None:
    more = [*MOODS, "sad"]
    recipe = recipe_of(clients={"ben": {"label": "mood", "task": {"labels": more}}})
    found = survey(recipe_file.read(recipe), assets.Cache(tmp_path / "none")).federation
    assert list(getattr(found.task_of("ben"), "labels", ())) == more
    assert list(getattr(found.task_of("anna"), "labels", ())) == ["negative", "positive"]
    table = commands.doctor(recipe_file.read(recipe), assets.Cache(tmp_path / "none"))["clients"]
    assert [list(row["labels"]) for row in table] == [
        ["negative", "positive"],
        more,
        ["negative", "positive"],
    ]


@pytest.mark.parametrize("method", sorted(m.name for m in BUILT_IN if m.name not in FREE | OTHERS))
def test_methods_that_bring_heads_together_refuse(method: str) -> None:
    made = {m.name: m for m in BUILT_IN}[method]()
    seats: dict[str, Seat] = {name: Seat(Cut(1, 1)) for name in ("anna", "ben", "cy")}
    one, other = ("classification", "x", "y"), ("classification", "z", "y")
    heads: dict[str, tuple[str, ...]] = {"anna": one, "ben": other, "cy": one}
    kind: Kind = Dense(("layer.0.norm",)) if method == "fedbn" else Lora()
    how = Training(Optim("sgd"))  # scaffold takes no other
    found = made.refuses(Setting("classification", kind, seats, 4, True, heads, how))
    assert '"ben" learn other labels or another task' in found
    assert '"anna"' not in found
    alike = Setting("classification", kind, seats, 4, True, {**heads, "ben": one}, how)
    assert made.refuses(alike) == ""


@pytest.mark.parametrize("method", ["fedavg", "pooled", "ditto"])
def test_they_are_refused_before_anything_runs(
    recipe_of: Recipe, moods: Path, tmp_path: Path, method: str
) -> None:
    recipe = recipe_file.read(recipe_of(clients=OWN, strategy={"name": method}))
    with pytest.raises(StrategyError, match='"ben" learn other labels'):
        prepare(recipe, assets.Cache(tmp_path / "none"))


REFUSED: list[tuple[dict[str, Any], type[FlexpError], str]] = [
    ({"clients": {"bob": {"label": "mood"}}}, DataError, 'no client "bob".*ben'),
    (
        {"clients": OWN, "plan": {"cut": [1, 0], "labels": "logits"}},
        RecipeError,
        "clients.ben: its own task",
    ),
    (
        {
            "clients": {**OWN, "anna": {"objective": {"smoothing": 0.1}}},
            "plan": {"cut": [1, 0], "labels": "loss"},
        },
        RecipeError,
        "plan.labels to keep",
    ),
    (
        {"clients": {**OWN, "anna": {"objective": {"kind": "focal", "smoothing": 0.1}}}},
        RecipeError,
        "smoothing goes with cross-entropy",
    ),
]


@pytest.mark.parametrize(("changes", "error", "what"), REFUSED, ids=["name", "far", "loss", "both"])
def test_what_cannot_be_is_refused(
    recipe_of: Recipe,
    moods: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    error: type[FlexpError],
    what: str,
) -> None:
    with pytest.raises(error, match=what):
        survey(recipe_file.read(recipe_of(**changes)), assets.Cache(tmp_path / "none"))


# ---- another kind of task


def test_one_trunk_serves_a_classifier_and_a_language_model(
    recipe_of: Recipe, mine: Path, tiny_lm: Path
) -> None:
    own = {"ben": {"task": {"kind": "causal-lm"}}}
    recipe = recipe_of(clients=own, model__source=str(tiny_lm))
    folder = run(recipe, "strategy.name=flexp")
    assert not [e for e in events.read(folder / "events.jsonl") if isinstance(e, events.TurnFailed)]
    found = cells(folder)
    assert ("ben", "personal/own/after", "perplexity") in found
    assert ("ben", "personal/global/after", "perplexity") not in found
    both = [found[c, "personal/own/after", "accuracy"] for c in ("anna", "carl dee")]
    assert found["all", "personal/own/after", "accuracy"] == sum(both) / 2
    assert ("all", "personal/own/after", "loss") not in found
    card = json.loads((folder / "adapters" / "ben" / "flexp.json").read_text())
    assert card["task"] == "causal-lm"
    assert answers.predict(folder / "adapters" / "ben", ["great"], assets.Cache(mine))[
        "predictions"
    ]
    commands.write_report([folder], folder / "report.html")


def test_a_language_model_beside_classifiers_learns_what_it_would_alone(
    recipe_of: Recipe, mine: Path, tiny_lm: Path
) -> None:
    """Local-only: the same adapter as in a run of language models, bit for bit."""
    own = {"ben": {"task": {"kind": "causal-lm"}}}
    source = {"model__source": str(tiny_lm)}
    mixed = run(recipe_of(clients=own, **source), "strategy.name=local")
    alone = run(recipe_of(name="lm", task__kind="causal-lm", **source), "strategy.name=local")
    assert bits(adapter(mixed, "ben")) == bits(adapter(alone, "ben"))


def test_blocks_are_in_memory_once(recipe_of: Recipe, mine: Path, tiny_lm: Path) -> None:
    own = {"ben": {"task": {"kind": "causal-lm"}}}
    recipe = recipe_file.read(recipe_of(clients=own, model__source=str(tiny_lm)))
    stage = opened(survey(recipe, assets.Cache(mine / "none")))
    server, mine_ = stage.backbone, stage.engine.backbone_of("ben")
    stage.engine.close()
    assert mine_ is not server
    shared = {id(p) for p in server.model.parameters()}
    left = [name for name, p in mine_.model.named_parameters() if id(p) not in shared]
    assert left == []  # its output is the embedding, which both have
    output: Any = mine_.model
    assert output.lm_head.weight is output.model.embed_tokens.weight


def test_models_of_other_blocks_are_refused() -> None:
    with pytest.raises(ModelError, match='Client "ben" cannot have a task of its own'):
        join(toys.backbone("llama-cls"), toys.backbone("llama", 3), Lora(rank=2), "ben")
    other = toys.backbone("llama-cls")
    with torch.no_grad():
        next(iter(other.model.get_submodule(f"{other.blocks_path}.1").parameters())).add_(1)
    with pytest.raises(ModelError, match="block 1 has other weights"):
        join(other, toys.backbone("llama-cls"), Lora(rank=2), "ben")


# ---- objectives


def test_objectives_are_what_torch_says() -> None:
    task: Any = toys.ToyTask()
    stream = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(6, 3, generator=stream), torch.tensor([0, 1, 2, 0, 1, 1])
    weights = torch.tensor([1.0, 2.0, 0.5])
    plain = functional.cross_entropy(logits, labels)
    assert torch.equal(CrossEntropy(task).loss(logits, labels), plain)
    smooth = functional.cross_entropy(logits, labels, weights, label_smoothing=0.1)
    assert torch.equal(CrossEntropy(task, 0.1, weights).loss(logits, labels), smooth)
    assert torch.allclose(Focal(task, 0.0).loss(logits, labels), plain)
    weighted = functional.cross_entropy(logits, labels, weights)
    assert torch.allclose(Focal(task, 0.0, weights).loss(logits, labels), weighted)
    right = torch.tensor([[9.0, 0.0, 0.0]])
    one = torch.tensor([0])
    p = right.softmax(-1)[0, 0]
    expected = -((1 - p) ** 2) * p.log()
    assert torch.allclose(Focal(task, 2.0).loss(right, one), expected)


def test_objectives_of_tokens_count_what_counts() -> None:
    task: Any = toys.ToyTask("causal-lm")
    stream = torch.Generator().manual_seed(0)
    logits, labels = (
        torch.randn(2, 4, 7, generator=stream),
        torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]),
    )
    labels[1, 2:] = IGNORED
    plain = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
    )
    assert torch.allclose(CrossEntropy(task).loss(logits, labels), plain)
    assert torch.allclose(Focal(task, 0.0).loss(logits, labels), plain)


def test_balanced_weights_are_inverse_frequencies(recipe_of: Recipe, tmp_path: Path) -> None:
    found = survey(recipe_file.read(recipe_of()), assets.Cache(tmp_path / "none")).federation
    rows = Examples(((1,),) * 4, (0, 0, 1, 0), ("a",) * 4)
    made = objective_of(ObjectiveRecipe(weights="balanced"), found.task, rows, "anna")
    assert isinstance(made, CrossEntropy)
    assert made.weights is not None
    assert torch.allclose(
        made.weights, torch.tensor([6 / 4 / 2, 6 / 2 / 2])
    )  # each counted once more


def test_balanced_weights_need_labels(recipe_of: Recipe, mine: Path, tiny_lm: Path) -> None:
    own = {"ben": {"task": {"kind": "causal-lm"}, "objective": {"weights": "balanced"}}}
    recipe = recipe_of(clients=own, model__source=str(tiny_lm))
    with pytest.raises(DataError, match=r"clients.ben.objective: weights .balanced. needs"):
        survey(recipe_file.read(recipe), assets.Cache(mine / "none"))


OBJECTIVES: list[dict[str, Any]] = [
    {"smoothing": 0.2},
    {"kind": "focal"},
    {"weights": "balanced"},
]


@pytest.mark.parametrize("asked", OBJECTIVES, ids=str)
def test_an_objective_is_its_clients_alone(recipe_of: Recipe, asked: dict[str, Any]) -> None:
    plain = outcome(run(recipe_of(name="plain"), "strategy.name=local"))
    own = outcome(run(recipe_of(clients={"anna": {"objective": asked}}), "strategy.name=local"))
    for name, held in plain[0].items():
        assert (own[0][name] != held) == ("anna" in name)
    run(recipe_of(name="shared", clients={"anna": {"objective": asked}}), "strategy.name=fedavg")


def test_a_head_as_wide_as_the_vocabulary_is_planned_for(
    recipe_of: Recipe, mine: Path, tiny_lm: Path
) -> None:
    own = {"ben": {"task": {"kind": "causal-lm"}}}
    recipe = recipe_file.read(recipe_of(clients=own, model__source=str(tiny_lm)))
    cache = assets.Cache(mine / "none")
    mixed = planning.of_recipe(recipe, cache)["seats"]
    lm = planning.of_recipe(recipe.model_copy(update={"clients": {}, "task": LM}), cache)["seats"]
    plain = planning.of_recipe(recipe.model_copy(update={"clients": {}}), cache)["seats"]
    assert mixed[1] == lm[1]
    assert [mixed[0], mixed[2]] == [plain[0], plain[2]]
    assert mixed[1]["bytes"] != plain[1]["bytes"]
