"""A run's folder: its configuration, and the model that it holds."""

import json
import os
import platform
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import flax
import jax
import orbax.checkpoint
from absl import logging
from flax import linen as nn

from xattn import models
from xattn.checkpoints.manager import Checkpoints
from xattn.config import Config, UsageError, config_hash, differing_keys, from_json, to_json, write_atomically


def open_workdir(workdir: Path, config: Config) -> None:
    """Creates `workdir` for `config`, or checks that it belongs to the same experiment.

    Raises:
      UsageError: the folder holds a run whose config differs in more than what a continued run may change,
        or something else.
    """
    path = workdir / "config.json"
    if path.is_file():
        if keys := differing_keys(read_config(workdir), config):
            raise UsageError(
                f"{workdir} belongs to another config (it differs in {', '.join(keys)}): "
                "use the same config, or another --workdir."
            )
    elif workdir.exists() and (not workdir.is_dir() or _foreign(workdir)):
        raise UsageError(f"{workdir} is no empty folder and holds no run: choose another --workdir.")
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        write_atomically(path, to_json(config))
        environment = {
            "config_hash": config_hash(config),
            "argv": sys.argv,
            "python": platform.python_version(),
            "jax": jax.__version__,
            "flax": flax.__version__,
            "orbax": orbax.checkpoint.__version__,
            "devices": [str(device.device_kind) for device in jax.devices()],
            "cores": os.cpu_count(),
        }
        write_atomically(workdir / "env.json", json.dumps(environment, indent=2))


def _foreign(workdir: Path) -> bool:
    """Whether there is anything but the config that a killed run began to write."""
    return any(not entry.name.startswith(".config.json.") for entry in workdir.iterdir())


def has_checkpoint(workdir: Path) -> bool:
    """Whether a run would continue here: a save that was interrupted has another name than its step's number."""
    return any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*"))


def read_config(workdir: Path) -> Config:
    """The resolved config of a run; `UsageError` if the folder holds none."""
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise UsageError(
            f"{workdir} holds no run (there is no {path.name} in it): give the --workdir of a trained model."
        )
    return from_json(path.read_text())


def load(workdir: str | Path, step: int | str = "best", ema: bool = True) -> tuple[nn.Module, dict, Config]:
    """A trained model, without touching its data set.

    Args:
      workdir: the run's folder.
      step: "best" by the validation metric (the latest, where no validation ran), "latest", or a number.
      ema: take the moving average of the parameters where the run kept one.

    Returns:
      `(model, variables, config)`: `model.apply(variables, ...)` works at once.

    Raises:
      UsageError: no run, or no such checkpoint.
      DamagedCheckpoint: the checkpoint is not what was saved.
    """
    found, variables = load_variables(Path(workdir), step, ema)
    config = read_config(Path(workdir))
    logging.info("loaded step %d of %s", found, workdir)
    return models.build(config.model.to_dict(), dtype=config.get("dtype", "float32")), variables, config


def load_variables(workdir: Path, step: int | str, ema: bool = True) -> tuple[int, dict[str, Any]]:
    """The step that was found and its variables; see `load`."""
    config = read_config(workdir)
    if not (workdir / "checkpoints").is_dir():
        raise UsageError(f"{workdir} has no checkpoint yet: train it first.")
    metric = (config.get("validation") or {}).get("metric")
    with closing(Checkpoints(workdir, metric=metric, read_only=True)) as checkpoints:
        steps, best = checkpoints.steps(), checkpoints.best_step()
        names = {str(number): number for number in steps}
        if steps:
            names |= {"latest": steps[-1], "best": steps[-1] if best is None else best}
        if str(step) not in names:
            raise UsageError(f"{workdir} has no checkpoint '{step}': it has {', '.join(names) or 'none'}.")
        found = names[str(step)]
        saved = checkpoints.restore_model(found)
    params = saved["ema"] if ema and saved["ema"] else saved["params"]
    return found, {"params": params, **saved["model_state"]}
