"""Saving and restoring a run with Orbax: the only place that imports it.

A step's folder holds three items: `model` (parameters, running statistics and their moving average: all
that inference needs), `training` (optimizer state and counters) and `meta` (format version, configuration
hash, validation metrics, shapes and checksums). Saves are asynchronous; a folder appears under its final
name only when it is complete. Every array, and `meta` itself, has a checksum, which restore verifies.

Nothing in a checkpoint depends on the machine: it is restored on any mesh, by any number of processes, in another
floating-point type. Several processes agree on what they find before they go on.
"""

import contextlib
import errno
import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from logging import getLogger
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jaxtyping import Array, UInt32

from xattn.config import UsageError, lookup
from xattn.parallel.distributed import exchange, first

FORMAT_VERSION = 1

# Orbax logs the errors of its threads with their tracebacks, then raises them in `save`, `wait` and `close` as well.
# asyncio logs those of tasks that nobody waits for any more, perhaps after our sentence.
logging.get_absl_logger().addFilter(lambda record: not (record.exc_info and "orbax" in record.pathname))
getLogger("asyncio").addFilter(lambda record: "orbax" not in record.getMessage())


class DamagedCheckpoint(Exception):
    """A checkpoint that is complete by name but whose contents are not what was saved."""


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
      workdir: the run's folder; checkpoints go to `checkpoints/<step>/`.
      keep: how many of the latest to keep; the best by `metric` is kept besides.
      metric: the validation metric whose largest value is best (the later one of two equals), or None. With a
        minus before its name, such as "-loss", the smallest is.
      read_only: never create or clean anything, as when a finished run is loaded.
    """

    def __init__(self, workdir: Path, keep: int = 2, metric: str | None = None, read_only: bool = False):
        self.folder = Path(workdir).absolute() / "checkpoints"
        self.metric = (metric or "").removeprefix("-")
        self._sign = -1 if metric and metric.startswith("-") else 1
        self._arrays = {name: ocp.StandardCheckpointHandler() for name in ("model", "training")}
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_Preserve(lambda steps: {*steps[-keep:], self._best(steps)}),
                cleanup_tmp_directories=not read_only,
                create=not read_only,
            ),
            item_handlers={**self._arrays, "meta": ocp.JsonCheckpointHandler()},
        )
        self._scores: dict[int, float] = {}
        for step in self.steps():
            try:
                self._note_score(step, self._meta(step).get("metrics", {}))
            except DamagedCheckpoint as error:
                logging.warning("checkpoint %d in %s is damaged (%s): it can't be the best.", step, self.folder, error)

    def steps(self) -> list[int]:
        """The steps that have a complete checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def best_first(self) -> list[int]:
        """The steps, that with the best validation metric first; those without one come last, the latest first."""
        steps = self.steps()
        scored = [step for step in steps if step in self._scores]
        others = [step for step in steps if step not in self._scores]
        return sorted(scored, key=lambda step: (self._scores[step], step), reverse=True) + others[::-1]

    def _best(self, steps: Sequence[int]) -> int | None:
        scored = [step for step in steps if step in self._scores]
        return max(scored, key=lambda step: (self._scores[step], step), default=None)

    def _note_score(self, step: int, metrics: Mapping[str, float]) -> None:
        self._scores.pop(step, None)
        if not math.isnan(score := metrics.get(self.metric, math.nan)):
            self._scores[step] = self._sign * score

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

        Raises:
          UsageError: `metrics` lacks the one to compare by.
        """
        if metrics and self.metric:
            lookup(metrics, self.metric, "validation metric")
        record = {
            "format_version": FORMAT_VERSION,
            **meta,
            "metrics": dict(metrics or {}),
            "shapes": {"model": _shapes(model), "training": _shapes(training)},
            "checksums": {"model": _checksums(model), "training": _checksums(training)},
        }
        self._note_score(step, record["metrics"])
        saved = self._manager.save(
            step,
            args=ocp.args.Composite(
                model=ocp.args.StandardSave(model),
                training=ocp.args.StandardSave(training),
                meta=ocp.args.JsonSave(record | {"checksum": _checksum(record)}),
            ),
        )
        if not saved:
            raise RuntimeError(f"Orbax refused to save step {step}: {self.folder} already has a later one.")

    def restore_latest(self, model: Any, training: Any) -> tuple[int, Any, Any] | None:
        """The latest intact checkpoint as `(step, model, training)`, or None where there is none.

        A damaged one is moved to `damaged/<step>` in the workdir, with a warning, and the one before it
        is taken: by all processes, also where only one of them found the damage.

        Args:
          model, training: trees of `jax.ShapeDtypeStruct` of the arrays that `save` got, in the shardings that they
            shall have now; floating-point arrays are rounded to the dtypes that are asked for.

        Raises:
          UsageError: every checkpoint is damaged, or the latest intact one has another format version or
            holds other arrays.
        """
        steps, targets = self.steps(), {"model": model, "training": training}
        for step in reversed(steps):
            try:
                with _agreed():
                    meta, arrays = self._read(step, targets)
                _verify(meta, arrays)
                asked = jax.tree.map(_as_asked, arrays, targets)
                return step, asked["model"], asked["training"]
            except DamagedCheckpoint as error:
                self._set_aside(step, error)
        if steps or first("what was damaged", (self.folder.parent / "damaged").is_dir):
            raise UsageError(
                f"all checkpoints in {self.folder} were damaged and are now in "
                f"{self.folder.parent / 'damaged'}: start again with a new workdir."
            )
        return None

    def restore_model(self, step: int, shardings: Callable[[Any], Any] | None = None) -> Any:
        """The `model` item of `step`, without needing to know its shapes.

        Args:
          step: one of `steps()`.
          shardings: of the tree of shapes, a tree of shardings for it; all processes must call this then, and agree on
            what they find. By default all is on the first device.

        Raises:
          UsageError: the format version is another.
          DamagedCheckpoint: it is not what was saved.
        """
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        with contextlib.nullcontext() if shardings is None else _agreed():
            self._readable_meta(step)
            with _damage_named():
                tree = self._manager.item_metadata(step)["model"].tree
            places = jax.tree.map(lambda _: device, tree) if shardings is None else shardings(tree)
            target = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)
            meta, arrays = self._read(step, {"model": target})
        _verify(meta, arrays)
        return arrays["model"]

    def _meta(self, step: int) -> dict[str, Any]:
        with _damage_named():
            meta = json.loads((self.folder / str(step) / "meta" / "metadata").read_text())
            if meta.pop("checksum") != _checksum(meta):
                raise DamagedCheckpoint("checksum of meta differs")
        return meta

    def _readable_meta(self, step: int) -> dict[str, Any]:
        meta = self._meta(step)
        if (version := meta["format_version"]) != FORMAT_VERSION:
            where = self.folder / str(step)
            raise UsageError(
                f"{where} has format {version}, this xattn reads {FORMAT_VERSION}: use the xattn that wrote it."
            )
        return meta

    def _read(self, step: int, targets: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What `meta` says of `step`, and the arrays as they are on disk, each process reading its part of them.

        The handlers read because the manager would wait for the processes in which reading failed.
        """
        meta, where = self._readable_meta(step), self.folder / str(step)
        arrays = {}
        for name, target in targets.items():
            saved, asked = meta["shapes"][name], _shapes(target)
            if wrong := [path for path in _differing(saved, asked) if not _castable(saved.get(path), asked.get(path))]:
                held, needed = (shapes.get(wrong[0], "nothing") for shapes in (saved, asked))
                raise UsageError(
                    f"{where} holds {held} for {name}/{wrong[0]}, this model has {needed} there ({len(wrong)} such "
                    "arrays): use the xattn that wrote it, or another --workdir."
                )
            with _damage_named():
                args = ocp.args.StandardRestore(_as_saved(target, saved))
                arrays[name] = self._arrays[name].restore(self._manager.directory / str(step) / name, args=args)
        return meta, arrays

    def _set_aside(self, step: int, error: Exception) -> None:
        aside = self.folder.parent / "damaged" / str(step)
        while aside.exists():
            aside = aside.with_name(f"{aside.name}-again")
        logging.warning(
            "checkpoint %d is damaged (%s); it is moved to %s and the one before it is used.", step, error, aside
        )
        if jax.process_index() == 0:
            aside.parent.mkdir(exist_ok=True)
            shutil.move(self.folder / str(step), aside)
        exchange("a damaged checkpoint is set aside", "")
        self._manager.reload()

    def wait(self) -> None:
        """Blocks until every started save is complete."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the saves and releases the manager's threads."""
        self._manager.close()


