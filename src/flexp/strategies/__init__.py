"""The methods by name; each is one file. Packages add theirs by the entry points of ``GROUP``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from importlib.metadata import entry_points
from math import isfinite
from typing import Any

from pydantic import TypeAdapter, ValidationError

from flexp.errors import StrategyError, nearest
from flexp.strategies.apfl import Apfl
from flexp.strategies.base import Strategy
from flexp.strategies.ddome import Ddome
from flexp.strategies.ditto import Ditto
from flexp.strategies.dypfl import DyPfl
from flexp.strategies.fed_influence import FedInfluence
from flexp.strategies.fedala import FedAla
from flexp.strategies.fedavg import FedAvg
from flexp.strategies.fedbabu import FedBabu
from flexp.strategies.fedbasis import FedBasis
from flexp.strategies.fedbn import FedBn
from flexp.strategies.feddpa import FedDpa
from flexp.strategies.fedfomo import FedFomo
from flexp.strategies.fedmosaic import FedMosaic
from flexp.strategies.fedper import FedPer
from flexp.strategies.fedppa import FedPpa
from flexp.strategies.fedprox import FedProx
from flexp.strategies.fedrep import FedRep
from flexp.strategies.fedsa_lora import FedSaLora
from flexp.strategies.ffa_lora import FfaLora
from flexp.strategies.flexlora import FlexLora
from flexp.strategies.flexp import FlexP
from flexp.strategies.flexp_sfl import FlexPSfl
from flexp.strategies.flexp_sft import FlexPSft
from flexp.strategies.flora import Flora
from flexp.strategies.fml import Fml
from flexp.strategies.hetlora import HetLora
from flexp.strategies.hsplitlora import HSplitLora
from flexp.strategies.local import Local
from flexp.strategies.pac_pfl import PacPfl
from flexp.strategies.per_fedavg import PerFedAvg
from flexp.strategies.pfedhn import PFedHn
from flexp.strategies.pfedlora import PFedLora
from flexp.strategies.pfedme import PFedMe
from flexp.strategies.pfedpg import PFedPg
from flexp.strategies.pfedpt import PFedPt
from flexp.strategies.pfsl import Pfsl
from flexp.strategies.phsfl import Phsfl
from flexp.strategies.pooled import Pooled
from flexp.strategies.pretrained import Base
from flexp.strategies.scaffold import Scaffold
from flexp.strategies.sl import Sl
from flexp.strategies.sl_ushape import SlUshape
from flexp.strategies.splitfed_v1 import SplitFedV1
from flexp.strategies.splitfed_v2 import SplitFedV2
from flexp.strategies.splitfed_v3 import SplitFedV3
from flexp.strategies.splitfrozen import SplitFrozen
from flexp.strategies.splitlora import SplitLora
from flexp.strategies.zoopfl import ZooPfl

GROUP = "flexp.strategies"
BUILT_IN: tuple[type[Strategy[Any]], ...] = (
    Base,
    Pooled,
    Local,
    FedAvg,
    FedProx,
    Scaffold,
    Ditto,
    Apfl,
    PFedMe,
    DyPfl,
    PerFedAvg,
    FedAla,
    FedFomo,
    FedBasis,
    Ddome,
    Fml,
    PacPfl,
    PFedPt,
    PFedHn,
    PFedPg,
    ZooPfl,
    FedMosaic,
    FedPpa,
    FedPer,
    FedRep,
    FedBabu,
    FedBn,
    FfaLora,
    FedSaLora,
    FlexLora,
    Flora,
    HetLora,
    FedDpa,
    PFedLora,
    Sl,
    SlUshape,
    SplitFedV1,
    SplitFedV2,
    SplitFedV3,
    SplitLora,
    HSplitLora,
    SplitFrozen,
    Phsfl,
    Pfsl,
    FlexP,
    FlexPSft,
    FlexPSfl,
    FedInfluence,
)


def methods() -> dict[str, type[Strategy[Any]]]:
    """Every method that can be named in a recipe: ours first, then those of other packages."""
    out = {one.name: one for one in BUILT_IN}
    for point in entry_points(group=GROUP):
        if point.name not in out:
            out[point.name] = _loaded(point.name, point.value, point.load)
    return out


def _loaded(name: str, value: str, load: Any) -> type[Strategy[Any]]:
    try:
        found = load()
    except Exception as problem:  # another package's code may fail in any way
        raise StrategyError(
            f'The method "{name}" ({value}) of another package cannot be loaded: '
            f"{type(problem).__name__}: {problem}. Mend or uninstall that package."
        ) from problem
    missing = [a for a in ("name", "paper", "kind", "slots", "train") if not hasattr(found, a)]
    if missing or found.name != name:
        what = f"it has no {missing[0]}" if missing else f'it calls itself "{found.name}"'
        raise StrategyError(
            f'The method "{name}" ({value}) of another package is no strategy: {what}. '
            "See docs/how-to/add-a-method.md."
        )
    return found


def build(name: str, options: Mapping[str, Any], at: str = "strategy") -> Strategy[Any]:
    """The strategy of that name with these options; StrategyError names what does not fit.

    ``at`` is where the recipe says so.
    """
    known = methods()
    if name not in known:
        raise StrategyError(
            f'{at}.name: there is no method "{name}". {nearest(name, known)} See `flexp methods`.'
        )
    method: Any = known[name]
    names = {f.name for f in fields(method) if f.init}
    for key, value in options.items():
        if isinstance(value, float) and not isfinite(value):
            raise StrategyError(f"{at}.{key}: {value} is not a finite number.")
        if key not in names:
            has = f"{nearest(key, names)} Its options: {', '.join(sorted(names))}."
            raise StrategyError(
                f'{at}.{key}: method "{name}" has no such option. '
                f"{has if names else 'It has none.'}"
            )
    try:
        return TypeAdapter(method).validate_python(dict(options))
    except ValidationError as problem:
        first = problem.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise StrategyError(f"{at}.{where}: {first['msg']}.") from problem


def about(method: type[Strategy[Any]]) -> str:
    """What a method does, in one line: the first of its class's docstring."""
    return (method.__doc__ or "").partition("\n")[0]


def options_of(method: type[Strategy[Any]]) -> dict[str, Any]:
    """The options of a method with their defaults."""
    kinds: Any = method
    return {f.name: None if f.default is MISSING else f.default for f in fields(kinds) if f.init}
