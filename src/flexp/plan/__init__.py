"""Which blocks each client runs: devices, what a cut costs, and a pure function that chooses."""

from flexp.plan.aims import Aims
from flexp.plan.clock import Load, finish_times, run_seconds, seconds_of, step_load, step_seconds
from flexp.plan.costs import (
    BlockCosts,
    Form,
    frame_bytes,
    message_bytes,
    near_bytes,
    step_bytes,
)
from flexp.plan.declared import aims_of, devices_of, limits_of, server_of
from flexp.plan.devices import Device, Server, format_bytes, measure, parse_bytes
from flexp.plan.options import Limits
from flexp.plan.planner import Choice, Goal, default_goal, plan
from flexp.plan.profiles import PROFILES, Profile, profile
from flexp.plan.sizes import measure_costs, tried
from flexp.plan.work import BlockWork, far_flops, measure_work, near_flops

__all__ = [
    "Aims",
    "BlockCosts",
    "BlockWork",
    "Choice",
    "Device",
    "Form",
    "Goal",
    "Limits",
    "Load",
    "PROFILES",
    "Profile",
    "Server",
    "aims_of",
    "devices_of",
    "limits_of",
    "server_of",
    "default_goal",
    "far_flops",
    "finish_times",
    "format_bytes",
    "measure",
    "measure_costs",
    "measure_work",
    "message_bytes",
    "frame_bytes",
    "near_bytes",
    "near_flops",
    "parse_bytes",
    "plan",
    "profile",
    "run_seconds",
    "seconds_of",
    "step_bytes",
    "step_load",
    "step_seconds",
    "tried",
]
