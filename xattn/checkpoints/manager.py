"""Saving and restoring a run with Orbax: the only place that imports it.

A step's folder holds four items: `model` (parameters, running statistics and their moving average: all
that inference needs), `training` (optimizer state and counters), `meta` (format version, configuration
hash, checksums) and, where validation ran, `metrics`. Saves are asynchronous; a folder appears under its
final name only when it is complete. Every array has a checksum, which restore verifies.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jaxtyping import Array, UInt32

from xattn.config import UsageError

FORMAT_VERSION = 1


class DamagedCheckpoint(Exception):
    """A checkpoint that is complete by name but whose contents are not what was saved."""


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
      workdir: the run's folder; checkpoints go to `checkpoints/<step>/`.
      keep: how many of the latest to keep; the best by `metric` is kept besides.
      metric: the validation metric whose largest value is best, or None.
      read_only: never create or clean anything, as when a finished run is loaded.
    """

    def __init__(self, workdir: Path, keep: int = 2, metric: str | None = None, read_only: bool = False):
        managers = ocp.checkpoint_managers
        policies: list[Any] = [managers.LatestN(keep)]
        if metric is not None:
            policies.append(
                managers.BestN(
                    get_metric_fn=lambda metrics: metrics[metric], n=1, keep_checkpoints_without_metrics=False
                )
            )
        self.folder = Path(workdir).absolute() / "checkpoints"
        self.metric = metric
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=managers.AnyPreservationPolicy(policies),
                cleanup_tmp_directories=not read_only,
                create=not read_only,
            ),
            item_handlers={
                "model": ocp.StandardCheckpointHandler(),
                "training": ocp.StandardCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
        )

    def steps(self) -> list[int]:
        """The steps that have a complete checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step with the largest validation metric, or None where none was recorded."""
        scores = {}
        for step in self.steps():
            metrics = self._manager.metrics(step)
            if self.metric is not None and metrics and self.metric in metrics:
                scores[step] = metrics[self.metric]
        return max(scores, key=lambda step: (scores[step], step)) if scores else None

    def save(
        self, step: int, model: Any, training: Any, meta: Mapping[str, Any], metrics: Mapping[str, float] | None = None
    ) -> None:
        """Starts to save `step`; returns as soon as the arrays are copied.

        Args:
          step: number of updates done.
          model: tree of arrays that inference needs.
          training: tree of arrays that only a continued run needs.
          meta: JSON values to keep beside them.
          metrics: validation metrics at this step.
        """
        record = {
            "format_version": FORMAT_VERSION,
            **meta,
            "checksums": {"model": _checksums(model), "training": _checksums(training)},
        }
        saved = self._manager.save(
            step,
            metrics=dict(metrics) if metrics else None,
            args=ocp.args.Composite(
                model=ocp.args.StandardSave(model),
                training=ocp.args.StandardSave(training),
                meta=ocp.args.JsonSave(record),
            ),
        )
        if not saved:
            raise RuntimeError(f"Orbax refused to save step {step}: {self.folder} already has a later one.")

    def restore_latest(self, model: Any, training: Any) -> tuple[int, Any, Any] | None:
        """The latest intact checkpoint as `(step, model, training)`, or None where there is none.

        A damaged one is moved to `damaged/<step>` in the workdir, with a warning, and the one before it
        is taken.

        Args:
          model, training: trees of `jax.ShapeDtypeStruct` with shardings, as `save` got them.

        Raises:
          UsageError: every checkpoint is damaged, or the format version is another.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return step, *self._restore(step, model=model, training=training)
            except (UsageError, KeyboardInterrupt):
                raise
            except Exception as error:  # noqa: BLE001  Orbax raises several types, also a bare Exception
                self._set_aside(step, error)
        if steps:
            raise UsageError(
                f"all checkpoints in {self.folder} were damaged and are now in "
                f"{self.folder.parent / 'damaged'}: start again with a new workdir."
            )
        return None

    def restore_model(self, step: int) -> Any:
        """The `model` item of `step` on the first device, without needing to know its shapes."""
        tree = self._manager.item_metadata(step)["model"]
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), tree)
        return self._restore(step, model=target)[0]

    def _restore(self, step: int, **targets: Any) -> tuple[Any, ...]:
        args = {name: ocp.args.StandardRestore(target) for name, target in targets.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore(), **args))
        version = restored["meta"]["format_version"]
        if version != FORMAT_VERSION:
            raise UsageError(
                f"{self.folder / str(step)} has format {version}, this xattn reads "
                f"{FORMAT_VERSION}: use the xattn that wrote it."
            )
        for name in targets:
            expected, found = restored["meta"]["checksums"][name], _checksums(restored[name])
            wrong = [path for path in expected if expected[path] != found.get(path)]
            if wrong:
                raise DamagedCheckpoint(
                    f"checksum of {name}/{wrong[0]} differs" + (f" (and of {len(wrong) - 1} more)" if wrong[1:] else "")
                )
        return tuple(restored[name] for name in targets)

    def _set_aside(self, step: int, error: Exception) -> None:
        aside = self.folder.parent / "damaged" / str(step)
        logging.warning(
            "checkpoint %d is damaged (%s); it is moved to %s and the one before it is used.",
            step,
            str(error).splitlines()[0][:200],
            aside,
        )
        if jax.process_index() == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(exist_ok=True)
            shutil.move(self.folder / str(step), aside)
        self._manager.reload()

    def wait(self) -> None:
        """Blocks until every started save is complete."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the saves and releases the manager's threads."""
        self._manager.close()


def _checksums(tree: Any) -> dict[str, int]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    sums = jax.device_get(_sums([leaf for _, leaf in leaves]))
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return {path: int(total) for path, total in zip(paths, sums, strict=True)}


@jax.jit
def _sums(leaves: list[Array]) -> list[UInt32[Array, ""]]:
    """Sum of bits x odd position weights modulo 2^32: exact in any order, so it is the same on every mesh."""

    def total(leaf: Array) -> UInt32[Array, ""]:
        if leaf.dtype == jnp.bool_:
            leaf = leaf.astype(jnp.uint8)
        bits = jax.lax.bitcast_convert_type(leaf, _UNSIGNED[np.dtype(leaf.dtype).itemsize]).astype(jnp.uint32)
        weight = jnp.ones((), jnp.uint32)
        for axis, size in enumerate(bits.shape):
            index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
            weight = weight * jnp.uint32(size) + index
        return jnp.sum(bits * (weight * jnp.uint32(2654435761) * jnp.uint32(2) + jnp.uint32(1)), dtype=jnp.uint32)

    return [total(leaf) for leaf in leaves]


_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
