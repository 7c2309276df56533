"""What ours is compared with: the same layers in plain jax.numpy and in torch, written once over both.

A library is a namespace of `params` (a Linen parameter tree to its own arrays, kernels flattened to two axes), `array`,
`linear`, `layer_norm`, `gelu`, `attend` (query [B, N, H, D], key and value [B, M, H, D] to [B, N, H, D]), `program` (a
function and its arguments to a `Program`) and `gradients`. Layers take the library first.
"""

import importlib
import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import meta
from jaxtyping import Array, Float

from xattn.bench.measure import Program, Row, jitted


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Standard normal float32 values [*shape]."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def variables(model: nn.Module, *inputs: Any, seed: int = 0, **keywords: Any) -> dict[str, Any]:
    """Variables of the shapes of `model.init`, drawn by NumPy, none of them at its initial 0 or 1."""
    rng = np.random.default_rng(seed)
    shapes: Any = meta.unbox(jax.eval_shape(lambda *x: model.init(jax.random.key(0), *x, **keywords), *inputs))

    def fill(path: tuple, leaf: Any) -> jax.Array:
        noise = rng.standard_normal(leaf.shape, np.float32)
        if path[-1].key in ("scale", "var"):
            return jnp.asarray(np.exp(0.1 * noise))
        if path[-1].key != "kernel":
            return jnp.asarray(0.1 * noise)
        reads_two_axes = len(leaf.shape) == 3 and path[-2].key == "out"
        fan_in = leaf.size // leaf.shape[-1] if len(leaf.shape) == 4 or reads_two_axes else leaf.shape[0]
        return jnp.asarray(noise / math.sqrt(fan_in))

    return jax.tree_util.tree_map_with_path(fill, shapes)


def plain_attention(
    query: Float[Array, "B N H D"], key: Float[Array, "B M H D"], value: Float[Array, "B M H D"]
) -> Float[Array, "B N H D"]:
    """What one writes by hand."""
    scores = jnp.einsum("bnhd,bmhd->bhnm", query, key) * query.shape[-1] ** -0.5
    return jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(scores, axis=-1), value)


def flatten(params: Mapping[str, Any], make: Callable[[Any], Any], transpose: bool = False, name: str = "") -> Any:
    """The tree with kernels [in, out] and biases [out]; a kernel `out` has all axes but its last on the input side."""
    flat = {}
    for key, node in params.items():
        if isinstance(node, Mapping):
            flat[key] = flatten(node, make, transpose, key)
        elif key == "kernel":
            two = node.reshape(-1, node.shape[-1]) if name == "out" else node.reshape(node.shape[0], -1)
            flat[key] = make(two.T if transpose else two)
        else:
            flat[key] = make(node.reshape(-1) if key in ("bias", "scale") else node)
    return flat


def jnp_library(dtype: str = "f32", attend: Callable[..., Any] = plain_attention) -> SimpleNamespace:
    """jax.numpy with an attention function."""

    def layer_norm(x: Any, p: Any, epsilon: float) -> Any:
        wide = x.astype(jnp.float32)
        mean, variance = wide.mean(-1, keepdims=True), wide.var(-1, keepdims=True)
        return ((wide - mean) * jax.lax.rsqrt(variance + epsilon)).astype(x.dtype) * p["scale"] + p["bias"]

    array = array_of(dtype)
    return SimpleNamespace(
        array=array,
        params=lambda params: flatten(params, array),
        linear=lambda x, p: x @ p["kernel"] + p["bias"] if "bias" in p else x @ p["kernel"],
        layer_norm=layer_norm,
        gelu=lambda x, approximate: jax.nn.gelu(x, approximate=approximate),
        attend=attend,
        program=jitted,
        gradients=gradients,
    )


def gradients(function: Callable[..., Any], towards: Any, params: Any, *arguments: Any) -> Program:
    """The program that pulls `towards` back through `function(params, *arguments)`."""

    def run(towards: Any, *arguments: Any) -> Any:
        return jax.vjp(function, *arguments)[1](towards)

    def view(outputs: Any) -> Any:
        return [(flatten(p, lambda x: x), *others) for p, *others in outputs]

    return jitted(run, towards, params, *arguments, view=view)


def array_of(dtype: str) -> Callable[[Any], jax.Array]:
    """Makes arrays of the dtype "f32" or "bf16"."""
    return lambda x: jnp.asarray(x, jnp.bfloat16 if dtype == "bf16" else jnp.float32)


def torch_package() -> Any:
    """torch, or an ImportError where it cannot use the accelerator that JAX uses."""
    torch = importlib.import_module("torch")
    if jax.default_backend() != "cpu":
        if not torch.cuda.is_available():
            raise ImportError("this torch cannot use the accelerator")
        torch.backends.cudnn.benchmark = True  # it tries algorithms for convolutions, as XLA does when it compiles
    return torch


