"""Which blocks each client runs: devices, what a cut costs, and a pure function that chooses."""

from flexp.plan.costs import (
    BlockCosts,
    Form,
    message_bytes,
    near_bytes,
    step_bytes,
)
from flexp.plan.devices import Device, format_bytes, measure, parse_bytes
from flexp.plan.planner import Choice, Goal, Limits, plan
from flexp.plan.sizes import measure_costs, tried

__all__ = [
    "BlockCosts",
    "Choice",
    "Device",
    "Form",
    "Goal",
    "Limits",
    "format_bytes",
    "measure",
    "measure_costs",
    "message_bytes",
    "near_bytes",
    "parse_bytes",
    "plan",
    "step_bytes",
    "tried",
]
