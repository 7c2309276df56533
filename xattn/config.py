"""Configs: find a file by name, override keys, check them against a constructor, save and hash."""

import difflib
import hashlib
import importlib.util
import inspect
import json
import math
import os
import re
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, NamedTuple, Union, get_args, get_origin

from absl import flags
from ml_collections import ConfigDict, config_flags

if TYPE_CHECKING:
    Config = Any  # the attributes of a ConfigDict have no static types
else:
    Config = ConfigDict

# Keys that may change when a run is continued: they do not alter the steps already taken.
RESUMABLE = (
    "num_steps",
    "mesh",
    "mode",
    "evals",
    "validation",
    "log_every",
    "checkpoint",
    "preempt_exit_code",
    "watchdog_seconds",
)


class Keys(NamedTuple):
    """What a run's config holds; docs/architecture.md says what each key means."""

    model: Mapping[str, Any]
    task: Mapping[str, Any]
    data: Mapping[str, Any]
    pipeline: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    num_steps: int
    accumulate_steps: int
    ema_decay: float
    max_skipped: int
    seed: int
    dtype: str
    mesh: Mapping[str, int]
    log_every: int
    checkpoint: Mapping[str, int]
    preempt_exit_code: int
    validation: Mapping[str, Any] | None
    evals: Mapping[str, Mapping[str, Any]]
    init_from: Mapping[str, Any]
    mode: str
    watchdog_seconds: float


# What every run has and few change: a config need not give it.
DEFAULTS = {
    "init_from": {"workdir": "", "step": "best", "take": (), "rename": {}, "fresh": ()},
    "mode": "jit",
    "watchdog_seconds": 1800.0,
}

# The least and the largest value of numbers of a config, and of a mapping's own.
_RANGES = {
    "num_steps": (1, math.inf),
    "accumulate_steps": (1, math.inf),
    "ema_decay": (0, 1),
    "max_skipped": (0, math.inf),
    "seed": (0, math.inf),
    "log_every": (1, math.inf),
    "checkpoint.every": (1, math.inf),
    "checkpoint.keep": (1, math.inf),
    "validation.every": (1, math.inf),
    "preempt_exit_code": (0, 255),
    "watchdog_seconds": (0, math.inf),
}


class UsageError(ValueError):
    """Something that the user can put right; the command line prints its sentence and exits with 2."""


def check_keys(keys: Iterable[str], constructor: Callable, where: str, also: Sequence[str] = ()) -> None:
    """Raises `UsageError` if a key is not a keyword of `constructor`, naming the nearest one.

    Args:
      keys: the keys that a config gives.
      constructor: a class or function; its keyword arguments are what may be given (positional-only
        ones are what the program itself passes).
      where: the config path to name in the message, such as `model.encoder`.
      also: further keys that may be given.
    """
    known = [*also]
    known += [
        parameter.name
        for parameter in inspect.signature(constructor).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and parameter.name not in ("parent", "name")
    ]
    for key in keys:
        if key not in known:
            raise UsageError(f"{where} has no key '{key}': {_nearest(key, known)}")


def check_options(
    options: Mapping[str, Any], constructor: Callable, where: str, given: Sequence[str] = (), also: Sequence[str] = ()
) -> None:
    """Raises `UsageError` unless `constructor` can be called with `options`, by their names and annotated types.

    Args:
      options: keywords and their values.
      constructor, where, also: see `check_keys`.
      given: the keywords that the program itself passes, which `options` may not hold.
    """
    for key in options:
        if key in given:
            raise UsageError(f"{where} has no key '{key}': the program sets it.")
    check_keys(options, constructor, where, also)
    for name, parameter in inspect.signature(constructor).parameters.items():
        if name in ("parent", "name", *given) or parameter.kind not in (
            parameter.POSITIONAL_OR_KEYWORD,
            parameter.KEYWORD_ONLY,
        ):
            continue
        if name not in options:
            if parameter.default is parameter.empty:
                raise UsageError(f"{where} has no '{name}', which it needs: give {_in_words(parameter.annotation)}.")
        elif not _fits(options[name], parameter.annotation):
            value = options[name]
            held = "a mapping" if isinstance(value, Mapping) else " ".join(f"{value!r}".split())[:60]
            raise UsageError(f"{where}.{name} is {held}: give {_in_words(parameter.annotation)}.")


