"""Saving, resuming and loading runs."""

from xattn.checkpoints.manager import Checkpoints, DamagedCheckpoint
from xattn.checkpoints.workdir import latest_step, load, open_workdir, read_config

__all__ = ["Checkpoints", "DamagedCheckpoint", "latest_step", "load", "open_workdir", "read_config"]
