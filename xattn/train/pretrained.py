"""Starting a run from the weights of another: fine-tuning, at another resolution or for other classes.

Arrays of the same name and shape are taken over. Of the others,

    pos_embed*   trained positions [1, 1 + n^2, C] are resized to the grid of the new model (bicubic)
    head*        classifiers for another number of classes start anew
"""

from collections.abc import Mapping
from dataclasses import replace
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


def load_pretrained(workdir: Path) -> dict[str, np.ndarray]:
    """The arrays of another run's best checkpoint, by their path in the variables; not to be called under a mesh.

    Raises:
      UsageError: no run, or it has no checkpoint.
    """
    _, variables = load_variables(workdir, "best")
    given: dict[str, Any] = flatten_dict(jax.device_get(variables), sep="/")
    return given


def fit_pretrained(given: Mapping[str, np.ndarray], abstract: TrainState) -> dict[str, Any]:
    """The arrays of `load_pretrained` that a new state takes over, in its shapes.

    Raises:
      UsageError: an array that is missing, surplus or of another shape and is none of those named above.
    """
    wanted: dict[str, Any] = flatten_dict({"params": abstract.params, **abstract.model_state}, sep="/")
    fitted = {}
    for path in sorted(wanted.keys() | given.keys()):
        names = path.split("/")[1:]
        if path in wanted and path in given and wanted[path].shape == given[path].shape:
            fitted[path] = given[path]
        elif any(name.startswith("head") for name in names):
            continue
        elif path in wanted and path in given and names[-1].startswith("pos_embed"):
            fitted[path] = resize_tokens(jnp.asarray(given[path]), wanted[path].shape[1])
        else:
            held, asked = (tuple(tree[path].shape) if path in tree else "nothing" for tree in (given, wanted))
            raise UsageError(
                f"config.pretrained holds {held} for {path}, this model has {asked} there: "
                "make config.model the same but for image sizes and classes."
            )
    return fitted


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
