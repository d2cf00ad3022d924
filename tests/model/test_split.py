"""Split = monolith, bit for bit: outputs, gradients, and parameters after ten AdamW steps."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from agreement import Known, agree, trained
from toys import (
    CLASSES,
    FAMILIES,
    H,
    V,
    at_desk,
    backbone,
    batches_for,
    cuts,
    same,
    whole,
    wrap,
)

from flexp.dice import Dice
from flexp.errors import ModelError
from flexp.model.adapter import Dense, Head, Ia3, Kind, Lora, Prompt
from flexp.model.backbone import Backbone
from flexp.model.cut import Labels, Seat
from flexp.parcel import Parcel
from flexp.tensors import Term, total

SEED = 20260
BERT: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "num_labels": CLASSES,
}


def cover(family: str, depth: int) -> list[tuple[Seat, str]]:
    """A few seats and padding sides of which every pair of values occurs over the families."""
    forms: list[Labels] = ["keep", "keep", "logits", "loss"]
    stream = random.Random(f"{SEED}-{family}")
    seats = [stream.choice(cuts(depth, form)) for form in forms]
    sides = ["right", "left"] * 2
    stream.shuffle(sides)
    return list(zip(seats, sides, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.daily("llama", "gemma3", "gpt2", "bert-cls", "modernbert-cls", "vit")
def test_a_cut_model_trains_like_the_whole_one(family: str) -> None:
    body, known = backbone(family), Known()
    for seat, side in cover(family, body.depth):
        agree(body, seat, side, known)


@pytest.mark.families
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_at_every_cut(family: str) -> None:
    body, known = backbone(family), Known()
    forms: tuple[Labels, ...] = ("keep", "logits", "loss")
    for form in forms:
        for seat in cuts(body.depth, form):
            for side in ("right", "left"):
                agree(body, seat, side, known)


def drawn(seed: int, wanted: int) -> list[tuple[str, Any, Any]]:
    """Further families of the installed library with a list of blocks, drawn by seed."""
    sizes: dict[str, Any] = {
        "vocab_size": V,
        "hidden_size": H,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    known = {name.removesuffix("-cls").removesuffix("-tied").replace("-", "_") for name in FAMILIES}
    mapping: Any = hf.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    choices = sorted(((c.model_type, c, mapping[c]) for c in mapping), key=lambda one: one[0])
    random.Random(seed).shuffle(choices)
    out: list[tuple[str, Any, Any]] = []
    for name, config_class, model_class in choices:
        if len(out) == wanted:
            break
        if name in known or isinstance(model_class, tuple):
            continue
        try:
            config = config_class(**sizes)
            if sum(p.numel() for p in _meta(model_class, config).parameters()) > 400_000:
                continue
            wrap(model_class, config)
        except Exception:
            continue  # not buildable from these sizes, or refused with a reason
        out.append((name, model_class, config))
    return out


def _meta(model_class: Any, config: Any) -> Any:
    with torch.device("meta"):
        return model_class(config)


@pytest.mark.families
@pytest.mark.filterwarnings("ignore")
def test_three_further_families_drawn_at_random(
    record_property: Callable[[str, object], None],
) -> None:
    found = drawn(SEED, 3)
    record_property(f"families drawn by seed {SEED}", ", ".join(name for name, *_ in found))
    assert len(found) == 3
    for _, model_class, config in found:
        body, known = wrap(model_class, config), Known()
        for seat in cuts(body.depth):
            for side in ("right", "left"):
                agree(body, seat, side, known)


KINDS: dict[str, Kind] = {
    "dora": Lora(rank=3, alpha=6.0, dora=True),
    "all linear": Lora(rank=2, alpha=6.0, targets=("query", "key", "value", "dense")),
    "ia3": Ia3(),
    "prompt": Prompt(tokens=3),
    "head": Head(),
    "dense": Dense(
        ("bert.encoder.layer.1.output.dense", "bert.encoder.layer.3.attention.output.LayerNorm")
    ),
    "dense by name": Dense(("query", "output.dense")),
    "all linear maps in full": Dense(),
    "dropout": Lora(rank=3, alpha=6.0, dropout=0.3),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_adapter_is_cut_alike(name: str) -> None:
    body = backbone("bert-cls")
    for seat in (cuts(4)[1], cuts(4, "logits")[1]):
        logits, first, after = trained(body, seat, kind=KINDS[name])
        logits_w, first_w, after_w = trained(body, whole(4), kind=KINDS[name])
        assert torch.equal(logits, logits_w)
        assert same(first, first_w)
        assert same(after, after_w)


def test_training_moves_every_tensor() -> None:
    body = backbone("bert-cls")
    with at_desk(body, cuts(4)[1]) as (desk, _):
        before = desk.whole("personal")
        desk.fit(batches=iter(batches_for(body, 3)))
        after = desk.whole("personal")
    assert [k for k in before if torch.equal(before[k], after[k])] == []


def test_gradient_agrees_with_a_finite_difference() -> None:
    config = hf.BertConfig(**BERT, num_hidden_layers=4)
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        model = hf.BertForSequenceClassification(config).double()
    body = Backbone(model, task="classification")
    batch = batches_for(body, 1)[0]
    begun = body.initial(Lora(rank=3, alpha=6.0), Dice(1))
    offer = Parcel({"personal": {k: v.double() + 0.01 for k, v in begun.items()}})
    with at_desk(body, cuts(4)[2], offer=offer) as (desk, _):
        desk.grad(desk.model.loss(batch), ["personal"], ["g"])
        slope = total(desk.dot("g", "g"))
        values: list[float] = []
        for step in (1e-5, -1e-5):
            desk.assign("moved", (Term("personal"), Term("g", step)))
            with torch.no_grad():
                values.append(float(desk.model.loss(batch, "moved")))
    measured = (values[0] - values[1]) / 2e-5
    assert measured == pytest.approx(slope, rel=1e-6)


def test_encoder_decoders_are_refused_with_a_reason() -> None:
    config = hf.T5Config(vocab_size=V, d_model=H, d_kv=8, d_ff=48, num_layers=2, num_heads=2)
    with pytest.raises(ModelError, match="encoder-decoder"):
        Backbone(hf.T5ForConditionalGeneration(config), task="causal-lm")


def test_models_without_a_block_list_are_refused() -> None:
    config = hf.BertConfig(**BERT, num_hidden_layers=1)
    with pytest.raises(ModelError, match="blocks_at"):
        Backbone(hf.BertForSequenceClassification(config), task="classification")


def test_the_block_list_can_be_named() -> None:
    config = hf.BertConfig(**BERT, num_hidden_layers=2)
    model = hf.BertForSequenceClassification(config)
    named = Backbone(model, task="classification", blocks_at="bert.encoder.layer")
    assert (named.depth, named.width) == (2, H)
    with pytest.raises(ModelError, match="no module"):
        Backbone(model, task="classification", blocks_at="bert.decoder")
