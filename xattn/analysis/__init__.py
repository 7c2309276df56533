"""Looking into models."""

from xattn.analysis.collectives import count_collectives
from xattn.analysis.flops import count_flops
from xattn.analysis.inspect import inspect, show

__all__ = ["count_collectives", "count_flops", "inspect", "show"]
