"""Runs the evaluations of a workdir's config, keeps their results, compares two runs pair by pair."""

import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from xattn import data, tasks
from xattn.checkpoints import read_config
from xattn.checkpoints.workdir import load_variables
from xattn.config import Config, UsageError, check_options, lookup, write_atomically
from xattn.evals.autoencoding import autoencoding, check_autoencoding, describe_autoencoding, draw_clip
from xattn.evals.classification import check_classification, classification, describe_classification
from xattn.evals.episode_picture import draw_episode
from xattn.evals.fewshot import check_fewshot, describe_fewshot, fewshot, half_width
from xattn.evals.flow_picture import draw_flow
from xattn.evals.masked_language import check_masked_language, describe_masked_language, masked_language
from xattn.evals.optical_flow import check_optical_flow, describe_optical_flow, optical_flow
from xattn.models import build
from xattn.parallel.distributed import check_same, exchange, fetch, first
from xattn.parallel.mesh import evaluation_mesh, make_mesh, num_replicas, state_shardings, use_mesh
from xattn.parallel.watchdog import watchdog


class Protocol(NamedTuple):
    """What the report needs to know of an evaluation protocol.

    Attributes:
      run: (model, variables, config, /, **keywords) to a result: float metrics by name, `metric` (which of them
        is the main one), its `ci95`, `per_example` values, and `examples`, which tells one set of them from another.
      check: (model, config, **keywords); raises `UsageError` for what `run` would refuse.
      describe: a result to the text of the table's last column.
      draw: (model, variables, config, path, keywords) to a picture of one example.
      scale: factor of the main metric where it is printed, 100 for a share.
    """

    run: Callable[..., dict[str, Any]]
    check: Callable[..., None]
    describe: Callable[[Mapping[str, Any]], str]
    draw: Callable[..., Path] | None = None
    scale: float = 100.0


EVALS = {
    "autoencoding": Protocol(autoencoding, check_autoencoding, describe_autoencoding, draw_clip, scale=1.0),
    "classification": Protocol(classification, check_classification, describe_classification),
    "fewshot": Protocol(fewshot, check_fewshot, describe_fewshot, draw_episode),
    "masked_language": Protocol(masked_language, check_masked_language, describe_masked_language),
    "optical_flow": Protocol(optical_flow, check_optical_flow, describe_optical_flow, draw_flow, scale=1.0),
}

# Keywords of `Protocol.run` that are not the spec's.
_GIVEN = ("model", "variables", "config")


def run(spec: Mapping[str, Any], model: nn.Module, variables: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """The result of one evaluation; `spec` holds the protocol's `name` and its keywords."""
    options = dict(spec)
    protocol = lookup(EVALS, options.pop("name", None), "evaluation").run
    check_options(options, protocol, "config.evals", _GIVEN)
    result = protocol(model, variables, config, **options)
    if not math.isfinite(result[result["metric"]]):
        logging.warning(
            "the %s of an evaluation is %s: is the model broken?", result["metric"], result[result["metric"]]
        )
    return result


def check(spec: Mapping[str, Any], model: nn.Module, config: Config, where: str) -> None:
    """Raises `UsageError` if `run` would refuse `spec`, before any time is spent."""
    options = dict(spec)
    protocol = lookup(EVALS, options.pop("name", None), "evaluation")
    check_options(options, protocol.run, where, _GIVEN)
    protocol.check(model, config, **options)


def evaluate_workdir(workdir: Path, step: int | str = "best", only: str | None = None) -> dict[str, dict[str, Any]]:
    """Runs every evaluation of the run's config, prints their table and keeps `evals/<step>/<name>.json`.

    A result that is already there for the same step and the same settings is read, not computed again. Several
    processes share the examples out; process 0 alone reads and writes results and pictures.

    Args:
      workdir: a trained run.
      step: see `xattn.load`.
      only: the name of one evaluation, or None for all.

    Raises:
      UsageError: no run, no checkpoint, no such evaluation, or processes that were asked for different ones.
      PeerLost: another process did not come to the end of the evaluation.
    """
    check_same("the evaluation", {"--workdir": str(workdir), "--step": str(step), "--only": str(only)})
    config = read_config(workdir)
    specs = config.evals.to_dict()
    if only is not None:
        specs = {only: lookup(specs, only, "evaluation in this config")}
    if not specs:
        return {}
    model = build(config.model.to_dict(), dtype=config.dtype)
    mesh = evaluation_mesh(**config.mesh)
    found, variables = load_variables(workdir, step, shardings=functools.partial(_shardings, model, config, mesh))
    check_same("the checkpoint", {"the step that is intact": str(found)})
    folder = workdir / "evals" / str(found)
    kept = first("the results that are there", lambda: _kept(folder, specs))
    results = {}
    for name, spec in specs.items():
        if name in kept:
            results[name] = kept[name]
            continue
        with use_mesh(mesh), watchdog(config.watchdog_seconds):
            result = run(spec, model, variables, config)
        text = json.dumps({"spec": spec, "step": found, **result})
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / f"{name}.json", text)
        results[name] = json.loads(text)
    if jax.process_index() == 0:
        _print_results(f"{workdir}, step {found}", results)
    pictures = _pictures(workdir, found, specs)
    missing = first("the pictures", lambda: [kind for kind, (_, path) in pictures.items() if not path.is_file()])
    due = [kind for kind, (name, _) in pictures.items() if kind in missing or name not in kept]
    if due:
        whole = jax.tree.map(fetch, variables)
        for kind in due if jax.process_index() == 0 else ():
            name, path = pictures[kind]
            draw: Any = EVALS[kind].draw
            with use_mesh(make_mesh(data=1)):
                print(f"an example of {kind}: {draw(model, whole, config, path, specs[name])}")
    exchange("the end of the evaluation", "")
    return results


