"""The training program, read top to bottom: config -> mesh -> model -> state -> steps -> evaluation.

Position in the data, random numbers and the schedule are functions of the step alone, so a run that was
stopped at any moment continues, bit for bit, from its latest checkpoint: start the same command again.
"""

import hashlib
import json
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
import optax
from jax.experimental import multihost_utils

from xattn import data, evals
from xattn.checkpoints import Checkpoints, latest_step, open_workdir
from xattn.config import Config, UsageError, check_config, check_options, config_hash
from xattn.parallel import distributed, pmap
from xattn.parallel.mesh import make_mesh, num_replicas, row_share, shard_batch, use_mesh
from xattn.parallel.watchdog import watchdog
from xattn.train.init_from import InitFrom, fit_pretrained, load_pretrained, start_from
from xattn.train.plan import check_layout, make_plan, misfits_named
from xattn.train.reporting import NotFinite, Reporter


class Preempted(BaseException):
    """The run was asked to stop (SIGTERM) and has saved its state. No `Exception`, lest a handler of errors take it."""


def train(config: Config, workdir: Path, debug_nans: bool = False) -> dict[str, Any]:
    """Trains, or continues, the run of `config` in `workdir`; returns the results of its evaluations.

    Args:
      config: as one of `configs/` gives it.
      workdir: is created, or continued if it holds the same experiment.
      debug_nans: stop at the first NaN and say which line made it; steps are slower.

    Raises:
      UsageError: something in the config, the data or the workdir that the user can put right.
      NotFinite: more than `config.max_skipped` updates in a row were not finite, or a NaN with `debug_nans`.
      Preempted: after SIGTERM, once a checkpoint is written, or while evaluating.
    """
    # Mesh, data, model, step, evaluations: all that can be wrong in a config is found before anything is written.
    began = time.perf_counter()
    flags = {"--workdir": str(workdir), "--debug-nans": str(debug_nans)}
    distributed.check_same("the start", _by_key(config) | flags)
    check_config(config)
    check_options(config.mesh.to_dict(), make_mesh, "config.mesh")
    mesh = make_mesh(**config.mesh)
    check_layout(config, mesh)
    if debug_nans and config.mode == "pmap":
        raise UsageError("--debug-nans looks into the step of the mode 'jit': leave config.mode out.")
    host, hosts = row_share(mesh)
    source = data.build(config.data.to_dict(), split="train")
    pipeline = config.pipeline.to_dict() | {"seed": config.seed}
    data.batches(source, pipeline)  # refuses what the source cannot give
    key = jax.random.key(config.seed)
    plan = make_plan(config, mesh)
    with misfits_named():
        for where, spec in _evaluations(config).items():
            evals.check(spec, plan.model, config, where)
    given = None  # the weights of another run, if this one starts from them
    check_options(config.init_from.to_dict(), InitFrom, "config.init_from")
    init_from = InitFrom(**config.init_from.to_dict())
    if init_from.workdir and latest_step(workdir) is None:
        given = fit_pretrained(load_pretrained(init_from), plan.state, init_from)
    if jax.process_count() > 1:
        distributed.check_same("the step", {"the program of a step": _hash(plan.lowered.as_text())})

    # From here on the workdir is this run's alone.
    with open_workdir(workdir, config):
        metric = config.validation.metric if config.validation else None
        saved = Checkpoints(workdir, keep=config.checkpoint.keep, metric=metric)
        with (
            _asked_to_stop() as stop_after,
            watchdog(config.watchdog_seconds) as turn,
            use_mesh(mesh),
            closing(saved) as checkpoints,
        ):
            restored = checkpoints.restore_latest(plan.state.inference_part(), plan.state.training_part())
            state = plan.create(key) if restored is None else replace(plan.state, **restored[1], **restored[2])
            if given and restored is None:
                state = start_from(given, state)
            start = int(state.step)

            with Reporter(workdir, start, config.num_steps, config.pipeline.batch_size, config.max_skipped) as report:
                for note in plan.notes:
                    report.say(f"not sharded: {note}")
                report.say(_summary(config, state, mesh, workdir, start))

                # The step, compiled ahead so that its time is told apart from the training's.
                update = _naming_nans(jax.jit(plan.train_step)) if debug_nans else plan.lowered.compile()
                report.say(f"ready for the first step after {time.perf_counter() - began:.1f} s")

                # The loop: update, log, validate, save.
                place = pmap.shard_by_device if config.mode == "pmap" else shard_batch
                batches = data.batches(
                    source,
                    pipeline,
                    start_step=start,
                    num_steps=config.num_steps - start,
                    process_index=host,
                    process_count=hosts,
                )
                for step, batch in enumerate(batches, start=start + 1):
                    turn()
                    state, metrics = update(state, place(batch, mesh), key)
                    last, stopping = step == config.num_steps, stop_after(step)
                    if step % config.log_every == 0 or last:
                        report.train_row(step, metrics)
                    validated = None
                    if config.validation and (step % config.validation.every == 0 or last):
                        validated = _validate(config, plan.model, state)
                        report.validation_row(step, validated)
                    if validated or step % config.checkpoint.every == 0 or last or stopping:
                        report.flush()
                        report.check(step, metrics)  # a state that takes no more updates is not to be continued
                        meta = {"config_hash": config_hash(config)}
                        checkpoints.save(step, state.inference_part(), state.training_part(), meta, validated)
                    if stopping:
                        raise Preempted(f"stopped at step {step}; the same command continues from there.")
                report.plot_curves()
                if stats := jax.local_devices()[0].memory_stats():  # a CPU has none
                    report.say(f"peak memory of a device: {stats['peak_bytes_in_use'] / 2**20:,.0f} MiB")
        if stop_after(config.num_steps + 1):
            raise Preempted(f"stopped at step {config.num_steps}; the same command continues from there.")

        # Evaluation of the checkpoint that `xattn.load` gives.
        with on_sigterm("stopped while evaluating; the same command continues from there."):
            return evals.evaluate_workdir(workdir)


