"""Activations whose gradients keep less than automatic differentiation would."""

import functools

import jax
from jaxtyping import Array, Float


def gelu(x: Float[Array, "..."], *, approximate: bool) -> Float[Array, "..."]:
    """`jax.nn.gelu`, x Phi(x) (arXiv 1606.08415), or its tanh approximation, which keeps x alone for its gradient.

    Else each of Phi's parts would be written to memory and read again, which takes longer than to compute them twice.
    """
    return jax.checkpoint(functools.partial(jax.nn.gelu, approximate=approximate))(x)
