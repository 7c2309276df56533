"""Saving, resuming and loading runs."""

from xattn.checkpoints.manager import Checkpoints, DamagedCheckpoint
from xattn.checkpoints.workdir import has_checkpoint, load, open_workdir, read_config

__all__ = ["Checkpoints", "DamagedCheckpoint", "has_checkpoint", "load", "open_workdir", "read_config"]
