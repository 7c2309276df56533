"""A run's folder: its configuration, and the model that it holds."""

import contextlib
import errno
import fcntl
import json
import os
import platform
import re
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import flax
import jax
import orbax.checkpoint
from absl import logging
from flax import linen as nn

from xattn import models
from xattn.checkpoints.manager import Checkpoints, DamagedCheckpoint
from xattn.config import (
    Config,
    UsageError,
    config_hash,
    differing_keys,
    from_json,
    to_json,
    with_defaults,
    write_atomically,
)
from xattn.parallel.distributed import first

# What keeps a folder from being written to, and what to do about it.
_UNWRITABLE = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EFBIG: "allow larger files",
    errno.EACCES: "change its permissions",
    errno.EPERM: "change its permissions",
    errno.EROFS: "choose another --workdir",
    errno.ENOTDIR: "choose another --workdir",
    errno.ENAMETOOLONG: "choose a shorter --workdir",
}


@contextlib.contextmanager
def open_workdir(workdir: Path, config: Config) -> Iterator[None]:
    """Creates `workdir` for `config`, or checks that it belongs to the same experiment; no other run may open it then.

    The lock is one of the operating system, which ends with the process however it dies. Process 0 of a run holds it,
    and refuses for all of them.

    Raises:
      UsageError: another run is at work in the folder; it holds a run whose config differs in more than what a
        continued run may change, or that is further than `config.num_steps`, or something else; or it can't be
        written to, also later, while it is open.
    """
    with _unwritable_named(workdir), contextlib.ExitStack() as held:
        first("the workdir", lambda: _claim(workdir, config, held))
        yield


def _claim(workdir: Path, config: Config, held: contextlib.ExitStack) -> None:
    with _unwritable_named(workdir):
        _check(workdir, config)
        workdir.mkdir(parents=True, exist_ok=True)
        held.enter_context(_locked(workdir))
        _check(workdir, config)  # again, now that nobody else changes it
        _describe(workdir, config)


def _check(workdir: Path, config: Config) -> None:
    if (workdir / "config.json").is_file():
        if keys := differing_keys(read_config(workdir), config):
            raise UsageError(
                f"{workdir} belongs to another config (it differs in {', '.join(keys)}): "
                "use the same config, or another --workdir."
            )
        if (step := latest_step(workdir) or 0) > config.num_steps:
            raise UsageError(
                f"{workdir} is at step {step}, beyond config.num_steps {config.num_steps}: give {step} or more."
            )
    elif workdir.exists() and (not workdir.is_dir() or _foreign(workdir)):
        raise UsageError(f"{workdir} is no empty folder and holds no run: choose another --workdir.")


def _foreign(workdir: Path) -> bool:
    """Whether there is anything but what a killed run left that had not yet written its config."""
    return any(not entry.name.startswith((".lock", ".config.json.")) for entry in workdir.iterdir())


@contextlib.contextmanager
def _locked(workdir: Path) -> Iterator[None]:
    with (workdir / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise UsageError(
                f"{workdir} is in use by another run ({file.read()}): wait for it, or choose another --workdir."
            ) from error
        except OSError as error:  # such as a network file system that is mounted without them
            logging.warning("%s has no locks (%s): see to it that no other run writes to it.", workdir, error)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


@contextlib.contextmanager
def _unwritable_named(workdir: Path) -> Iterator[None]:
    """Says in one sentence that the disk is full, or that the folder may not be written to."""
    try:
        yield
    except (OSError, ValueError) as error:  # Orbax raises what TensorStore says as a ValueError
        number = getattr(error, "errno", None)
        where = Path(getattr(error, "filename", None) or workdir).absolute()
        within = where.is_relative_to(workdir.absolute()) or workdir.absolute().is_relative_to(where)
        if found := re.search(r"os_error_code='(\d+)'", str(error)):
            number = int(found[1])
        if number not in _UNWRITABLE or not within:
            raise
        raise UsageError(
            f"{workdir} can't be written to ({os.strerror(number)}); what was saved before is kept: "
            f"{_UNWRITABLE[number]}, then give the same command again."
        ) from error


def _describe(workdir: Path, config: Config) -> None:
    write_atomically(workdir / "config.json", to_json(config))
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


def latest_step(workdir: Path) -> int | None:
    """The step at which a run would continue here: a save that was interrupted has another name than its number."""
    return max((int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()), default=None)


def read_config(workdir: Path) -> Config:
    """The resolved config of a run; `UsageError` if the folder holds none."""
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise UsageError(
            f"{workdir} holds no run (there is no {path.name} in it): give the --workdir of a trained model."
        )
    try:
        return with_defaults(from_json(path.read_text()))
    except ValueError as error:
        raise UsageError(
            f"{path} is damaged ({error}): copy it back from a backup, or choose another --workdir."
        ) from error


def load(workdir: str | Path, step: int | str = "best", ema: bool = True) -> tuple[nn.Module, dict, Config]:
    """A trained model, without touching its data set.

    Args:
      workdir: the run's folder.
      step: "best" by the validation metric (the latest, where no validation ran), "latest", or a number. Where the best
        or the latest is damaged, the next one is taken, with a warning.
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


def load_variables(
    workdir: Path, step: int | str, ema: bool = True, shardings: Callable[[Any], Any] | None = None
) -> tuple[int, dict[str, Any]]:
    """The step that was found and its variables; see `load`, and for `shardings` `Checkpoints.restore_model`."""
    config = read_config(workdir)
    if not (workdir / "checkpoints").is_dir():
        raise UsageError(f"{workdir} has no checkpoint yet: train it first.")
    metric = (config.get("validation") or {}).get("metric")
    with closing(Checkpoints(workdir, metric=metric, read_only=True)) as checkpoints:
        steps = checkpoints.steps()
        found = {str(number): [number] for number in steps}
        if steps:
            found |= {"latest": steps[::-1], "best": checkpoints.best_first()}
        if str(step) not in found:
            raise UsageError(f"{workdir} has no checkpoint '{step}': it has {', '.join(found) or 'none'}.")
        return _first_intact(checkpoints, found[str(step)], ema, shardings)


def _first_intact(
    checkpoints: Checkpoints, steps: list[int], ema: bool, shardings: Callable[[Any], Any] | None
) -> tuple[int, dict[str, Any]]:
    for step in steps:
        try:
            saved = checkpoints.restore_model(step, shardings)
        except DamagedCheckpoint as error:
            damage = f"checkpoint {step} in {checkpoints.folder} is damaged ({error})"
            if step == steps[-1]:
                raise DamagedCheckpoint(f"{damage}: choose another step.") from error
            logging.warning("%s; %d is taken.", damage, steps[steps.index(step) + 1])
        else:
            params = saved["ema"] if ema and saved["ema"] else saved["params"]
            return step, {"params": params, **saved["model_state"]}
    raise AssertionError("no steps")
