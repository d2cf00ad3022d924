"""Tiny models of many families, toy data, and one client or a few at work on any cut."""

from __future__ import annotations

import random
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional

from flexp.client.desk import Desk, Training
from flexp.data.examples import Batch, Examples, Shard
from flexp.data.loss import chunked_loss
from flexp.dice import Dice
from flexp.engine.base import Arrival, Assignment, assigned
from flexp.engine.flow import Flow, Pace
from flexp.engine.local import LocalEngine
from flexp.evaluate import pooled
from flexp.link.metered import Ledger
from flexp.link.wire import Wire
from flexp.model import vision
from flexp.model.adapter import Dense, Kind, Lora
from flexp.model.backbone import Backbone
from flexp.model.cut import Cut, Labels, Seat, uncut
from flexp.model.ops import Optim, SlotSpec
from flexp.model.skeleton import TaskKind, image_shape
from flexp.model.targets import EVERY
from flexp.parcel import Parcel
from flexp.rounds import flow_of, waves_of
from flexp.strategies.base import Scene, Strategy, Turn
from flexp.strategies.local import Local
from flexp.tensors import Tensors

V, H, LENGTH, CLASSES = 67, 32, 9, 3


@dataclass(frozen=True)
class ToyTask:
    """Classification or next-token loss on ready-made ids."""

    name: str = "classification"
    metric: str = "accuracy"
    higher_is_better: bool = True
    rows_at_once: int = 64
    side: str = "right"

    def encode(self, rows: Any) -> Examples:
        raise AssertionError("toy data is encoded already")

    def collate(self, examples: Examples, indices: Sequence[int]) -> Batch:
        ids = torch.tensor([examples.ids[i] for i in indices])
        labels: Any = [examples.labels[i] for i in indices]
        mask = torch.ones_like(ids)
        for row, i in enumerate(indices):
            cut = i % 3  # every third row is full
            if cut:
                where = slice(0, cut) if self.side == "left" else slice(-cut, None)
                mask[row, where], ids[row, where] = 0, 0
        wanted = torch.tensor(labels)
        if self.name == "causal-lm":
            wanted = torch.where(mask.bool(), ids, -100)
        return Batch({"input_ids": ids, "attention_mask": mask}, wanted)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.name == "causal-lm":
            flat = logits[:, :-1].flatten(0, 1)
            return functional.cross_entropy(flat, labels[:, 1:].flatten(), ignore_index=-100)
        return functional.cross_entropy(logits, labels)

    def fused(self, hidden: Tensor, output: nn.Linear, labels: Tensor) -> Tensor:
        flat, targets = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return chunked_loss(flat[targets != -100], output, targets[targets != -100])

    def measure(self, logits: Tensor, labels: Tensor) -> dict[str, tuple[float, float]]:
        right = float((logits.argmax(-1) == labels).sum())
        return {"accuracy": (right, float(len(labels)))}

    def finish(self, sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
        return {k: v / n for k, (v, n) in sums.items() if n}


def examples(seed: int, n: int, classes: int = CLASSES) -> Examples:
    stream = random.Random(seed)
    ids = tuple(tuple(stream.randrange(3, V) for _ in range(LENGTH)) for _ in range(n))
    labels = tuple(stream.randrange(classes) for _ in range(n))
    return Examples(ids, labels, tuple(f"toy-{seed}:{i}" for i in range(n)))


def shard(seed: int, rows: int = 12) -> Shard:
    return Shard(examples(3 * seed, rows), examples(3 * seed + 1, 6), examples(3 * seed + 2, 6))


# ---- families

COMMON: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2: dict[str, Any] = {
    "vocab_size": V,
    "n_embd": H,
    "n_head": 2,
    "n_positions": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IMAGE: dict[str, Any] = {
    "hidden_size": H,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
IMAGE_SIZE: dict[str, Any] = {"image_size": 16}  # the config's class names no such field


def _families(depth: int) -> dict[str, tuple[Any, Any]]:
    n: dict[str, Any] = {"num_hidden_layers": depth}
    labels: dict[str, Any] = {"num_labels": CLASSES}
    kv: dict[str, Any] = {"num_key_value_heads": 1}
    cls = {**COMMON, **n, **labels}
    return {
        "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**COMMON, **n, **kv)),
        "llama-tied": (
            hf.LlamaForCausalLM,
            hf.LlamaConfig(**COMMON, **n, **kv, tie_word_embeddings=True),
        ),
        "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config(**COMMON, **n, **kv)),
        "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config(**COMMON, **n, **kv, head_dim=8)),
        "gemma3": (
            hf.Gemma3ForCausalLM,
            hf.Gemma3TextConfig(**COMMON, **n, **kv, head_dim=8, sliding_window=4),
        ),
        "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config(**GPT2, n_layer=depth)),
        "opt": (
            hf.OPTForCausalLM,
            hf.OPTConfig(
                **{k: v for k, v in COMMON.items() if k != "intermediate_size"},
                **n,
                ffn_dim=48,
                word_embed_proj_dim=H,
            ),
        ),
        "gpt-neox": (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig(**COMMON, **n)),
        "phi3": (hf.Phi3ForCausalLM, hf.Phi3Config(**COMMON, **n)),
        "bert-cls": (hf.BertForSequenceClassification, hf.BertConfig(**cls)),
        "roberta-cls": (hf.RobertaForSequenceClassification, hf.RobertaConfig(**cls)),
        "distilbert-cls": (
            hf.DistilBertForSequenceClassification,
            hf.DistilBertConfig(
                vocab_size=V,
                dim=H,
                hidden_dim=48,
                n_layers=depth,
                n_heads=2,
                max_position_embeddings=32,
                **labels,
                pad_token_id=0,
            ),
        ),
        "modernbert-cls": (
            hf.ModernBertForSequenceClassification,
            hf.ModernBertConfig(**cls, cls_token_id=1, sep_token_id=2),
        ),
        "llama-cls": (hf.LlamaForSequenceClassification, hf.LlamaConfig(**cls, **kv)),
        "gpt2-cls": (
            hf.GPT2ForSequenceClassification,
            hf.GPT2Config(**GPT2, n_layer=depth, **labels),
        ),
        "vit": (
            hf.ViTForImageClassification,
            hf.ViTConfig(**IMAGE, **n, **labels),
        ),
        "cnn": _blocks(channels=[4, 6, 8][: depth - 1], kernel=3, image_size=30, **labels),
        "resnet": _blocks(
            channels=[8, 16, 24, 32][: depth - 1], residual=True, image_size=16, **labels
        ),
        "resnet-norms": (
            hf.ResNetForImageClassification,
            hf.ResNetConfig(
                embedding_size=8,
                hidden_sizes=[8, 16, 24, 32][:depth],
                depths=[1] * depth,
                layer_type="basic",
                **IMAGE_SIZE,
                **labels,
            ),
        ),
        "dinov2": (
            hf.Dinov2ForImageClassification,
            hf.Dinov2Config(
                **{k: v for k, v in IMAGE.items() if k != "intermediate_size"},
                **n,
                **labels,
            ),
        ),
    }


def _blocks(**config: Any) -> tuple[Any, Any]:
    """One of our own models of images; a class is known by its config."""
    vision.register()
    made = hf.AutoConfig.for_model(vision.KIND, **config)
    return hf.AutoModelForImageClassification.from_config, made


CONVOLUTIONS = ("cnn", "resnet", "resnet-norms")
FAMILIES = tuple(family for family in _families(4) if family not in CONVOLUTIONS)


def kind_for(body: Backbone) -> Kind:
    """LoRA, or all in full where blocks are convolutions."""
    convolves = body.states is not None and len(body.states.shapes[0]) == 3
    return Dense((EVERY,)) if convolves else Lora(rank=3, alpha=6.0)


def task_of(model: Any) -> TaskKind:
    if model.main_input_name == "pixel_values":
        return "images"
    return "causal-lm" if "SequenceClass" not in type(model).__name__ else "classification"


def backbone(family: str = "bert-cls", depth: int = 4) -> Backbone:
    """A tiny random model, the same for the same arguments."""
    made, config = _families(depth)[family]
    return wrap(made, config)


def wrap(made: Any, config: Any) -> Backbone:
    model = drawn_once(made, config)
    return Backbone(model, task=task_of(model))


def model_of(family: str, depth: int = 4) -> Any:
    """The plain model that ``backbone`` wraps."""
    return drawn_once(*_families(depth)[family])


def drawn_once(made: Any, config: Any) -> Any:
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        return made(config)


def batches_for(body: Backbone, n: int, side: str = "right") -> list[Batch]:
    """Ready batches for any task, padded at either side."""
    if body.task == "images":
        stream, shape = torch.Generator().manual_seed(5), image_shape(body.config)
        return [
            Batch(
                {"pixel_values": torch.randn(3, *shape, generator=stream)},
                torch.tensor([0, 1, 2]),
            )
            for _ in range(n)
        ]
    task = toy_task(body, side)
    data = examples(1, 3 * n)
    return [task.collate(data, [3 * i, 3 * i + 1, 3 * i + 2]) for i in range(n)]


def toy_task(body: Backbone, side: str = "right") -> ToyTask:
    return ToyTask("causal-lm" if body.task == "causal-lm" else "classification", side=side)


# ---- one client


@contextmanager
def at_desk(
    body: Backbone,
    seat: Seat,
    *,
    kind: Kind | None = None,
    optim: Optim | None = None,
    slots: Mapping[str, SlotSpec] | None = None,
    offer: Parcel | None = None,
    task: ToyTask | None = None,
    keep_crossings: bool = False,
    cache: int = 0,
) -> Generator[tuple[Desk, Ledger]]:
    """A desk on that seat, with a server behind it, whatever the cut."""
    strategy = Local()
    if slots is not None:
        strategy = type("Toy", (Local,), {"slots": dict(slots)})()
    engine = LocalEngine(
        body,
        task or toy_task(body),
        {"me": shard(1)},
        kind=kind or kind_for(body),
        training=Training(optim or Optim(lr=1e-2), batch=4, cache=cache),
        dice=Dice(3),
        profile="open",
        keep_crossings=keep_crossings,
    )
    turn = Turn(0, 1, 0, True, {"me": seat}, {}, body.block_of, body.depth)
    ledger = Ledger(crossings=[] if keep_crossings else None)
    try:
        with engine.visit(strategy, Assignment("me", seat, offer or Parcel()), turn, ledger) as (
            desk,
            _,
        ):
            yield desk, ledger
    finally:
        engine.close()


def everywhere(desk: Desk, slot: str) -> Tensors:
    """A slot's tensors from both sides, by name."""
    return desk.whole(slot)


def cuts(depth: int, form: Labels = "keep") -> list[Seat]:
    """Every legal seat of a model of that depth that needs a server."""
    if form != "keep":
        return [Seat(Cut(a), form) for a in range(1, depth + 1)]
    return [
        Seat(Cut(a, b)) for a in range(1, depth + 1) for b in range(depth - a + 1) if a + b < depth
    ]


# ---- a few clients


@dataclass
class Played:
    """What a toy run left behind."""

    adapters: dict[str, Tensors]
    arrivals: list[Arrival]
    state: Any
    engine: LocalEngine
    order: list[str]


def play(
    strategy: Strategy[Any],
    seats: Sequence[Seat] | Seat,
    *,
    rounds: int = 2,
    family: str = "bert-cls",
    kind: Kind | None = None,
    training: Training | None = None,
    seeds: Sequence[int] = (1, 2, 3),
    order: Sequence[int] | None = None,
    profile: Any = "u-shape",
    keep_crossings: bool = False,
    wrap: Any = None,
    rows: int = 12,
    shards: Mapping[str, Shard] | None = None,
    measures: bool = False,
    moves: Mapping[int, Seat | Sequence[Seat]] | None = None,
    paces: Mapping[str, float] | None = None,
    recorded: Sequence[str] | None = None,
    body: Backbone | None = None,
    task: ToyTask | None = None,
    wires: Mapping[str, Wire] | None = None,
) -> Played:
    """A toy run of a few clients; each one's personal adapter at the end.

    ``moves``: other seats from a round on. ``paces`` are seconds of a step, for methods without
    barrier; all their arrivals are given.
    """
    body = body or backbone(family)
    drawn = {f"c{n}": shard(seed, rows) for n, seed in enumerate(seeds)}
    shards = drawn if shards is None else shards
    names = list(shards)
    given = [seats] * len(names) if isinstance(seats, Seat) else list(seats)
    placed = dict(zip(names, given, strict=True))
    more = {} if wrap is None else {"wrap": wrap}
    central = strategy.kind == "centralised"
    engine = LocalEngine(
        body,
        task or toy_task(body),
        shards,
        pool=pooled(shards, None, "train") if central else None,
        kind=kind or kind_for(body),
        training=training or Training(Optim(lr=1e-2), batch=4, steps=3, clip_norm=0.5),
        dice=Dice(0),
        profile=profile,
        keep_crossings=keep_crossings,
        wires=wires,
        **more,
    )
    engine.measures = measures
    try:
        dice, sizes = Dice(0)("strategy"), body.sizes
        scene = Scene(tuple(names), placed, engine.initial, dice, sizes)
        state, arrivals = strategy.start(scene), list[Arrival]()
        chosen = tuple(names[n] for n in order) if order else tuple(names)
        places, begun = (body.block_of, body.depth), list[Turn]()
        for r in range(rounds):
            if there := (moves or {}).get(r):
                given = [there] * len(names) if isinstance(there, Seat) else list(there)
                placed = dict(zip(names, given, strict=True))
            begun.append(Turn(r, rounds, 0, True, placed, {}, *places, chosen))
        flow = Flow({c: Pace((paces or {}).get(c, 1.0)) for c in names}, recorded)
        if not strategy.barrier:
            for _, found, merged in flow_of(strategy, engine, state, begun, flow):
                state = merged
                arrivals += found
        for turn in begun if strategy.barrier else ():
            arrivals.clear()
            dice = Dice(0)("waves", round=turn.round)
            for _, found, merged in waves_of(strategy, engine, state, turn, dice):
                state = merged
                arrivals += found
        adapters = personal(strategy, state, engine, placed, rounds)
        return Played(adapters, arrivals, state, engine, flow.order)
    finally:
        engine.close()


def personal(
    strategy: Strategy[Any],
    state: Any,
    engine: LocalEngine,
    placed: Mapping[str, Seat],
    rounds: int,
) -> dict[str, Tensors]:
    """Every client's personal adapter, near and far together."""
    body, out = engine.backbone, dict[str, Tensors]()
    turn = Turn(rounds, rounds, 0, True, placed, {}, body.block_of, body.depth)
    for client in placed:
        work = assigned(strategy, engine, state, client, turn)
        with engine.visit(strategy, work, turn, Ledger()) as (desk, offer):
            adapter = strategy.personal(desk, offer).adapter
            if adapter is not None:
                out[client] = desk.whole(adapter)
    return out


def whole(depth: int = 4) -> Seat:
    return uncut(depth)


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two adapters are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def gap(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The largest difference of any entry."""
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())[:3]
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)