def check_config(config: Config) -> None:
    """Raises `UsageError` unless the keys of a run's config are those that there are, with values of their types.

    What `model`, `task`, `data`, `pipeline`, `optimizer` and the evaluations hold is checked where it is built.
    """
    whole = config.to_dict()
    check_options(whole, Keys, "config")
    lookup(dict.fromkeys(_DTYPES), whole["dtype"], "config.dtype")
    check_options(whole["checkpoint"], _checkpoint, "config.checkpoint")
    for key, function in (("pipeline", _pipeline), ("validation", _validation)):
        if key == "pipeline" or whole[key]:
            own = {name: whole[key][name] for name in inspect.signature(function).parameters if name in whole[key]}
            check_options(own, function, f"config.{key}")
    for path, (least, largest) in _RANGES.items():
        node: Any = whole
        for key in path.split("."):
            node = node.get(key) if isinstance(node, Mapping) else None
        if node is not None and not (isinstance(node, int | float) and least <= node <= largest):
            words = f"at least {least}" if largest == math.inf else f"from {least} to {largest}"
            raise UsageError(f"config.{path} is {node!r}: give a number {words}.")


_DTYPES = ("float32", "bfloat16", "float16")


def _checkpoint(*, every: int, keep: int) -> None: ...


def _pipeline(*, batch_size: int) -> None: ...


def _validation(*, every: int, metric: str | None) -> None: ...


_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text", NoneType: "None"}


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value of a config is of the annotated type. Numbers are finite, and whole ones have 32 bits."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind in (Any, inspect.Parameter.empty):
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in arguments)
    if isinstance(value, bool) and kind in (int, float):
        return False
    if kind is int:
        return isinstance(value, int) and abs(value) < 2**31
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)
    if kind is os.PathLike:
        return isinstance(value, str | os.PathLike)
    if origin is tuple:
        if not isinstance(value, tuple | list):
            return False
        kinds = [arguments[0]] * len(value) if arguments[1:] == (...,) else arguments
        return len(kinds) == len(value) and all(map(_fits, value, kinds))
    if inspect.isclass(origin) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(
            isinstance(key, str) and _fits(entry, arguments[1]) for key, entry in value.items()
        )
    return not inspect.isclass(kind) or isinstance(value, kind)


def _in_words(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_in_words(one) for one in arguments if one is not os.PathLike))
    if origin is tuple:
        number = "some" if arguments[1:] == (...,) else str(len(arguments))
        return f"({number} of: {', '.join(dict.fromkeys(_in_words(one) for one in arguments if one is not ...))})"
    if inspect.isclass(origin) and issubclass(origin, Mapping):
        return f"a mapping of {_in_words(arguments[1])}" if arguments[1] is not Any else "a mapping"
    if kind in _WORDS:
        return _WORDS[kind]
    named = inspect.isclass(kind) and kind not in (Any, inspect.Parameter.empty)
    return f"the config of a {kind.__name__}" if named else "a value"


def lookup(table: Mapping[str, Any], name: Any, what: str) -> Any:
    """`table[name]`, or a `UsageError` that names the nearest entry."""
    if name is None:
        raise UsageError(f"the {what} has no name: give one of {', '.join(table)}.")
    if not isinstance(name, str) or name not in table:
        raise UsageError(f"there is no {what} '{name}': {_nearest(str(name), list(table))}")
    return table[name]


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"choose from {', '.join(known)}."


