"""Every fault of the matrix names tests that are there."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from faults.catalogue import Fault

TESTS = Path(__file__).resolve().parents[1]


def test_the_matrix_is_complete() -> None:
    assert [fault.name for fault in Fault] == [f"F{n:02d}" for n in range(1, 51)]
    assert [fault.name for fault in Fault if not fault.value.proof] == ["F27", "F46", "F47"]


@pytest.mark.parametrize("fault", [f for f in Fault if f.value.proof], ids=lambda f: f.name)
def test_its_proof_is_there(fault: Fault) -> None:
    for proof in fault.value.proof:
        file, _, name = proof.partition("::")
        tree = ast.parse((TESTS / file).read_text("utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