class _Preserve(ocp.checkpoint_managers.PreservationPolicy):
    def __init__(self, kept: Callable[[list[int]], Collection[int | None]]):
        self._kept = kept

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = self._kept(steps)
        return [step in kept for step in steps]


# What the operating system says of a file that is not there, if it says anything; all else is no checkpoint's fault.
_MISSING = (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR)


@contextlib.contextmanager
def _damage_named() -> Iterator[None]:
    try:
        yield
    except (DamagedCheckpoint, MemoryError, PermissionError, jax.errors.JaxRuntimeError):  # a device without memory
        raise
    except Exception as error:  # Orbax raises several types, also a bare Exception
        code = re.search(r"os_error_code='(\d+)'", str(error))  # of TensorStore
        number = int(code[1]) if code else getattr(error, "errno", None)
        if number not in _MISSING:
            raise UsageError(
                f"a checkpoint can't be read ({os.strerror(number)}); nothing was changed: give the same command again "
                f"when the file system answers. {' '.join(str(error).split())[:200]}"
            ) from error
        raise DamagedCheckpoint(" ".join(str(error).split())[:200]) from error


@contextlib.contextmanager
def _agreed() -> Iterator[None]:
    """Raises `DamagedCheckpoint` in every process if it is raised in one of them."""
    said = ""
    try:
        yield
    except DamagedCheckpoint as error:
        said = str(error) or repr(error)
    if found := [text for text in exchange("reading the checkpoint", said) if text]:
        raise DamagedCheckpoint(found[0])