def cache_dir() -> Path:
    """The one folder for caches: `XATTN_CACHE`, else the platform's cache folder."""
    if folder := os.environ.get("XATTN_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xattn"


def cache_compiled_programs(folder: str = "compiled") -> None:
    """Makes JAX keep every compiled program in a folder of `cache_dir`.

    The environment variable JAX_ENABLE_COMPILATION_CACHE=0 turns it off.
    """
    import jax  # not above: reading a config needs none of it

    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / folder))
    # By default only what took a second to compile is kept, and a program is many small ones.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def configs_dir() -> Path:
    """Where the named configs are: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def config_names() -> list[str]:
    """The names that `--config` takes, such as `qsformer/glyphs`."""
    root = configs_dir()
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.py"))


def config_path(name: str) -> Path:
    """The file of a config given as a path or as a name; `UsageError` names the nearest if there is none."""
    if name.endswith(".py") and Path(name).is_file():
        return Path(name)
    names = config_names()
    if name in names:
        return configs_dir() / f"{name}.py"
    raise UsageError(f"there is no config '{name}': {_nearest(name, names)}")


def load_config(name: str) -> Config:
    """The config `NAME` or `NAME:VARIANT` (a file's path or one of `config_names()`), its keys locked.

    Raises:
      UsageError: no such config or variant.
    """
    path, _, variant = name.partition(":")
    spec = importlib.util.spec_from_file_location("xattn_config", config_path(path))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(variant)
    return with_defaults(config).lock()


def with_defaults(config: Config) -> Config:
    """The config with those of `DEFAULTS` that it does not give."""
    config.update({key: value for key, value in DEFAULTS.items() if key not in config})
    return config


def check_variant(arg: str, allowed: Sequence[str]) -> str:
    """The variant that a config's `get_config(arg)` was asked for: one of `allowed`, or empty."""
    if arg and arg not in allowed:
        raise UsageError(f"this config has no variant '{arg}': {_nearest(arg, allowed)}")
    return arg


def parse_config(argv: Sequence[str]) -> tuple[str, Config, list[str]]:
    """Takes `--config=NAME:VARIANT` and its overrides `--config.key=value` out of a command line.

    Returns `NAME:VARIANT`, the config, and the arguments that are left.

    Raises:
      UsageError: no config is given, no such config, variant or key, or a value of the wrong type.
    """
    name, overrides, rest = None, [], []
    arguments = iter(argv)
    for argument in arguments:
        if re.match(r"--?config(=|$)", argument):
            name = argument.partition("=")[2] if "=" in argument else next(arguments, "")
        elif re.match(r"--?config\.", argument):
            key, equals, value = argument.partition("=")
            # absl would take `--config.flag false` for `--config.flag`, which is true.
            value = value if equals else next(arguments, "--")
            if not equals and value.startswith("--"):
                raise UsageError(f"{key} has no value: write {key}=VALUE.")
            overrides.append(f"{key}={value}")
        else:
            rest.append(argument)
    if not name:
        raise UsageError("give --config=NAME; `xattn list` shows the names.")
    config = load_config(name)
    defaults = config.to_dict()
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=overrides)
        values(["xattn", *overrides])
    except (flags.Error, LookupError, AttributeError, TypeError, ValueError) as error:
        raise UsageError(_override_message(error, overrides, config)) from error
    _check_tuples(defaults, config.to_dict(), "config")
    return name, config, rest


def _check_tuples(before: Any, after: Any, where: str) -> None:
    """A tuple may change its length but not what it holds, which config_flags does not check."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in before.keys() & after.keys():
            _check_tuples(before[key], after[key], f"{where}.{key}")
    elif isinstance(before, tuple) and isinstance(after, tuple) and before:
        allowed = {type(entry) for entry in before}
        allowed |= {int} if float in allowed else set()
        for entry in after:
            if type(entry) not in allowed:
                names = " or ".join(sorted(kind.__name__ for kind in allowed))
                raise UsageError(f"{where} got {entry!r}: give {names} values, such as {','.join(map(str, before))}.")


def _override_message(error: Exception, overrides: Sequence[str], config: Config) -> str:
    for override in overrides:
        path = override.partition("=")[0].lstrip("-").partition(".")[2]
        node: Any = config
        for depth, key in enumerate(path.split(".")):
            if not isinstance(node, ConfigDict) or key not in node:
                where = ".".join(["config", *path.split(".")[:depth]])
                known = list(node) if isinstance(node, ConfigDict) else []
                return f"{where} has no key '{key}': {_nearest(key, known) if known else 'it has no keys.'}"
            node = node[key]
        if node is None or isinstance(node, list):
            return f"config.{path} is {node} and has no type that a value could be read as: change it in a config file."
    return " ".join(str(error.args[0] if error.args else error).split())


def to_json(config: Config) -> str:
    """The resolved config as JSON with sorted keys: what is written to a workdir and hashed."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True)


def from_json(text: str) -> Config:
    """The config that `to_json` wrote (JSON has no tuples: sequences come back as tuples); ValueError for others."""

    def restore(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: restore(entry) for key, entry in value.items()}
        return tuple(restore(entry) for entry in value) if isinstance(value, list) else value

    whole = restore(json.loads(text))
    if not isinstance(whole, dict):
        raise ValueError("it holds no mapping")
    return ConfigDict(whole)


def write_atomically(path: Path, contents: str | bytes) -> None:
    """Writes a file so that `path` holds either the old contents or the new, never a part, also if the power fails."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(contents.encode() if isinstance(contents, str) else contents)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def config_hash(config: Config) -> str:
    """Twelve hex digits of the resolved config's SHA-256."""
    return hashlib.sha256(to_json(config).encode()).hexdigest()[:12]


def differing_keys(old: Config, new: Config) -> list[str]:
    """Dotted keys in which two configs differ, apart from those that a continued run may change."""

    def flat(node: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(node, dict):
            return {prefix: node}
        leaves: dict[str, Any] = {}
        for key, value in node.items():
            leaves |= flat(value, f"{prefix}.{key}" if prefix else key)
        return leaves

    before, after = flat(json.loads(to_json(old))), flat(json.loads(to_json(new)))
    keys = sorted(before.keys() | after.keys())
    missing = object()
    return [
        key
        for key in keys
        if key.split(".")[0] not in RESUMABLE and before.get(key, missing) != after.get(key, missing)
    ]