def _pictures(workdir: Path, step: int, specs: Mapping[str, Any]) -> dict[str, tuple[str, Path]]:
    """For each protocol that draws, the first evaluation by it and where its picture goes."""
    names = {spec["name"]: name for name, spec in reversed(list(specs.items()))}
    drawn = [kind for kind, protocol in EVALS.items() if protocol.draw and kind in names]
    return {kind: (names[kind], workdir / "plots" / f"{kind}_{step}.png") for kind in drawn}


def _shardings(model: nn.Module, config: Config, mesh: Mesh, saved: Any) -> Any:
    """Where the arrays of a checkpoint's model go: whole to every device, or split as in training."""
    whole = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), saved)
    if num_replicas(mesh) == mesh.shape["data"] == mesh.size:
        return whole
    task, key = tasks.build(config.task.to_dict()), jax.random.key(0)
    batch = data.batch_shapes(config.data.to_dict(), config.pipeline.to_dict())
    with use_mesh(mesh):
        named = jax.eval_shape(lambda batch: model.init({"params": key, "dropout": key}, *task.inputs(batch)), batch)
    params, _ = state_shardings(named["params"], mesh)
    return whole | {name: params for name in ("params", "ema") if saved[name]}


def _kept(folder: Path, specs: Mapping[str, Any]) -> dict[str, Any]:
    """The results of a folder that were computed with the same settings."""
    paths = {name: path for name in specs if (path := folder / f"{name}.json").is_file()}
    results = {}
    for name, path in paths.items():
        try:
            results[name] = json.loads(path.read_text())
        except ValueError as error:
            logging.warning("%s is damaged (%s): it is computed again.", path, error)
    return {name: old for name, old in results.items() if old["spec"] == json.loads(json.dumps(specs[name]))}


def compare_workdirs(
    workdir: Path, against: Path, step: int | str = "best", only: str | None = None
) -> dict[str, dict[str, float]]:
    """Evaluates two runs and prints their paired differences on the examples that they share.

    An evaluation is compared with the one of the same name if its examples are the same, else with the first whose
    examples are: so a transductive and an inductive evaluation of one model both meet an inductive other.

    Returns:
      For each shared evaluation, `difference` of the mean metrics and `ci95` of the paired difference.

    Raises:
      UsageError: the two runs were evaluated on no common examples.
    """
    mine, theirs = _models_only(evaluate_workdir(workdir, step, only)), _models_only(evaluate_workdir(against, step))
    table = Table(title=f"{workdir} minus {against}\non the same examples, pair by pair")
    for column in ("evaluation", "against", "difference", "95% interval"):
        table.add_column(column)
    rows = {}
    for name, result in mine.items():
        shared = [other for other, reference in theirs.items() if reference["examples"] == result["examples"]]
        if not shared:
            continue
        other = name if name in shared else shared[0]
        gaps = np.subtract(result["per_example"], theirs[other]["per_example"])
        rows[name] = {"difference": float(gaps.mean()), "ci95": half_width(gaps)}
        scale = EVALS[result["spec"]["name"]].scale
        table.add_row(name, other, f"{scale * gaps.mean():+.2f}", f"+- {scale * half_width(gaps):.2f}")
    if not rows:
        raise UsageError(f"{workdir} and {against} share no examples: give their configs the same evals.")
    if jax.process_index() == 0:
        _console().print(table)
    return rows


def _models_only(results: Mapping[str, Any]) -> dict[str, Any]:
    return {name: result for name, result in results.items() if result["spec"].get("method", "model") == "model"}


def _print_results(title: str, results: Mapping[str, Mapping[str, Any]]) -> None:
    table = Table(title=title)
    for column in ("evaluation", "result", "95% interval", "examples", ""):
        table.add_column(column)
    for name, result in results.items():
        protocol = EVALS[result["spec"]["name"]]
        unit = f"{result['metric']}, %" if protocol.scale == 100 else result["metric"]
        table.add_row(
            name,
            f"{protocol.scale * result[result['metric']]:.2f} ({unit})",
            f"+- {protocol.scale * result['ci95']:.2f}",
            str(len(result["per_example"])),
            protocol.describe(result),
        )
    _console().print(table)


def _console() -> Console:
    console = Console()
    # A pipe or a log has no width of its own: never fold a row there.
    return console if console.is_terminal else Console(width=120)