def _verify(meta: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    for name, tree in arrays.items():
        if wrong := _differing(meta["checksums"][name], _checksums(tree)):
            raise DamagedCheckpoint(f"checksums of {len(wrong)} arrays differ, such as {name}/{wrong[0]}")


def _as_saved(target: Any, shapes: Mapping[str, str]) -> Any:
    """The tree of `jax.ShapeDtypeStruct` with the dtypes that the arrays have on disk."""

    def leaf(path: tuple, asked: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(asked.shape, _dtype(shapes[_name(path)]), sharding=asked.sharding)

    return jax.tree_util.tree_map_with_path(leaf, target)


def _as_asked(array: Array, target: jax.ShapeDtypeStruct) -> Array:
    return array if array.dtype == target.dtype else array.astype(target.dtype)


def _castable(saved: str | None, asked: str | None) -> bool:
    """Whether two of `_shapes` differ in the floating-point type alone."""
    if saved is None or asked is None or saved.partition("[")[2] != asked.partition("[")[2]:
        return False
    return all(jnp.issubdtype(_dtype(shape), jnp.floating) for shape in (saved, asked))


def _dtype(shape: str) -> np.dtype:
    return jnp.dtype(shape.partition("[")[0])


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _by_path(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {_name(path): leaf for path, leaf in leaves}


def _shapes(tree: Any) -> dict[str, str]:
    return {path: f"{np.dtype(leaf.dtype)}{list(leaf.shape)}" for path, leaf in _by_path(tree).items()}


def _differing(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    return sorted(path for path in expected.keys() | found.keys() if expected.get(path) != found.get(path))


def _checksum(record: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _checksums(tree: Any) -> dict[str, int]:
    return {path: int(total) for path, total in jax.device_get(_sums(_by_path(tree))).items()}


@jax.jit
def _sums(leaves: dict[str, Array]) -> dict[str, UInt32[Array, ""]]:
    return jax.tree.map(_sum, leaves)


@jax.jit  # traced once for all leaves of one shape
def _sum(leaf: Array) -> UInt32[Array, ""]:
    """Sum of mix(bits + mix(index)) modulo 2^32: exact in any order, so it is the same on every mesh.

    For one index it is a bijection of the bits, so a change of a single element always shows.
    """
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(leaf, _UNSIGNED[np.dtype(leaf.dtype).itemsize]).astype(jnp.uint32)
    index = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(bits.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return jnp.sum(_mix(bits + _mix(index)), dtype=jnp.uint32)


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The last step of MurmurHash3: a bijection in which every input bit moves every output bit."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
