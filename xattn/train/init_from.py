"""Starting a run from the weights of another: fine-tuning, of the whole or of a part, under other names.

`config.init_from` says which run, which of its arrays, and where they go; its keys are the fields of `InitFrom`.
Arrays of the same name and shape are taken over, rounded to this model's dtypes. Of those of another shape,

    pos_embed*   trained positions [1, 1 + n^2, C] are resized to the grid of the new model (bicubic)
    head*        classifiers for another number of classes start anew
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from xattn.checkpoints.workdir import load_variables
from xattn.config import UsageError
from xattn.layers.vit import resize_tokens
from xattn.train.state import TrainState


@dataclass(frozen=True)
class InitFrom:
    """What a run starts from; a name is the path of a module or array, such as "encoder/block_0".

    Attributes:
      workdir: the other run; "" for none.
      step: "best", "latest" or a number.
      take: what to take of the other run; everything if there is none.
      rename: name in the other run -> name in this model; of two that fit, the longer one.
      fresh: what starts anew in this model.
    """

    workdir: str = ""
    step: str | int = "best"
    take: tuple[str, ...] = ()
    rename: Mapping[str, str] = field(default_factory=dict)
    fresh: tuple[str, ...] = ()


def load_pretrained(spec: InitFrom) -> dict[str, np.ndarray]:
    """The arrays to take of another run, by their path in this model's variables; not to be called under a mesh.

    Raises:
      UsageError: no run, or no such checkpoint, or `take` or `rename` names nothing in it.
    """
    on_host = functools.partial(jax.tree.map, lambda _: _host())
    _, variables = load_variables(Path(spec.workdir), spec.step, shardings=on_host)
    held: dict[str, Any] = flatten_dict(jax.device_get(variables), sep="/")
    for key in ("take", "rename"):
        for name in getattr(spec, key):
            if not any(_within(path, name) for path in held):
                raise UsageError(f"config.init_from.{key} has '{name}', but {spec.workdir} holds nothing of this name.")
    taken = {path: array for path, array in held.items() if not spec.take or any(_within(path, x) for x in spec.take)}
    given = {_renamed(path, spec.rename): array for path, array in taken.items()}
    if len(given) < len(taken):
        raise UsageError("config.init_from.rename gives two arrays one name: take only one of them.")
    return given


def _host() -> jax.sharding.Sharding:
    """The host, which has room for a model that is split over devices; the first device where jax may not use it."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        device = jax.local_devices()[0]
    return jax.sharding.SingleDeviceSharding(device)


def fit_pretrained(given: Mapping[str, np.ndarray], abstract: TrainState, spec: InitFrom) -> dict[str, Any]:
    """The arrays of `load_pretrained` that a new state takes over, in its shapes.

    Raises:
      UsageError: an array that is missing, surplus or of another shape, is none of those named above and not `fresh`;
        or `fresh` names nothing.
    """
    wanted: dict[str, Any] = flatten_dict({"params": abstract.params, **abstract.model_state}, sep="/")
    for name in spec.fresh:
        if not any(_within(path, name) for path in wanted):
            raise UsageError(f"config.init_from.fresh has '{name}', but this model has nothing of this name.")
    fitted = {}
    for path in sorted(wanted.keys() | given.keys()):
        names = path.split("/")[1:]
        if any(_within(path, name) for name in spec.fresh):
            continue
        elif path in wanted and path in given and wanted[path].shape == given[path].shape:
            fitted[path] = given[path]
        elif any(name.startswith("head") for name in names):
            continue
        elif path in wanted and path in given and _grids(names[-1], given[path], wanted[path]):
            fitted[path] = resize_tokens(jnp.asarray(given[path]), wanted[path].shape[1])
        else:
            held, asked = (tuple(tree[path].shape) if path in tree else "nothing" for tree in (given, wanted))
            raise UsageError(
                f"config.init_from gives {held} for {path}, this model has {asked} there: make config.model the same "
                "but for image sizes and classes, or name what differs in config.init_from.take, rename or fresh."
            )
    return fitted


def _grids(name: str, *tokens: Any) -> bool:
    """Whether these are positions [1, N, C] of one C, each of a class token and a square of patches."""
    square = all(x.ndim == 3 and math.isqrt(x.shape[1] - 1) ** 2 == x.shape[1] - 1 for x in tokens)
    return name.startswith("pos_embed") and square and len({x.shape[::2] for x in tokens}) == 1


def _within(path: str, name: str) -> bool:
    """Whether the array at `path`, which begins with its collection, is the one of this name or belongs to it."""
    return f"{path.partition('/')[2]}/".startswith(f"{name}/")


def _renamed(path: str, rename: Mapping[str, str]) -> str:
    fitting = [name for name in rename if _within(path, name)]
    if not fitting:
        return path
    old = max(fitting, key=len)
    collection, _, within = path.partition("/")
    return f"{collection}/{rename[old]}{within.removeprefix(old)}"


def start_from(pretrained: Mapping[str, Any], state: TrainState) -> TrainState:
    """The state of step 0 with the arrays of `fit_pretrained` in their places and shardings, in the average too."""

    def filled(tree: Any, collection: str) -> Any:
        leaves: dict[str, Any] = flatten_dict(tree, sep="/")
        for name, leaf in leaves.items():
            if (new := pretrained.get(f"{collection}/{name}")) is not None:
                # Not from a device: it would be this process's alone. A step gives its arrays away, so none may be
                # two leaves at once.
                leaves[name] = jax.device_put(np.asarray(new, leaf.dtype), leaf.sharding, may_alias=False)
        return unflatten_dict(leaves, sep="/")

    return replace(
        state,
        params=filled(state.params, "params"),
        ema=filled(state.ema, "params"),
        model_state={name: filled(tree, name) for name, tree in state.model_state.items()},
    )
