"""Looking into models."""

from xattn.analysis.collectives import count_collectives
from xattn.analysis.flops import count_flops
from xattn.analysis.inspect import inspect, show
from xattn.analysis.step_cost import parse_mesh, show_step_cost, simulate_devices, step_cost

__all__ = [
    "count_collectives",
    "count_flops",
    "inspect",
    "parse_mesh",
    "show",
    "show_step_cost",
    "simulate_devices",
    "step_cost",
]
