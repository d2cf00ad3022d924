"""Packaged models and data sets, local folders and hub ids: from a name to a folder."""

from flexp.assets.asset import Asset, Kind, Registry, Take
from flexp.assets.cache import (
    Cache,
    Row,
    Say,
    default_root,
    fetch,
    listing,
    locate,
    remove,
    verify,
)
from flexp.assets.catalogue import CATALOGUE
from flexp.assets.hub import drawn_models, resolve
from flexp.assets.registries import Done, Run

__all__ = [
    "CATALOGUE",
    "Asset",
    "Cache",
    "Done",
    "Kind",
    "Registry",
    "Row",
    "Run",
    "Say",
    "Take",
    "default_root",
    "drawn_models",
    "fetch",
    "listing",
    "locate",
    "remove",
    "resolve",
    "verify",
]