def tensor_of(dtype: str) -> Callable[[Any], Any]:
    """Makes contiguous tensors of the dtype "f32" or "bf16", where JAX computes."""
    torch = torch_package()
    device, kind = "cpu" if jax.default_backend() == "cpu" else "cuda", {"f32": torch.float32, "bf16": torch.bfloat16}
    return lambda x: torch.from_numpy(np.array(x, np.float32, order="C")).to(device, kind[dtype])


def torch_library(dtype: str = "f32") -> SimpleNamespace:
    """torch with `scaled_dot_product_attention`."""
    functional, tensor = torch_package().nn.functional, tensor_of(dtype)
    sdpa = functional.scaled_dot_product_attention
    return SimpleNamespace(
        array=tensor,
        params=lambda params: flatten(params, tensor, transpose=True),
        linear=lambda x, p: functional.linear(x, p["kernel"], p.get("bias")),
        layer_norm=lambda x, p, epsilon: functional.layer_norm(x, x.shape[-1:], p["scale"], p["bias"], epsilon),
        gelu=lambda x, approximate: functional.gelu(x, approximate="tanh" if approximate else "none"),
        attend=lambda *qkv: sdpa(*(x.transpose(1, 2) for x in qkv)).transpose(1, 2),
        program=torch_program,
        gradients=torch_gradients,
    )


def torch_program(function: Callable[..., Any], *arguments: Any) -> Program:
    """The program `function(*arguments)` without gradients."""
    torch = torch_package()

    def run() -> Any:
        with torch.inference_mode():
            return function(*arguments)

    return Program(run, from_torch, wait=finished)


def torch_gradients(function: Callable[..., Any], towards: Any, *arguments: Any) -> Program:
    """As `gradients`."""
    torch = torch_package()
    leaves, treedef = jax.tree.flatten(arguments)
    for leaf in leaves:
        leaf.requires_grad_()

    def run() -> Any:
        return torch.autograd.grad(function(*arguments), leaves, towards)

    def view(outputs: Any) -> Any:
        trees = [jax.tree.unflatten(treedef, from_torch(grads)) for grads in outputs]
        return [(flatten(p, lambda x: x, transpose=True), *others) for p, *others in trees]

    return Program(run, view, wait=finished)


def torch_training(optimizer: Any, loss_of: Any, dtype: str) -> Program:
    """A program whose every call is one training step; its output is the loss.

    Parameters are float32; for "bf16" torch's autocast chooses what is computed in bfloat16.
    """
    torch = torch_package()
    where = "cpu" if jax.default_backend() == "cpu" else "cuda"

    def run() -> Any:
        with torch.autocast(where, torch.bfloat16, enabled=dtype == "bf16"):
            loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return Program(run, from_torch, wait=finished)


def finished(outputs: Any) -> Any:
    """`outputs`, once an accelerator has computed them."""
    torch = torch_package()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return outputs


def from_torch(outputs: Any) -> Any:
    """The tensors of a tree as float32 NumPy arrays."""
    return jax.tree.map(lambda x: x.detach().float().cpu().numpy(), outputs)


def load(module: Any, state_dict: Mapping[str, np.ndarray], dtype: str = "f32") -> Any:
    """A torch module with these weights, where JAX computes; the arrays are copied."""
    torch, tensor = torch_package(), tensor_of(dtype)
    module.load_state_dict({name: torch.from_numpy(np.array(x)) for name, x in state_dict.items()})
    some = tensor(np.zeros(()))
    return module.to(some.device, some.dtype)


def rows(make: Callable[[Any], Program], dtype: str) -> list[Row]:
    """The rows of a program that is written over a library."""
    jax_nn = jax.nn.dot_product_attention
    return [
        Row("plain jnp", "reference", lambda: make(jnp_library(dtype))),
        Row("jax.nn.dot_product_attention", "reference", lambda: make(jnp_library(dtype, jax_nn))),
        Row("torch sdpa", "peer", lambda: make(torch_library(dtype)), package="torch"),
    ]


def heads(lib: Any, p: Any, x: Any, num_heads: int) -> Any:
    """A projection of x [B, N, C] split into heads [B, N, H, D]."""
    y = lib.linear(x, p)
    return y.reshape(*y.shape[:-1], num_heads, -1)


def keys_values(lib: Any, p: Any, context: Any, num_heads: int) -> tuple[Any, Any]:
    """Keys and values [B, M, H, D] of a context [B, M, C]."""
    return heads(lib, p["key"], context, num_heads), heads(lib, p["value"], context, num_heads)


def attention(lib: Any, p: Any, x: Any, kv: tuple[Any, Any], num_heads: int) -> Any:
    """Multi-head attention of x [B, N, C] over keys and values."""
    out = lib.attend(heads(lib, p["query"], x, num_heads), *kv)
    return lib.linear(out.reshape(*x.shape[:-1], -1), p["out"])


def mlp(lib: Any, p: Any, x: Any, names: tuple[str, str], approximate: bool) -> Any:
    """Two linear layers with GELU between them."""
    return lib.linear(lib.gelu(lib.linear(x, p[names[0]]), approximate), p[names[1]])
