"""Runs the evaluations of a workdir's config, keeps their results, compares two runs pair by pair."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import linen as nn
from rich.console import Console
from rich.table import Table

from xattn.checkpoints import read_config
from xattn.checkpoints.workdir import load_variables, write_atomically
from xattn.config import Config, UsageError, check_keys, lookup
from xattn.evals.episode_picture import draw_episode
from xattn.evals.fewshot import check_fewshot, fewshot, half_width
from xattn.models import build

EVALS = {"fewshot": fewshot}

# Protocol: raises `UsageError` for settings that it would refuse.
CHECKS = {"fewshot": check_fewshot}

# Protocol: draws one example of it, to look at.
PICTURES = {"fewshot": draw_episode}


def run(spec: Mapping[str, Any], model: nn.Module, variables: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """The result of one evaluation; `spec` holds the protocol's `name` and its keywords."""
    options = dict(spec)
    protocol = lookup(EVALS, options.pop("name"), "evaluation")
    check_keys(options, protocol, "config.evals")
    return protocol(model, variables, config, **options)


def check(spec: Mapping[str, Any], model: nn.Module, config: Config, where: str) -> None:
    """Raises `UsageError` if `run` would refuse `spec`, before any time is spent."""
    options = dict(spec)
    name = options.pop("name")
    check_keys(options, lookup(EVALS, name, "evaluation"), where)
    CHECKS[name](model, config, **options)


def evaluate_workdir(workdir: Path, step: int | str = "best", only: str | None = None) -> dict[str, dict[str, Any]]:
    """Runs every evaluation of the run's config, prints their table and keeps `evals/<step>/<name>.json`.

    A result that is already there for the same step and the same settings is read, not computed again.

    Args:
      workdir: a trained run.
      step: see `xattn.load`.
      only: the name of one evaluation, or None for all.

    Raises:
      UsageError: no run, no checkpoint, no such evaluation.
    """
    config = read_config(workdir)
    specs = config.evals.to_dict()
    if only is not None:
        specs = {only: lookup(specs, only, "evaluation in this config")}
    if not specs:
        return {}
    found, variables = load_variables(workdir, step)
    model = build(config.model.to_dict(), dtype=config.dtype)
    results = {}
    for name, spec in specs.items():
        path = workdir / "evals" / str(found) / f"{name}.json"
        if path.is_file() and (kept := json.loads(path.read_text()))["spec"] == json.loads(json.dumps(spec)):
            results[name] = kept
            continue
        text = json.dumps({"spec": spec, "step": found, **run(spec, model, variables, config)})
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
        results[name] = json.loads(text)
    _print_results(f"{workdir}, step {found}", results)
    for protocol, draw in PICTURES.items():
        if spec := next((spec for spec in specs.values() if spec["name"] == protocol), None):
            path = workdir / "plots" / f"{protocol}_{found}.png"
            print(f"an example of {protocol}: {draw(model, variables, config, path, spec)}")
    return results


def compare_workdirs(
    workdir: Path, against: Path, step: int | str = "best", only: str | None = None
) -> dict[str, dict[str, float]]:
    """Evaluates two runs and prints their paired differences on the episodes that they share.

    An evaluation is compared with the one of the same name if its episodes are the same, else with the first whose
    episodes are: so a transductive and an inductive evaluation of one model both meet an inductive other.

    Returns:
      For each shared evaluation, `difference` of the mean accuracies and `ci95` of the paired difference.

    Raises:
      UsageError: the two runs were evaluated on no common episodes.
    """
    mine, theirs = _models_only(evaluate_workdir(workdir, step, only)), _models_only(evaluate_workdir(against, step))
    table = Table(title=f"{workdir} minus {against}, paired on the same episodes, points")
    for column in ("evaluation", "against", "difference", "95% interval"):
        table.add_column(column)
    rows = {}
    for name, result in mine.items():
        shared = [other for other, reference in theirs.items() if reference["episodes"] == result["episodes"]]
        if not shared:
            continue
        other = name if name in shared else shared[0]
        gaps = np.subtract(result["per_episode"], theirs[other]["per_episode"])
        rows[name] = {"difference": float(gaps.mean()), "ci95": half_width(gaps)}
        table.add_row(name, other, f"{100 * gaps.mean():+.2f}", f"+- {100 * half_width(gaps):.2f}")
    if not rows:
        raise UsageError(f"{workdir} and {against} share no episodes: give their configs the same evals.")
    _console().print(table)
    return rows


def _models_only(results: Mapping[str, Any]) -> dict[str, Any]:
    return {name: result for name, result in results.items() if result["spec"].get("method", "model") == "model"}


def _print_results(title: str, results: Mapping[str, Mapping[str, Any]]) -> None:
    table = Table(title=title)
    for column in ("evaluation", "accuracy %", "95% interval", "branches %", "setting", "episodes"):
        table.add_column(column)
    for name, result in results.items():
        branches = ", ".join(
            f"{key.removeprefix('accuracy_')} {100 * value:.2f}"
            for key, value in result.items()
            if key.startswith("accuracy_")
        )
        setting = "transductive" if result["transductive"] else "inductive"
        table.add_row(
            name,
            f"{100 * result['accuracy']:.2f}",
            f"+- {100 * result['ci95']:.2f}",
            branches,
            setting,
            str(result["episodes"]["num_episodes"]),
        )
    _console().print(table)


def _console() -> Console:
    console = Console()
    # A pipe or a log has no width of its own: never fold a row there.
    return console if console.is_terminal else Console(width=120)
