"""Tables of tensors: how the arrays of published weights become the leaves of variables, and back.

A table maps a source's name to a `Tensor`. `read` takes every name exactly once and fills every leaf, `write` is its
inverse; both say what does not fit by name.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict

from xattn.config import UsageError


class Tensor(NamedTuple):
    """How a source's tensor of `shape` becomes the leaves at `paths`, and how they become the tensor."""

    shape: tuple[int, ...]
    paths: tuple[str, ...]
    read: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    write: Callable[..., np.ndarray]


# Tensors that no forward pass reads: name to (shape, initial value).
Unused = Mapping[str, tuple[tuple[int, ...], np.generic]]

# Regular expressions and what takes the place of what they find, applied one after the other to the path of a leaf.
Rules = Sequence[tuple[str, str | Callable[[re.Match], str]]]


def vector(size: int, path: str) -> Tensor:
    """A tensor of one axis, copied."""
    return Tensor((size,), (path,), lambda x: (x,), lambda x: x)


def linear(name: str, path: str, rows: int, columns: int) -> dict[str, Tensor]:
    """torch's Linear from `columns` to `rows` features: the kernel is transposed."""
    return {
        f"{name}.weight": Tensor((rows, columns), (f"params/{path}/kernel",), lambda w: (w.T,), lambda w: w.T),
        f"{name}.bias": vector(rows, f"params/{path}/bias"),
    }


def conv(name: str, path: str, inputs: int, outputs: int, size: int) -> dict[str, Tensor]:
    """torch's Conv2d without its bias: kernel OIHW to HWIO."""
    kernel = Tensor(
        (outputs, inputs, size, size),
        (f"params/{path}/kernel",),
        lambda w: (w.transpose(2, 3, 1, 0),),
        lambda w: w.transpose(3, 2, 0, 1),
    )
    return {f"{name}.weight": kernel}


def norm(name: str, path: str, size: int) -> dict[str, Tensor]:
    """torch's LayerNorm."""
    return {
        f"{name}.weight": vector(size, f"params/{path}/scale"),
        f"{name}.bias": vector(size, f"params/{path}/bias"),
    }


def batch_norm(name: str, path: str, size: int) -> dict[str, Tensor]:
    """torch's BatchNorm without its counter."""
    return norm(name, path, size) | {
        f"{name}.running_mean": vector(size, f"batch_stats/{path}/mean"),
        f"{name}.running_var": vector(size, f"batch_stats/{path}/var"),
    }


def of_leaf(path: str, shape: tuple[int, ...], torch: bool) -> Tensor:
    """The tensor of one leaf. Heads of attention are one axis of the source, and torch's kernels are transposed."""
    *_, layer, leaf = path.split("/")
    flat = shape
    if layer in ("query", "key", "value"):
        flat = (*shape[:-2], shape[-2] * shape[-1])
    elif layer == "out" and leaf == "kernel":
        flat = (shape[0] * shape[1], shape[2])
    if not torch or leaf != "kernel":
        return Tensor(flat, (path,), lambda x: (x.reshape(shape),), lambda x: x.reshape(flat))
    # [in, out] or HWIO to [out, in] or OIHW
    there, back = {2: ((1, 0), (1, 0)), 4: ((3, 2, 0, 1), (2, 3, 1, 0))}[len(flat)]
    return Tensor(
        tuple(flat[axis] for axis in there),
        (path,),
        lambda x: (x.transpose(back).reshape(shape),),
        lambda x: x.reshape(flat).transpose(there),
    )


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """One tensor that holds tensors of one shape one after another along its first axis, as packed q, k and v."""
    rows, *rest = parts[0].shape
    return Tensor(
        (len(parts) * rows, *rest),
        tuple(path for part in parts for path in part.paths),
        lambda x: tuple(part.read(block)[0] for part, block in zip(parts, np.split(x, len(parts)), strict=True)),
        lambda *leaves: np.concatenate([part.write(leaf) for part, leaf in zip(parts, leaves, strict=True)]),
    )


def rename(path: str, rules: Rules) -> str:
    """The source's name of the leaf at `path`, without its collection."""
    for pattern, name in rules:
        path = re.sub(pattern, name, path)
    return path


def of_model(model: nn.Module, rules: Rules, torch: bool, **inputs: Any) -> dict[str, Tensor]:
    """The tensors of all leaves of a model by the source's names.

    Args:
      model: of which only the shapes are computed.
      rules: how paths of leaves become the source's names.
      torch: as of `of_leaf`.
      **inputs: arrays, or their shapes, that the model takes.

    Raises:
      UsageError: the model does not take them.
    """
    try:
        shapes = jax.eval_shape(model.init, jax.random.key(0), **inputs)
    except ValueError as error:  # what ops and libraries say of arguments that don't fit
        raise UsageError(f"the config gives no model: {str(error).splitlines()[0]}") from error
    leaves: Any = flatten_dict(meta.unbox(shapes), sep="/")
    return {rename(path.partition("/")[2], rules): of_leaf(path, leaf.shape, torch) for path, leaf in leaves.items()}


def read(tensors: Mapping[str, Tensor], arrays: Mapping[str, np.ndarray], unused: Unused | None = None) -> dict:
    """Variables of a source's arrays, float32.

    Unused tensors must be there too; those that differ from their initial values are kept in the collection
    "released", so that `write` gives every bit again.

    Raises:
      UsageError: missing, surplus and wrongly shaped tensors, each named.
    """
    unused = unused or {}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    shapes |= {name: shape for name, (shape, _) in unused.items()}
    problems = [f"missing {name}" for name in shapes if name not in arrays]
    problems += [f"surplus {name}" for name in arrays if name not in shapes]
    problems += [
        f"{name} has shape {list(arrays[name].shape)} instead of {list(shape)}"
        for name, shape in shapes.items()
        if name in arrays and arrays[name].shape != shape
    ]
    if problems:
        raise UsageError(f"The weights do not fit the config in {len(problems)} tensors: {'; '.join(problems)}.")
    leaves = {}
    for name, tensor in tensors.items():
        parts = tensor.read(arrays[name].astype(np.float32))
        leaves |= {path: jnp.asarray(part) for path, part in zip(tensor.paths, parts, strict=True)}
    variables = unflatten_dict(leaves, sep="/")
    kept = {name: arrays[name] for name, (_, value) in unused.items() if (arrays[name] != value).any()}
    return variables | ({"released": kept} if kept else {})


def write(
    tensors: Mapping[str, Tensor], variables: Mapping[str, Any], unused: Unused | None = None
) -> dict[str, np.ndarray]:
    """The source's arrays of variables that `read` could have made.

    Raises:
      UsageError: leaves that are missing, each named.
    """
    tree: dict[str, Any] = meta.unbox(dict(variables))
    kept = tree.pop("released", {})
    leaves = {path: np.asarray(leaf) for path, leaf in flatten_dict(tree, sep="/").items()}
    if missing := [path for tensor in tensors.values() for path in tensor.paths if path not in leaves]:
        raise UsageError(f"The variables do not fit the config: they lack {', '.join(missing)}.")
    arrays = {
        name: np.ascontiguousarray(tensor.write(*(leaves[path] for path in tensor.paths)))
        for name, tensor in tensors.items()
    }
    for name, (shape, value) in (unused or {}).items():
        arrays[name] = np.asarray(kept.get(name, np.full(shape, value)), value.dtype)
    return arrays
