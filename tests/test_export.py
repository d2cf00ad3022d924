"""An adapter trained on a cut opens with plain PEFT, in a fresh process, with equal logits."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toys import at_desk, backbone, batches_for, cuts, same, toy_task

from flexp import assets, export, recipe_file, run, stage
from flexp.engine.base import Assignment
from flexp.events import Stream
from flexp.link.metered import Ledger
from flexp.model.adapter import Dense, Head, Ia3, Kind, Lora, Prompt

Recipe = Callable[..., Path]

PLAIN_PEFT = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification as Auto
from peft import PeftModel
base, folder, ids, mask, classes = json.loads(sys.argv[1])
model = PeftModel.from_pretrained(Auto.from_pretrained(base, num_labels=classes), folder).eval()
with torch.no_grad():
    logits = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits
assert not any(name.startswith("flexp") for name in sys.modules)
print(json.dumps(logits.tolist()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dense"])
def test_a_split_trained_adapter_opens_with_plain_peft(
    kind: str, recipe_of: Recipe, tmp_path: Path
) -> None:
    recipe = recipe_file.read(recipe_of(rounds=2, adapter__kind=kind), [])
    ready = stage.prepare(recipe, assets.Cache(tmp_path / "no-assets"))
    result = run.run(ready, Stream())
    written = run.save_adapters(result, tmp_path / "adapters")
    batch = ready.federation.task.collate(ready.federation.shards["anna"].test, [0, 1, 2])
    offer = ready.strategy.offer(result.state, "anna", result.turn)
    work = Assignment("anna", ready.seats["anna"], offer)
    visit = ready.engine.visit(ready.strategy, work, result.turn, Ledger())
    with visit as (desk, _), torch.no_grad():
        mine = desk.model.logits(batch)
    ready.engine.close()
    folder = next(path for path in written if path.name == "anna")
    args = [
        str(ready.survey.source),
        str(folder),
        batch.inputs["input_ids"].tolist(),
        batch.inputs["attention_mask"].tolist(),
        2,
    ]
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_PEFT, json.dumps(args)],
        capture_output=True,
        text=True,
        check=True,
        env={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""},
    )
    theirs = torch.tensor(json.loads(done.stdout))
    assert torch.equal(mine, theirs)
    assert not torch.equal(mine, torch.zeros_like(mine))


KINDS: dict[str, tuple[str, Kind]] = {
    "lora": ("bert-cls", Lora(rank=3, alpha=6.0)),
    "dora": ("bert-cls", Lora(rank=3, alpha=6.0, dora=True)),
    "ia3": ("bert-cls", Ia3()),
    "head": ("bert-cls", Head()),
    "dense": ("bert-cls", Dense(("bert.encoder.layer.1.output.dense",))),
    "dense block": ("bert-cls", Dense(("bert.encoder.layer.1",))),
    "dense by name": ("bert-cls", Dense(("query", "output.dense"))),
    "all in full": ("bert-cls", Dense()),
    "all in full, conv1d": ("gpt2-cls", Dense()),
    "all in full, tied": ("llama-tied", Dense()),
    "all in full, images": ("vit", Dense()),
    "conv1d": ("gpt2-cls", Lora(rank=3, alpha=6.0)),
    "language model": ("llama", Lora(rank=3, alpha=6.0)),
    "prompt": ("llama", Prompt(tokens=3)),
    "roberta head": ("roberta-cls", Lora(rank=3, alpha=6.0)),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_what_peft_makes_of_it(name: str, tmp_path: Path) -> None:
    family, kind = KINDS[name]
    body = backbone(family)
    batches = batches_for(body, 3)
    task = toy_task(body)
    with at_desk(body, cuts(4)[1], kind=kind, task=task) as (desk, _):
        desk.fit(batches=iter(batches))
        adapter = desk.whole("personal")
        with torch.no_grad():
            mine = desk.model.logits(batches[0])
    card = export.Card("tiny", body.task)
    export.write(tmp_path / "a", adapter, body, kind, card)
    plain: Any = backbone(family).model
    for module in plain.modules():
        module.__dict__.pop("forward", None)  # the class as it came
    with torch.no_grad():
        base = plain(**batches[0].inputs).logits
        worn: Any = export.open_with_peft(plain, tmp_path / "a")
        theirs = worn(**batches[0].inputs).logits
        with worn.disable_adapter():  # the pretrained weights are still there
            assert torch.equal(worn(**batches[0].inputs).logits, base)
    if name == "prompt":
        theirs = theirs[:, 3:]
    assert torch.equal(mine, theirs), float((mine - theirs).abs().max())
    assert same(load_file(tmp_path / "a" / "adapter_model.safetensors"), adapter)
    saved = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == "tiny"