def _evaluations(config: Config) -> dict[str, dict[str, Any]]:
    """The evaluations by their place in the config; that of `config.validation` without when and what to compare."""
    specs = {f"config.evals.{name}": spec for name, spec in config.evals.to_dict().items()}
    if config.validation:
        spec = {key: value for key, value in config.validation.to_dict().items() if key not in ("every", "metric")}
        specs["config.validation"] = spec
    return specs


def _by_key(config: Config) -> dict[str, str]:
    """A hash of every key of the config, so that one that differs between processes can be named."""
    return {f"config.{key}": _hash(json.dumps(value, sort_keys=True)) for key, value in config.to_dict().items()}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _validate(config: Config, model: Any, state: Any) -> dict[str, float]:
    spec = _evaluations(config)["config.validation"]
    variables = {"params": state.ema or state.params, **state.model_state}
    result = evals.run(spec, model, variables, config)
    return {name: value for name, value in result.items() if isinstance(value, float)}


def _summary(config: Config, state: Any, mesh: Any, workdir: Path, start: int) -> str:
    count = sum(np.prod(leaf.shape, dtype=int) for leaf in jax.tree.leaves(state.params))
    shape = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1) or "1 device"
    shape += f" on {jax.process_count()} processes" if jax.process_count() > 1 else ""
    where = f"continues at step {start}" if start else "starts"
    batch = config.pipeline.batch_size
    per_replica = batch // (num_replicas(mesh) * config.accumulate_steps)
    return (
        f"{config.model.name}: {count:,} parameters, {shape}, batch {batch} ({per_replica} a replica and "
        f"microbatch), {config.num_steps} steps; {where} in {workdir}"
    )


@contextmanager
def _asked_to_stop() -> Iterator[Callable[[int], bool]]:
    """Tells after each step whether to save and stop, to every process of a run after the same one.

    `jax.distributed` takes the SIGTERM of one process to the others, which agree on a step that none has done yet.
    """
    if jax.distributed.is_initialized():
        yield multihost_utils.reached_preemption_sync_point
    else:
        stop = threading.Event()
        with _handled(lambda *_: stop.set()):
            yield lambda step: stop.is_set()


def _naming_nans(step_fn: Callable[..., Any]) -> Callable[..., Any]:
    """The step, which raises `NotFinite` with the line of our code that made a NaN.

    jax finds it by running the step again, operation by operation: `step_fn` must not give its arguments away.
    """

    def update(state: Any, *rest: Any) -> Any:
        try:
            with jax.debug_nans(True):
                return step_fn(state, *rest)
        except FloatingPointError as error:
            libraries = tuple(library.__path__[0] for library in (jax, flax, optax))
            frames = [x for x in traceback.extract_tb(error.__traceback__) if not x.filename.startswith(libraries)]
            where = f"{frames[-1].filename}:{frames[-1].lineno}, in {frames[-1].name}"
            raise NotFinite(f"step {int(state.step) + 1}: {str(error).splitlines()[0]}, at {where}") from error

    return update


@contextmanager
def on_sigterm(message: str) -> Iterator[None]:
    """Raises `Preempted` at once on SIGTERM: where there is nothing to save."""

    def stop(*_: Any) -> None:
        raise Preempted(message)

    with _handled(stop):
        yield


@contextmanager
def _handled(handler: Callable[..., None]) -> Iterator[None]:
    """Calls `handler` on SIGTERM; outside the main thread, where signals can't be caught, it does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
