"""The training program and its parts."""

from xattn.train.loop import Preempted, on_sigterm, train
from xattn.train.reporting import NotFinite

__all__ = ["NotFinite", "Preempted", "on_sigterm", "train"]
