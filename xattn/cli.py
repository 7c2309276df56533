"""The command line: one verb, its flags, one sentence and exit code 2 for what the user can put right."""

import contextlib
import functools
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags, logging

from xattn import analysis, data, evals, models, tasks, train
from xattn.bench.runner import main as bench
from xattn.checkpoints import DamagedCheckpoint
from xattn.config import UsageError, cache_compiled_programs, config_names, lookup, parse_config
from xattn.data.prepare import PREPARATIONS
from xattn.interop.convert import convert
from xattn.parallel import distributed

USAGE = """usage: xattn VERB [--config=NAME[:VARIANT]] [--config.key=value ...] [flags]

verbs:
  train    --config=NAME [--workdir=DIR]      train, or continue the run in DIR, then evaluate
  eval     --workdir=DIR [--against=DIR]      evaluate a run; compare it with another, episode by episode
  convert  KIND SOURCE WORKDIR [--data=DIR]   published weights to a workdir (docs/weights.md)
  data     prepare images SRC OUT [flags]     class folders to a few large files (docs/data.md)
  inspect  --config=NAME [--json]             parameters, FLOPs, memory and shapes
           --config=NAME --mesh=data=8,fsdp=4 memory and traffic of a step on devices not there
  bench    [--suite=quick] [--only=W1,W2]     xattn beside its peers, as ratios (docs/performance.md)
  list                                        models, tasks, sources, evaluations, configs

`xattn VERB --help` shows the verb's flags. The same command continues a run that was stopped.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code: 0, 1 for a failure, 2 for a mistake in what was asked."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if arguments else 2
    verb, *arguments = arguments
    try:
        if verb not in VERBS:
            raise UsageError(f"there is no verb '{verb}': choose from {', '.join(VERBS)}.")
        return VERBS[verb](arguments)
    except UsageError as error:
        print(f"xattn {verb}: {error}", file=sys.stderr)
        code = 2
    except (train.NotFinite, DamagedCheckpoint, distributed.PeerLost) as error:
        print(f"xattn {verb}: {error}", file=sys.stderr)
        code = 1
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        code = 1
    distributed.leave(code)
    return code


def _parse(
    define: Callable[[flags.FlagValues], None], arguments: list[str], takes_config: bool = False
) -> tuple[flags.FlagValues, str, Any]:
    """The verb's flags, and the config's name and contents where it takes one."""
    values = flags.FlagValues()
    define(values)
    flags.DEFINE_string("cache_dir", None, "folder of caches: glyphs, compiled programs", flag_values=values)
    flags.DEFINE_bool("verbose", False, "log what the libraries do", flag_values=values)
    if {"-h", "--help"} & set(arguments):
        print(USAGE, values.get_help(), sep="\n")
        raise SystemExit(0)
    name: str = ""
    config: Any = None
    if takes_config:
        name, config, arguments = parse_config(arguments)
    try:
        rest = values(["xattn", *(_underscores(argument) for argument in arguments)])[1:]
    except flags.Error as error:
        raise UsageError(f"{error} (`xattn VERB --help` shows the flags)") from error
    if rest:
        raise UsageError(f"'{rest[0]}' is no flag: flags start with --.")
    logging.set_verbosity(logging.INFO if values.verbose else logging.WARNING)
    if values.cache_dir:
        os.environ["XATTN_CACHE"] = values.cache_dir
    cache_compiled_programs()
    return values, name, config


def _define_processes(values: flags.FlagValues) -> None:
    flags.DEFINE_string("coordinator", None, "HOST:PORT where the processes of a run meet", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "how many there are", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("process_id", None, "which of them this is, from 0", lower_bound=0, flag_values=values)


def _underscores(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return name[:2] + name[2:].replace("-", "_") + equals + value


def _train(arguments: list[str]) -> int:
    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_string("workdir", None, "the run's folder (default: runs/NAME)", flag_values=values)
        flags.DEFINE_bool("debug_nans", False, "stop at the first NaN and say where it was made", flag_values=values)
        _define_processes(values)

    values, name, config = _parse(define, arguments, takes_config=True)
    distributed.start(values.coordinator, values.num_processes, values.process_id)
    workdir = Path(values.workdir or f"runs/{name.replace('.py', '').strip('/').replace('/', '_').replace(':', '_')}")
    # Of several processes, jax has to see it.
    alone = not jax.distributed.is_initialized()
    try:
        with train.on_sigterm("stopped before training.") if alone else contextlib.nullcontext():
            train.train(config, workdir, values.debug_nans)
    except train.Preempted as stopped:
        print(stopped)
        distributed.leave(config.preempt_exit_code)  # while evaluating, the others may not have been asked to stop
        return config.preempt_exit_code
    return 0


def _eval(arguments: list[str]) -> int:
    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_string("workdir", None, "a trained or converted run", flag_values=values)
        flags.DEFINE_string("against", None, "another run, compared on the same episodes", flag_values=values)
        flags.DEFINE_string("step", "best", "best, latest, or a number", flag_values=values)
        flags.DEFINE_string("only", None, "one of config.evals", flag_values=values)
        _define_processes(values)

    values, *_ = _parse(define, arguments)
    if values.workdir is None:
        raise UsageError("give --workdir=DIR, the folder of a run.")
    distributed.start(values.coordinator, values.num_processes, values.process_id)
    if values.against:
        evals.compare_workdirs(Path(values.workdir), Path(values.against), values.step, values.only)
    else:
        evals.evaluate_workdir(Path(values.workdir), values.step, values.only)
    return 0


def _convert(arguments: list[str]) -> int:
    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_string("data", None, "the data set's folder, for config.data.root", flag_values=values)

    words = [argument for argument in arguments if not argument.startswith("-")]
    values, *_ = _parse(define, [argument for argument in arguments if argument.startswith("-")])
    if len(words) != 3:
        raise UsageError("give KIND SOURCE WORKDIR and flags as --data=DIR, such as hf_perceiver DIR runs/language.")
    kind, source, workdir = words
    print(convert(kind, Path(source), Path(workdir), Path(values.data) if values.data else None))
    return 0


def _data(arguments: list[str]) -> int:
    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_integer("shards", 16, "files of a split", lower_bound=1, flag_values=values)
        flags.DEFINE_integer("workers", 8, "threads that read ahead", lower_bound=1, flag_values=values)

    words = [argument for argument in arguments if not argument.startswith("-")]
    values, *_ = _parse(define, [argument for argument in arguments if argument.startswith("-")])
    if len(words) != 4 or words[0] != "prepare":
        raise UsageError("give prepare KIND SRC OUT and flags as --shards=16, such as prepare images DIR records.")
    prepare = lookup(PREPARATIONS, words[1], "kind of data to prepare")
    print(prepare(words[2], words[3], values.shards, values.workers))
    return 0


def _inspect(arguments: list[str]) -> int:
    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_bool("json", False, "print one JSON object", flag_values=values)
        flags.DEFINE_string(
            "mesh",
            None,
            "such as data=64,fsdp=4: memory and traffic of a step on devices not there",
            flag_values=values,
        )

    values, _, config = _parse(define, arguments, takes_config=True)
    if values.mesh:
        sizes = analysis.parse_mesh(values.mesh)
        analysis.simulate_devices(math.prod(sizes.values()))
        analysis.show_step_cost(analysis.step_cost(config, sizes), as_json=values.json)
        return 0
    analysis.show(analysis.inspect(config), as_json=values.json)
    return 0


def _list(arguments: list[str]) -> int:
    _parse(lambda values: None, arguments)
    protocols = {name: protocol.run for name, protocol in evals.EVALS.items()}
    tables = {"models": models.MODELS, "tasks": tasks.TASKS, "sources": data.SOURCES, "evals": protocols}
    for title, table in tables.items():
        print(f"{title}:")
        for name, entry in table.items():
            described = entry.func if isinstance(entry, functools.partial) else entry
            print(f"  {name:<24}{(described.__doc__ or '').strip().splitlines()[0]}")
    print("configs:")
    for name in config_names():
        print(f"  {name}")
    return 0


VERBS = {
    "train": _train,
    "eval": _eval,
    "convert": _convert,
    "data": _data,
    "inspect": _inspect,
    "bench": bench,
    "list": _list,
}
