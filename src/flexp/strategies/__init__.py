"""The methods by name; each is one file. Plugins add theirs by the entry point group ``flexp``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from importlib.metadata import entry_points
from typing import Any

from pydantic import TypeAdapter, ValidationError

from flexp.errors import StrategyError, nearest
from flexp.strategies.base import Strategy
from flexp.strategies.fedavg import FedAvg
from flexp.strategies.flexp import FlexP
from flexp.strategies.local import Local
from flexp.strategies.pretrained import Base

BUILT_IN: tuple[type[Strategy[Any]], ...] = (Base, Local, FedAvg, FlexP)


def methods() -> dict[str, type[Strategy[Any]]]:
    """Every method that can be named in a recipe: ours first, then plugins."""
    out = {one.name: one for one in BUILT_IN}
    for point in entry_points(group="flexp"):
        out.setdefault(point.name, point.load())
    return out


def build(name: str, options: Mapping[str, Any]) -> Strategy[Any]:
    """The strategy of that name with these options; StrategyError names what does not fit."""
    known = methods()
    if name not in known:
        raise StrategyError(
            f'strategy.name: there is no method "{name}". {nearest(name, known)} '
            "See `flexp methods`."
        )
    method: Any = known[name]
    names = {f.name for f in fields(method) if f.init}
    for key in options:
        if key not in names:
            hint = nearest(key, names) if names else "It has no options."
            raise StrategyError(f'strategy.{key}: method "{name}" has no such option. {hint}')
    try:
        return TypeAdapter(method).validate_python(dict(options))
    except ValidationError as problem:
        first = problem.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise StrategyError(f"strategy.{where}: {first['msg']}.") from problem


def options_of(method: type[Strategy[Any]]) -> dict[str, Any]:
    """The options of a method with their defaults."""
    kinds: Any = method
    return {f.name: None if f.default is MISSING else f.default for f in fields(kinds) if f.init}
