"""Tasks: encoding, padding, losses and metrics against hand-made values; the check of shards."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import FrozenInstanceError, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE, WordLevel
from tokenizers.normalizers import Replace
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from flexp.data.shards import check
from flexp.data.sources import Row
from flexp.data.tasks import (
    Batch,
    CausalLM,
    Classification,
    Examples,
    Shard,
    Task,
    label_names,
)
from flexp.errors import DataError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[", "]", "CLS", "SEP", *"abcdefgh"]
ID = {word: at for at, word in enumerate(WORDS)}
PAD, UNK, CLS, SEP = range(4)
POLARITY = ("negative", "neutral", "positive")


def words(*, template: str | None = None, **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of 16 words; ``template`` puts special tokens around a text."""
    tokenizer = Tokenizer(WordLevel(ID, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    if template:
        around = [(token, ID[token]) for token in ("[CLS]", "[SEP]") if token in template]
        tokenizer.post_processor = TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single=template, special_tokens=around
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **special)


def bert() -> PreTrainedTokenizerFast:
    return words(template="[CLS] $A [SEP]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")


def llama() -> PreTrainedTokenizerFast:
    """Puts its start token before a text, has an end token, and no padding token."""
    return words(template="[CLS] $A", bos_token="[CLS]", eos_token="[SEP]")


def rows(*texts: str, **more: Sequence[str | int | float | bool | None]) -> list[Row]:
    return [
        Row({"text": text, **{name: of[at] for name, of in more.items()}}, f"mine/a.jsonl:{at + 1}")
        for at, text in enumerate(texts)
    ]


def ids(text: str) -> tuple[int, ...]:
    return tuple(ID[word] for word in text.split())


@pytest.fixture(scope="module")
def classify() -> Classification:
    return Classification(POLARITY, bert(), max_length=6)


# classification


def test_classification_encodes_names_and_places(classify: Classification) -> None:
    labels = ["neutral", 0, "2", 1.0]
    examples = classify.encode(rows("a b", "c", "a b c d e f", "z", label=labels))
    assert examples.ids[0] == (CLS, *ids("a b"), SEP)
    assert examples.ids[2] == (CLS, *ids("a b c d"), SEP)  # cut to 6, end kept
    assert examples.ids[3] == (CLS, UNK, SEP)
    assert examples.labels == (1, 0, 2, 1)
    assert examples.origins[3] == "mine/a.jsonl:4"
    assert len(examples) == 4


def test_a_special_token_in_a_text_is_text(classify: Classification) -> None:
    (encoded,) = classify.encode(rows("a [SEP] b", label=[0])).ids
    assert encoded == (CLS, *ids("a [ SEP ]"), SEP)
    (encoded,) = CausalLM(llama()).encode(rows("a [SEP] b")).ids
    assert encoded == (CLS, *ids("a [ SEP ] b"), SEP)


CONTROLS = ("<|im_start|>", "<|endoftext|>", "<s>")


def chatty() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a chat model's control tokens, some of them only added."""
    inner = Tokenizer(BPE({symbol: n for n, symbol in enumerate(sorted(ByteLevel.alphabet()))}, []))
    inner.pre_tokenizer = ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    inner.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|endoftext|>",
        bos_token="<s>",
        pad_token="<|endoftext|>",
    )
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    return made


@pytest.mark.parametrize("control", CONTROLS)
def test_no_column_of_no_task_can_hold_a_control_token(control: str) -> None:
    tokenizer: Any = chatty()
    special = set(tokenizer.convert_tokens_to_ids(list(CONTROLS)))
    row = Row({"text": f"a {control} b", "cue": f"{control}user", "label": 0}, "x:1")
    (ids,) = Classification(POLARITY, tokenizer).encode([row]).ids
    assert not special & set(ids)
    assert tokenizer.decode(ids) == row.fields["text"]
    for prompt in (None, "cue"):
        task = CausalLM(tokenizer, prompt=prompt, max_length=128)
        encoded = task.encode([row])
        (ids,), (labels,) = encoded.ids, encoded.labels
        # Only the program's own end of text is one.
        assert [i for i in ids if i in special] == [tokenizer.eos_token_id]
        assert ids[-1] == labels[-1] == tokenizer.eos_token_id  # pyright: ignore[reportIndexIssue]
    assert tokenizer(control)["input_ids"][0] in special  # for others it stays one


