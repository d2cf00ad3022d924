"""A causal-LM run's adapters: they speak beside their base, and merged weights say the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from flexp import assets, export
from flexp.voices import open_voices

Flexp = Callable[..., tuple[int, str, str]]
Recipe = Callable[..., Path]


@pytest.fixture
def adapters(flexp: Flexp, recipe_of: Recipe, tiny_lm: Path) -> list[Path]:
    """Adapters of anna, ben and carl dee, each trained on a cut with its head at home."""
    recipe = recipe_of(task__kind="causal-lm", model__source=str(tiny_lm), train__lr=0.05)
    code, out, err = flexp("run", str(recipe), "--json")
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert rows[0]["metric"] == "perplexity"
    assert {"accuracy", "loss", "perplexity"} == {row["metric"] for row in rows}
    return [Path(path) for path in json.loads(out)["adapters"]]


def test_each_voice_is_its_own_model(adapters: list[Path], tiny_lm: Path, tmp_path: Path) -> None:
    spoken = open_voices(adapters[:2], assets.Cache(tmp_path / "none"))
    answers = spoken.speak("lovely day", tokens=5)
    assert set(answers) == {"base", "anna", "ben"}
    load: Any = hf.AutoModelForCausalLM.from_pretrained
    for name, folder in (("base", None), ("anna", adapters[0]), ("ben", adapters[1])):
        model = load(tiny_lm, dtype=torch.float32)
        model = model if folder is None else export.open_with_peft(model, folder)
        ids = spoken.tokenizer("lovely day", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            first = int(model(input_ids=ids).logits[0, -1].argmax())
        assert answers[name].split(" ")[0] in (spoken.tokenizer.decode([first]), "")
    assert spoken.speak("lovely day", tokens=5, only=["ben"]) == {"ben": answers["ben"]}


def test_chat_and_predict(flexp: Flexp, adapters: list[Path]) -> None:
    folders = [str(path) for path in adapters[:2]]
    asked = ("chat", *folders, "--prompt", "happy film", "--tokens", "4", "--json")
    code, out, err = flexp(*asked)
    assert code == 0, err
    assert [set(answer) for answer in json.loads(out)["answers"]] == [{"base", "anna", "ben"}]
    code, out, err = flexp("predict", folders[0], "happy film", "--json")
    assert code == 0, err
    assert set(json.loads(out)["predictions"][0]) == {"text", "base", "adapter"}
    code, out, _ = flexp("chat", *folders, "--prompt", "happy film", "--tokens", "4")
    assert code == 0
    assert "base" in out
    assert "ben" in out


def test_merged_weights_say_what_the_adapter_says(
    flexp: Flexp, adapters: list[Path], tiny_lm: Path, tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    code, text, err = flexp("export", str(adapters[0]), str(out), "--merged", "--json")
    assert code == 0, err
    assert "model.safetensors" in json.loads(text)["files"]
    load: Any = hf.AutoModelForCausalLM.from_pretrained
    ids = torch.tensor([[3, 9, 5, 11]])
    with torch.no_grad():
        merged = load(out, dtype=torch.float32)(input_ids=ids).logits
        plain = load(tiny_lm, dtype=torch.float32)
        before = plain(input_ids=ids).logits
        worn = export.open_with_peft(plain, adapters[0])(input_ids=ids).logits
    torch.testing.assert_close(merged, worn, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(merged, before, atol=1e-4)


def test_a_copied_adapter_opens_like_the_first(
    flexp: Flexp, adapters: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "copy"
    assert flexp("export", str(adapters[1]), str(out))[0] == 0
    for name in ("adapter_model.safetensors", "adapter_config.json", "flexp.json"):
        assert (out / name).read_bytes() == (adapters[1] / name).read_bytes()


def test_what_cannot_be_opened_or_written_is_said(
    flexp: Flexp, adapters: list[Path], recipe_of: Recipe, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    code, _, err = flexp("export", str(adapters[0]), str(tmp_path / "full"))
    assert (code, "is there already" in err) == (2, True)
    assert (tmp_path / "full" / "file").read_text() == "mine"
    code, _, err = flexp("chat", str(adapters[0]), "--prompt", "day", "--frame", "no place")
    assert (code, "{text}" in err) == (2, True)
    code, _, err = flexp("chat", str(adapters[0]), str(adapters[0]), "--prompt", "day")
    assert (code, "same name" in err) == (2, True)
    code, _, err = flexp("chat", str(tmp_path / "nobody"), "--prompt", "day")
    assert (code, "not an adapter" in err) == (2, True)
    code, out, _ = flexp("run", str(recipe_of(name="labels", rounds=1)), "--json")
    code, _, err = flexp("chat", json.loads(out)["adapters"][0], "--prompt", "day")
    assert (code, "see predict" in err) == (2, True)
