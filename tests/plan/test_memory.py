"""A client takes the memory that was predicted from its model's config, within 15 %."""

from __future__ import annotations

import importlib
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import transformers as hf

ROOT = Path(__file__).parents[2]
BERT: dict[str, Any] = {
    "hidden_size": 128,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 512,
    "vocab_size": 8000,
}

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="resident memory is read from /proc"
)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/memory.py, which measures in a process of its own."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    return importlib.import_module("memory")


def off(bench: ModuleType, case: Any) -> float:
    """How far the measured peak is from the prediction."""
    parts = bench.predicted(case)
    assert parts["total"] >= bench.JUDGED
    return bench.fresh(case)["peak"] / parts["total"] - 1


@pytest.mark.slow
def test_a_clients_peak_is_as_predicted(bench: ModuleType, tmp_path: Path) -> None:
    source = bench.write_model(tmp_path / "bert", hf.BertConfig(**BERT), "classification")
    case = bench.Case("bert", str(source), "classification", (1, 1), 80, 128)
    assert abs(off(bench, case)) <= bench.WITHIN


@pytest.mark.slow
@pytest.mark.parametrize("n", range(4))
def test_four_random_shapes(bench: ModuleType, tmp_path: Path, n: int) -> None:
    name, task, config = bench.shapes(random.Random(bench.SEED))[n]
    source = str(bench.write_model(tmp_path / "model", config, task))
    mode = "fast" if task == "causal-lm" else "exact"
    case = bench.Case(name, source, task, (2, 1), 16, 128, mode=mode)
    forms = [
        case,
        replace(case, recompute=3),
        replace(case, accumulate=2),
        replace(case, dtype="bfloat16", mode="fast"),
        replace(case, cut=(3, 0), labels="loss"),
    ]
    assert {form: d for form in forms if abs(d := off(bench, form)) > bench.WITHIN} == {}


@pytest.mark.slow
def test_a_client_of_llama_1b_needs_less_than_one_and_a_half_gigabytes(
    bench: ModuleType, tmp_path: Path
) -> None:
    """The embeddings are also the head, so 525 MB of them are there, once."""
    config = hf.LlamaConfig(**bench.LLAMA_1B)
    source = str(bench.write_model(tmp_path / "llama", config, "causal-lm"))
    case = bench.Case("llama", source, "causal-lm", (1, 0), 4, 128, dtype="bfloat16", mode="fast")
    parts, found = bench.predicted(case), bench.fresh(case)
    assert 640e6 < parts["weights"] < 660e6
    assert found["peak"] < 1.5e9
    assert abs(found["peak"] / parts["total"] - 1) <= bench.WITHIN