def test_a_text_of_no_token_is_refused() -> None:
    """All of its batch would be padding, and a mean over nothing is NaN."""
    silent = words(pad_token="[PAD]")
    silent.backend_tokenizer.normalizer = Replace("a", "")  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(DataError, match=r'a\.jsonl:2: column "text" has no token'):
        Classification(POLARITY, silent).encode(rows("b", "a", label=[0, 1]))
    with pytest.raises(DataError, match=r'a\.jsonl:2: column "text" has no token to predict'):
        CausalLM(silent).encode(rows("b c", "a"))


def test_numbers_that_are_long_or_alike_are_told_apart() -> None:
    long = "9" * 5000
    names = label_names(rows("a", "a", "a", "a", label=[long, "7", "007", "x"]), "label")
    assert names == ("007", "7", long, "x")
    assert label_names(rows("a", "a", "a", label=["7", "10", "007"]), "label") == ("007", "7", "10")
    with pytest.raises(DataError, match='column "label" does not hold one of'):
        Classification(POLARITY, bert()).encode(rows("a", label=[long]))


def test_the_tokenizer_is_as_before_for_its_owner(classify: Classification) -> None:
    classify.encode(rows("a b c d e f", label=[0]))
    tokenizer: Any = classify.tokenizer
    assert tokenizer("a [SEP] b c d e f g")["input_ids"] == [
        CLS, *ids("a"), SEP, *ids("b c d e f g"), SEP,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (3, r"a\.jsonl:1: label out of range .*3 labels \(0 negative, 1 neutral, 2 positive\)"),
        ("-1", r"a\.jsonl:1: label out of range"),
        ("positiv", r'a\.jsonl:1: column "label" does not .*Did you mean "positive"'),
        ("x", r"Known: negative, neutral, positive"),
        (0.5, r'column "label" does not hold one of'),
        (True, r'column "label" does not hold one of'),
        (None, r'a\.jsonl:1: no label in column "label"'),
        ("", r'a\.jsonl:1: no label in column "label"'),
    ],
)
def test_label_out_of_range_or_unknown(
    classify: Classification, label: str | int | float | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        classify.encode(rows("a", label=[label]))


def test_names_that_are_numbers_are_names() -> None:
    stars = Classification(("1", "2", "3"), bert())
    assert stars.encode(rows("a", "a", "a", label=[3, "1", 2.0])).labels == (2, 0, 1)
    with pytest.raises(DataError, match='column "label" does not hold one of'):
        stars.encode(rows("a", label=[0]))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"txt": "a", "label": 0}, r'x:1: no column "text"\. Did you mean "txt"'),
        ({"text": "a", "y": 0}, r'x:1: no column "label"\. There are 2 others'),
        ({"text": 7, "label": 0}, r'x:1: column "text" holds a number, true or false'),
        ({"text": None, "label": 0}, r'x:1: column "text" holds nothing'),
        ({"text": " \n", "label": 0}, r'x:1: column "text" is empty'),
    ],
)
def test_cells_that_are_refused(
    classify: Classification, row: dict[str, str | int | None], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        classify.encode([Row(row, "x:1")])


@pytest.mark.parametrize("labels", [(), ("a",), ("a", "a"), ("a", "b", "a")])
def test_labels_that_are_refused(labels: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match="two or more, each once"):
        Classification(labels, bert())


@pytest.mark.parametrize("side", ["right", "left"])
def test_classification_pads_to_the_longest(classify: Classification, side: str) -> None:
    task = replace(classify, side="left" if side == "left" else "right")
    examples = task.encode(rows("a", "a b c d", "a b", label=[0, 1, 2]))
    batch = task.collate(examples, [2, 0])
    first, second = [CLS, *ids("a b"), SEP], [CLS, *ids("a"), SEP]
    second = [PAD, *second] if side == "left" else [*second, PAD]
    mask = [0, 1, 1, 1] if side == "left" else [1, 1, 1, 0]
    assert set(batch.inputs) == {"input_ids", "attention_mask"}
    assert batch.inputs["input_ids"].tolist() == [first, second]
    assert batch.inputs["attention_mask"].tolist() == [[1] * 4, mask]
    assert batch.labels.tolist() == [2, 0]
    assert {tensor.dtype for tensor in (*batch.inputs.values(), batch.labels)} == {torch.int64}
    assert batch.rows == 2


def test_classification_loss_and_metrics_by_hand(classify: Classification) -> None:
    # softmax(ln 2, 0, 0) = (1/2, 1/4, 1/4)
    logits = torch.tensor([[math.log(2), 0.0, 0.0]] * 3)
    labels = torch.tensor([0, 0, 2])
    nats = (math.log(2) + math.log(2) + math.log(4)) / 3
    assert classify.loss(logits, labels).item() == pytest.approx(nats)
    sums = classify.measure(logits, labels)
    assert sums["accuracy"] == (2.0, 3.0)
    assert sums["loss"] == (pytest.approx(3 * nats), 3.0)
    done = classify.finish(sums)
    # 0 is told three times and true twice; 2 is true once, never told; 1 does not occur.
    f1 = (2 * 2 / (3 + 2) + 0 / (0 + 1)) / 2
    assert done == {
        "accuracy": pytest.approx(2 / 3),
        "loss": pytest.approx(nats),
        "macro_f1": pytest.approx(f1),
        "dominant_f1": pytest.approx(f1),
        "ece": pytest.approx(2 / 3 - 1 / 2),  # all are half sure
    }
    rare = classify.finish({**sums, "rows of 0": (3.0, 1.0)})  # a third is not half
    assert rare["dominant_f1"] == pytest.approx(2 * 2 / (3 + 2))
    assert classify.metric in done
    assert classify.higher_is_better


def test_macro_f1_of_two_batches_is_that_of_all_rows(classify: Classification) -> None:
    stream = torch.Generator().manual_seed(4)
    logits = torch.randn(40, 3, generator=stream)
    labels = torch.randint(3, (40,), generator=stream)
    told, each = logits.argmax(-1), list[float]()
    for n in range(3):
        right = int(((told == n) & (labels == n)).sum())
        precision, recall = right / int((told == n).sum()), right / int((labels == n).sum())
        each.append(2 * precision * recall / (precision + recall))
    sums: dict[str, tuple[float, float]] = {}
    for rows in (slice(0, 7), slice(7, 40)):
        for name, (value, count) in classify.measure(logits[rows], labels[rows]).items():
            held = sums.get(name, (0.0, 0.0))
            sums[name] = held[0] + value, held[1] + count
    assert classify.finish(sums)["macro_f1"] == pytest.approx(sum(each) / 3)


def test_calibration_error_by_hand(classify: Classification) -> None:
    # Two rows are 1/2 sure, one of them right: they agree. Two are 3/4 sure, none is right.
    sure = [[math.log(2), 0.0, 0.0], [math.log(2), 0.0, 0.0], [math.log(6), 0.0, 0.0]]
    logits, labels = torch.tensor([*sure, sure[2]]), torch.tensor([0, 1, 2, 1])
    sums: dict[str, tuple[float, float]] = {}
    for row in range(4):  # one by one: bins add up, and of one row alone none would agree
        for name, (value, count) in classify.measure(logits[[row]], labels[[row]]).items():
            held = sums.get(name, (0.0, 0.0))
            sums[name] = held[0] + value, held[1] + count
    assert classify.finish(sums)["ece"] == pytest.approx((0 + 2 * 3 / 4) / 4)
    certain = classify.measure(torch.tensor([[99.0, 0.0, 0.0]]), torch.tensor([0]))
    assert classify.finish(certain)["ece"] == pytest.approx(0)


def test_what_was_not_counted_is_absent(classify: Classification) -> None:
    assert classify.finish({"accuracy": (0.0, 0.0), "loss": (1.0, 2.0)}) == {"loss": 0.5}
    assert CausalLM(llama()).finish({"loss": (0.0, 0.0)}) == {}


def test_half_precision_logits_are_widened(classify: Classification) -> None:
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.tensor([0, 1, 2, 0])
    assert classify.loss(logits, labels).item() == classify.loss(logits.float(), labels).item()
    assert classify.loss(logits.double(), labels).dtype == torch.float64


# causal language models


def test_causal_begins_and_ends_as_the_tokenizer_does() -> None:
    examples = CausalLM(llama()).encode(rows("a b"))
    assert examples.ids == ((CLS, *ids("a b"), SEP),)
    assert examples.labels == ((-100, *ids("a b"), SEP),)
    plain = words(eos_token="[SEP]", bos_token="[SEP]")  # like GPT-2: nothing in front
    assert CausalLM(plain).encode(rows("a b")).ids == ((*ids("a b"), SEP),)
    assert CausalLM(words()).encode(rows("a b")).labels == (ids("a b"),)


def test_causal_prompt_is_read_but_not_learned() -> None:
    task = CausalLM(llama(), prompt="question")
    examples = task.encode(rows("c", "d e", question=["a b", ""]))
    assert examples.ids == ((CLS, *ids("a b c"), SEP), (CLS, *ids("d e"), SEP))
    assert examples.labels == ((-100, -100, -100, ID["c"], SEP), (-100, *ids("d e"), SEP))
    with pytest.raises(DataError, match='no column "prompt"'):
        replace(task, prompt="prompt").encode(rows("a", question=["b"]))


@pytest.mark.parametrize(
    ("prompt", "text", "expected", "masked"),
    [
        ("a", "b c d e f g h", "a b c d e f g", 2),  # the text loses its end
        ("a b c d e f g h", "c", "d e f g h c [SEP]", 6),  # the prompt loses its start
        ("a b c d e f g h", "a b c d e f g h", "f g h a b c d", 4),  # both: half of the room
    ],
)
def test_causal_truncation_always_leaves_something_to_learn(
    prompt: str, text: str, expected: str, masked: int
) -> None:
    task = CausalLM(llama(), prompt="question", max_length=8)
    examples = task.encode(rows(text, question=[prompt]))
    (encoded,), (labels,) = examples.ids, examples.labels
    assert encoded == (CLS, *ids(expected))
    assert labels == (*[-100] * masked, *encoded[masked:])


words_of = st.lists(st.sampled_from("abcdefgh"), max_size=20).map(" ".join)


@settings(max_examples=80, deadline=None)
@given(prompt=words_of, text=words_of.filter(bool), length=st.integers(4, 30))
def test_causal_encoding_is_bounded_aligned_and_learnable(
    prompt: str, text: str, length: int
) -> None:
    task = CausalLM(LLAMA, prompt="question", max_length=length)
    examples = task.encode(rows(text, question=[prompt]))
    (encoded,), (labels,) = examples.ids, examples.labels
    assert isinstance(labels, tuple)
    assert len(encoded) == len(labels) <= length
    learned = [token for token in labels if token != -100]
    assert learned
    assert labels[len(labels) - len(learned) :] == tuple(learned)
    assert all(label in (-100, token) for token, label in zip(encoded, labels, strict=True))
    whole = (*ids(text), SEP)
    assert tuple(learned) == whole[: len(learned)]
    if 1 + len(ids(prompt)) + len(whole) <= length:
        assert encoded == (CLS, *ids(prompt), *whole)


LLAMA = llama()


def test_one_token_cannot_be_learned() -> None:
    with pytest.raises(DataError, match=r'a\.jsonl:2: column "text" has no token to predict'):
        CausalLM(words()).encode(rows("a b", "c"))


@pytest.mark.parametrize("side", ["right", "left"])
def test_causal_pads_with_eos_and_masks_it(side: str) -> None:
    task = CausalLM(llama(), side="left" if side == "left" else "right")
    batch = task.collate(task.encode(rows("a b", "c")), [0, 1])
    short, labels = [CLS, ID["c"], SEP], [-100, ID["c"], SEP]
    left = side == "left"
    assert batch.inputs["input_ids"].tolist()[1] == ([SEP, *short] if left else [*short, SEP])
    assert batch.inputs["attention_mask"].tolist()[1] == ([0, 1, 1, 1] if left else [1, 1, 1, 0])
    assert batch.labels.tolist()[1] == ([-100, *labels] if left else [*labels, -100])
    assert batch.labels.tolist()[0] == [-100, *ids("a b"), SEP]


def test_padding_without_pad_and_end_is_zero() -> None:
    task = CausalLM(words())
    batch = task.collate(task.encode(rows("a b c", "a b")), [0, 1])
    assert batch.inputs["input_ids"].tolist()[1] == [*ids("a b"), 0]


def foretold(labels: torch.Tensor, tokens: torch.Tensor, nats: float) -> torch.Tensor:
    """Logits that give each next token a loss of ``nats``, and hide the present one."""
    vocabulary = len(WORDS)
    logits = torch.zeros(*labels.shape, vocabulary)
    odds = (vocabulary - 1) / (math.exp(nats) - 1)
    for at in range(labels.shape[1] - 1):
        for row in range(labels.shape[0]):
            logits[row, at, tokens[row, at + 1]] = math.log(odds)
    return logits


@pytest.mark.parametrize("side", ["right", "left"])
def test_causal_loss_predicts_the_next_token(side: str) -> None:
    task = CausalLM(llama(), prompt="q", side="left" if side == "left" else "right")
    batch = task.collate(task.encode(rows("c d", "e", q=["a b", ""])), [0, 1])
    logits = foretold(batch.labels, batch.inputs["input_ids"], 0.5)
    assert task.loss(logits, batch.labels).item() == pytest.approx(0.5, rel=1e-5)
    sums = task.measure(logits, batch.labels)
    assert sums["accuracy"] == (5.0, 5.0)  # c, d, end, e, end
    assert sums["loss"] == (pytest.approx(2.5, rel=1e-5), 5.0)
    done = task.finish(sums)
    assert done["perplexity"] == pytest.approx(math.exp(0.5), rel=1e-5)
    assert task.metric in done
    assert not task.higher_is_better


def test_causal_loss_reads_no_masked_position() -> None:
    task = CausalLM(llama(), prompt="q")
    batch = task.collate(task.encode(rows("c d", "e", q=["a b", ""])), [0, 1])
    logits = torch.randn(
        *batch.labels.shape, len(WORDS), generator=torch.Generator().manual_seed(1)
    )
    logits.requires_grad_()
    task.loss(logits, batch.labels).backward()
    assert logits.grad is not None
    touched = logits.grad.abs().sum(-1) > 0
    assert touched.tolist() == [
        [False, False, True, True, True, False],
        [True, True, False, False, False, False],
    ]


def test_perplexity_of_a_broken_model_is_infinite_not_an_error() -> None:
    assert CausalLM(llama()).finish({"loss": (1e6, 1.0)})["perplexity"] == math.inf


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 8), max_size=3), seed=st.integers(0, 99))
def test_sums_over_batches_are_the_sums_of_all(cuts: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    task: Task = CausalLM(LLAMA)
    labels = torch.randint(0, 16, (8, 5), generator=generator)
    labels[torch.rand(8, 5, generator=generator) < 0.4] = -100
    logits = torch.randn(8, 5, 16, generator=generator)
    edges = [0, *sorted(cuts), 8]
    pieces = [task.measure(logits[start:end], labels[start:end]) for start, end in pairwise(edges)]
    for metric, (total, count) in task.measure(logits, labels).items():
        assert math.fsum(piece[metric][0] for piece in pieces) == pytest.approx(total, rel=1e-6)
        assert sum(piece[metric][1] for piece in pieces) == count


# label names, examples, shards


def test_label_names_sort_integers_as_integers() -> None:
    assert label_names(rows("a", "b", "c", y=["10", 2, 1.0]), "y") == ("1", "2", "10")
    assert label_names(rows("a", "b", y=["yes", "10"]), "y") == ("10", "yes")
    assert label_names(rows("a", "b", y=[True, False]), "y") == ("False", "True")
    with pytest.raises(DataError, match='no column "z"'):
        label_names(rows("a", y=["yes"]), "z")


def test_label_names_round_trip_through_encode() -> None:
    found = rows("a", "b", "c", label=[True, False, True])
    task = Classification(label_names(found, "label"), bert())
    assert task.encode(found).labels == (1, 0, 1)


def test_no_rows_are_no_examples(classify: Classification) -> None:
    assert classify.encode([]) == Examples() == CausalLM(LLAMA).encode([])


def test_examples_are_frozen_and_aligned() -> None:
    examples = Examples(((1,), (2,)), (0, 1), ("a:1", "a:2"))
    assert examples.pick([1, 0, 1]).origins == ("a:2", "a:1", "a:2")
    with pytest.raises(FrozenInstanceError):
        examples.ids = ()  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(DataError, match="1 examples with 2 labels"):
        Examples(((1,),), (0, 1), ("a:1",))


def test_max_length_has_a_floor() -> None:
    tokenizers: list[PreTrainedTokenizerBase] = [bert()]
    with pytest.raises(DataError, match="max_length is 3"):
        Classification(POLARITY, tokenizers[0], max_length=3)
    with pytest.raises(DataError, match="max_length is 0"):
        CausalLM(LLAMA, max_length=0)


def some(*origins: str, labels: tuple[int, ...] | None = None) -> Examples:
    of = labels if labels is not None else tuple(at % 2 for at in range(len(origins)))
    return Examples(tuple((1, 2) for _ in origins), of, origins)


def test_shard_names_its_splits() -> None:
    shard = Shard(some("a:1", "a:2"), some("a:3"), some("a:4"))
    assert [shard.split(name).origins[-1] for name in ("train", "val", "test")] == [
        "a:2", "a:3", "a:4",
    ]  # fmt: skip
    assert shard.rows == 2


def test_check_passes_good_shards(classify: Classification) -> None:
    shards = {
        "a": Shard(some("a:1", "a:2"), some("a:3"), some("a:4")),
        "b": Shard(some("b:1", "b:2")),
    }
    assert check(shards, classify) == []


def test_check_refuses_empty_clients(classify: Classification) -> None:
    with pytest.raises(DataError, match=r'Client "b" has no training rows'):
        check({"a": Shard(some("a:1", "a:2")), "b": Shard(Examples(), some("b:1"))}, classify)
    with pytest.raises(DataError, match="There are no clients"):
        check({}, classify)


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        (
            {"a": Shard(some("a:1", "a:2"), test=some("a:2"))},
            r'a:2 is in two places: train of client "a" and test of client "a"',
        ),
        (
            {"a": Shard(some("a:1", "a:2"), some("a:3"), some("a:3"))},
            r'a:3 is in two places: val of client "a" and test of client "a"',
        ),
        (
            {"a": Shard(some("a:1", "a:2")), "b": Shard(some("b:1", "b:2"), test=some("a:1"))},
            r'a:1 is in two places: train of client "a" and test of client "b"',
        ),
    ],
)
def test_check_refuses_a_row_in_two_places(
    classify: Classification, shards: dict[str, Shard], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        check(shards, classify)


def test_check_of_one_class_clients(classify: Classification) -> None:
    shards = {
        "a": Shard(some("a:1", "a:2", labels=(2, 2)), some("a:3", labels=(0,))),
        "b": Shard(some("b:1", "b:2")),
        "c": Shard(some("c:1", labels=(0,))),
    }
    with pytest.raises(DataError) as refused:
        check(shards, classify)
    assert 'Client "a" has one class only in its 2 training rows: label 3 of 3.' in str(
        refused.value
    )
    assert "So does another." in str(refused.value)
    assert "data.one_class: allow" in str(refused.value)
    assert check(shards, classify, one_class="allow") == [
        'Client "a" has one class only in its 2 training rows: label 3 of 3.',
        'Client "c" has one class only in its 1 training rows: label 1 of 3.',
    ]


def test_one_class_is_no_matter_for_text() -> None:
    task = CausalLM(LLAMA)
    assert check({"a": Shard(task.encode(rows("a b")))}, task) == []


def test_batches_count_their_rows() -> None:
    assert Batch({}, torch.zeros(3, 5)).rows == 3


# a real tokenizer


def test_a_real_tokenizer(asset: Callable[[str], Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(asset("bert-tiny"))
    task = Classification(POLARITY, tokenizer, max_length=8)
    found = rows("A fine film [SEP] indeed", "Bad.", label=["positive", 0])
    batch = task.collate(task.encode(found), [0, 1])
    long, short = batch.inputs["input_ids"].tolist()
    assert tokenizer.convert_ids_to_tokens(long) == [
        "[CLS]", "a", "fine", "film", "[", "sep", "]", "[SEP]",
    ]  # fmt: skip
    assert tokenizer.convert_ids_to_tokens(short)[:5] == ["[CLS]", "bad", ".", "[SEP]", "[PAD]"]
    assert batch.inputs["attention_mask"].sum(1).tolist() == [8, 4]
    assert batch.labels.tolist() == [2, 0]
