"""Hugging Face's libraries, imported when something of theirs is first asked for.

They take longer to import than all else together. Who has no model of theirs on this machine, or
only wants to be told something, needs neither. Only here they are imported.
"""

from __future__ import annotations

from typing import Any


def transformers() -> Any:
    """Models, configs and tokenizers."""
    import transformers

    return transformers


def peft() -> Any:
    """Names and configurations of adapters."""
    import peft

    return peft
