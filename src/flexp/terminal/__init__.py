"""What a person reads in a terminal when a command is done: tables, from documents alone."""

from flexp.terminal.grids import shown
from flexp.terminal.identities import show_authority, show_certificates, show_issued
from flexp.terminal.network import show_joined, show_terms
from flexp.terminal.pages import (
    show_align,
    show_assets,
    show_doctor,
    show_export,
    show_fleet,
    show_influence,
    show_methods,
    show_new_strategy,
    show_predictions,
    show_run,
    show_verified,
    show_voices,
)
from flexp.terminal.plans import show_cuts, show_plan
from flexp.terminal.scores import show_compare, show_demo
from flexp.terminal.speed import show_bench, show_benchmarks

__all__ = [
    "show_assets",
    "show_authority",
    "show_bench",
    "show_benchmarks",
    "show_certificates",
    "show_compare",
    "show_cuts",
    "show_demo",
    "show_align",
    "show_doctor",
    "show_export",
    "show_fleet",
    "show_influence",
    "show_issued",
    "show_joined",
    "show_methods",
    "show_new_strategy",
    "show_plan",
    "show_predictions",
    "show_run",
    "show_terms",
    "show_verified",
    "show_voices",
    "shown",
]
