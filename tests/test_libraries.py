"""Hugging Face's libraries are imported when something of theirs is first asked for, not before."""

from __future__ import annotations

import json
import subprocess
import sys

EVERY = """
import importlib, json, pkgutil, sys
import flexp
for module in pkgutil.walk_packages(flexp.__path__, "flexp."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print(json.dumps(sorted({"transformers", "peft"} & sys.modules.keys())))
"""


def test_no_module_imports_them_by_itself() -> None:
    """Neither does anything that a module imports: `flexp join` need not wait for them."""
    found = subprocess.run(
        [sys.executable, "-c", EVERY], capture_output=True, text=True, check=True
    )
    assert json.loads(found.stdout) == []
