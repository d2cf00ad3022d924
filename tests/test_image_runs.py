"""Runs on images: the same bits at every cut; learned, planned, told."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from fixtures_images import CNN, RESNET, VIT
from safetensors.torch import load_file
from toys import at_desk, backbone, batches_for, cuts

from flexp import answers, assets, commands, planning, recipe_file
from flexp.errors import DataError, ExportError, ModelError
from flexp.link.wire import packed_bytes
from flexp.model.reader import open_reader
from flexp.model.skeleton import bare, skeleton, states_of
from flexp.plan.costs import step_bytes
from flexp.plan.sizes import measure_costs

Recipe = Callable[..., Path]
MODELS = {"cnn": (CNN, 2), "resnet": (RESNET, 3), "vit": (VIT, 3)}
LONG: dict[str, Any] = {"train": {"epochs": 3, "batch": 6, "lr": 0.01}, "rounds": 3}


def run(recipe: Path, *overrides: str) -> Path:
    found = recipe_file.read(recipe, overrides)
    commands.run(found, assets.Cache(recipe.parent / "no-assets"), [])
    return Path(found.out) / found.name


def cells(folder: Path) -> dict[tuple[str, str, str], float]:
    rows = json.loads((folder / "result.json").read_text("utf-8"))["rows"]
    return {(r["client"], r["cell"], r["metric"]): r["value"] for r in rows}


@pytest.mark.parametrize("model", MODELS)
def test_a_run_gives_the_same_bits_wherever_it_is_cut(
    model: str, images_of: Recipe, tmp_path: Path
) -> None:
    config, depth = MODELS[model]
    found: list[dict[str, dict[str, torch.Tensor]]] = []
    for n, cut in enumerate(([depth, 0], [1, 0], [1, depth - 2])):
        folder = run(images_of(config, rounds=1, plan={"cut": cut}), f"out={tmp_path / str(n)}")
        held = sorted((folder / "adapters").rglob("*.safetensors"))
        found.append({p.parent.name: load_file(p) for p in held})
    assert len(found[0]) == 3
    for other in found[1:]:
        for client, held in found[0].items():
            assert all(torch.equal(v, other[client][k]) for k, v in held.items())


def test_what_is_drawn_learns_is_scored_and_told_again(images_of: Recipe, album: Path) -> None:
    folder = run(images_of(RESNET, **LONG, mode="fast", model__dtype="float32"))
    found = cells(folder)
    assert found["all", "personal/global/after", "accuracy"] > 0.8  # of three kinds alike
    assert found["all", "personal/global/after", "macro_f1"] > 0.8
    adapter = folder / "adapters" / "anna"
    paths = [str(next((album / "ben" / kind).iterdir())) for kind in ("across", "down", "plain")]
    said = answers.predict(adapter, paths, assets.Cache(album))["predictions"]
    assert [one["label"] for one in said].count("across") < 3
    right = [one["label"] == Path(path).parent.name for one, path in zip(said, paths, strict=True)]
    assert sum(right) >= 2
    with pytest.raises(DataError, match="no such file"):
        answers.predict(adapter, ["no.png"], assets.Cache(album))
    with pytest.raises(ExportError, match="no weights of its own"):
        answers.export_adapter(adapter, album / "out", assets.Cache(album), merged=True)


def test_a_pretrained_classifier_of_images_takes_lora_and_is_merged(
    images_of: Recipe, album: Path, tmp_path: Path
) -> None:
    sizes = {k: v for k, v in VIT.items() if k != "model_type"}
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        hf.ViTForImageClassification(hf.ViTConfig(**sizes)).save_pretrained(tmp_path / "vit")
    told = {"image_mean": [0.4], "image_std": [0.3]}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(told))
    lora = {"kind": "lora", "rank": 2, "alpha": 4.0}
    folder = run(images_of(VIT, model__source=str(tmp_path / "vit"), adapter=lora))
    adapter, out = folder / "adapters" / "anna", tmp_path / "merged"
    assert any(".lora_A." in name for name in load_file(adapter / "adapter_model.safetensors"))
    answers.export_adapter(adapter, out, assets.Cache(tmp_path), merged=True)
    pixels = open_reader(out, "images")
    assert (pixels.mean, pixels.std) == ((0.4,), (0.3,))
    path = str(next((album / "ben" / "down").iterdir()))
    (said,) = answers.predict(adapter, [path], assets.Cache(tmp_path))["predictions"]
    merged = hf.ViTForImageClassification.from_pretrained(out).eval()
    with torch.no_grad():
        logits = merged(**pixels.batch([pixels.fitted(path, path, "")])).logits[0]
    config: Any = merged.config
    wanted = dict(zip(config.id2label.values(), logits.softmax(-1).tolist(), strict=True))
    assert said["probabilities"] == pytest.approx(wanted, abs=1e-5)


def test_texts_and_images_are_not_mixed_up(images_of: Recipe, tiny_model: Path) -> None:
    with pytest.raises(ModelError, match="is no model of images: its config has no num_channels"):
        open_reader(tiny_model, "images")
    with pytest.raises(DataError, match="Give a folder with its files, or set task"):
        open_reader(images_of(CNN).parent / "drawn", "classification")


def test_another_seed_draws_other_weights(images_of: Recipe, tmp_path: Path) -> None:
    found = [run(images_of(CNN), f"seed={n}", f"out={tmp_path / str(n)}") for n in (0, 1)]
    one, other = (load_file(f / "adapters/anna/adapter_model.safetensors") for f in found)
    assert not any(torch.equal(v, other[k]) for k, v in one.items() if v.dim() > 1)


# ---- plans


@pytest.mark.parametrize("family", ["cnn", "resnet", "vit"])
def test_the_bytes_of_a_step_are_those_of_the_ledger(family: str) -> None:
    """At every cut, where hidden states of other shapes cross, and as int8 has them."""
    body = backbone(family, 3)
    states = states_of(body.config, "images")
    assert states is not None
    net = bare(body.config, "images").model
    sized = measure_costs(
        net, body.blocks_path, {}, batch=3, length=0, itemsize=4, states=states.shapes
    )
    int8 = tuple(packed_bytes((3, *shape), torch.float32, "int8") for shape in states.shapes)
    for seat in cuts(body.depth):
        with at_desk(body, seat, keep_crossings=True) as (desk, ledger):
            desk.fit(batches=iter(batches_for(body, 1)))
        cut = seat.cut.front, seat.cut.back
        crossed = [c for c in ledger.crossings or () if not c.name.startswith("slot/")]
        assert {c.name for c in crossed} == {"hidden", "grad"}  # neither pixels nor labels
        assert sum(c.bytes for c in crossed) == step_bytes(sized, cut=cut)
        narrow = replace(sized, packed_states=int8)
        small = sum(packed_bytes(c.shape, torch.float32, "int8") for c in crossed)
        assert small == step_bytes(narrow, cut=cut)


@pytest.mark.parametrize("model", MODELS)
def test_plans_know_images(model: str, images_of: Recipe, tmp_path: Path) -> None:
    """A device with room for some blocks gets these; what is told adds up at every cut."""
    config, depth = MODELS[model]
    recipe = recipe_file.read(images_of(config))
    found = planning.of_recipe(recipe, assets.Cache(tmp_path))
    seat = found["seats"][0]
    assert found["blocks"] == depth
    assert seat["bytes"]["activations"] > 0
    asked = planning.Asked(recipe.model.source, ("laptop",), batch=4)
    told = planning.of_model(asked, assets.Cache(tmp_path))
    assert told["task"] == "images"
    near = {(r["front"], r["back"]): r["bytes"]["total"] for r in told["cuts"]}
    assert near[1, 0] < near[depth, 0]


def test_packaged_models_are_a_config_alone(tmp_path: Path) -> None:
    assert sorted(assets.drawn_models()) == ["cnn", "resnet", "vit"]
    for name, depth in (("cnn", 3), ("resnet", 7), ("vit", 8)):
        bones = skeleton(assets.resolve(name, assets.Cache(tmp_path)), "images", classes=10)
        assert bones.depth == depth
        states = states_of(bones.config, "images")
        assert states is not None
        assert len(states.shapes) == depth + 1


def test_the_recipe_that_is_shipped_runs(album: Path, tmp_path: Path) -> None:
    """In small: other images, fewer rows, one round."""
    small = ["data.clients=2", "data.rows=20", "data.alpha=5", "rounds=1", "train.epochs=1"]
    recipe = Path(__file__).parents[1] / "recipes" / "images.yaml"
    folder = run(recipe, f"data.path={album}", f"out={tmp_path / 'runs'}", *small)
    assert ("all", "personal/global/after", "macro_f1") in cells(folder)
