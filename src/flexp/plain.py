"""Plain data as JSON that every reader takes: null for what is not a finite number."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast


def finite(value: Any) -> Any:
    """The same with None for NaN and infinity, which JSON has not; mappings become dicts.

    >>> finite({"loss": float("nan"), "rows": (1, 2.5)})
    {'loss': None, 'rows': [1, 2.5]}
    """
    if isinstance(value, Mapping):
        return {k: finite(held) for k, held in cast("Mapping[str, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [finite(held) for held in cast("Sequence[Any]", value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_text(value: Any, *, indent: int | None = None) -> str:
    """The JSON of plain data, strictly."""
    return json.dumps(finite(value), allow_nan=False, indent=indent)
