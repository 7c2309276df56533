"""Products of two arrays as `jnp.einsum`, also in the precision that XLA leaves out on CPUs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

BFLOAT16 = "BF16_BF16_F32"


def einsum(equation: str, a: Float[Array, "..."], b: Float[Array, "..."], dtype: Any = None) -> Float[Array, "..."]:
    """`jnp.einsum(equation, a, b)`; under JAX's matmul precision "BF16_BF16_F32" so on CPUs as well.

    `jax.default_matmul_precision("BF16_BF16_F32")` (or the variable JAX_DEFAULT_MATMUL_PRECISION) multiplies float32
    operands as bfloat16 and sums in float32. XLA does so on accelerators, but multiplies float32 on CPUs, some of which
    do twice as many products of bfloat16. Here, float32 operands are rounded there, as the cotangent is backward;
    results and gradients are float32, and derivatives are in reverse mode only.

    Args:
      equation: with two operands, an ellipsis only for equal axes of both, and no letter that only one operand has and
        the result lacks.
      a, b: of one dtype.
      dtype: of the result and, at least, of the sum; that of the operands by default.
    """
    if a.dtype == b.dtype == jnp.float32 and _rounds():
        return _rounded_einsum(equation, a, b)
    return jnp.einsum(equation, a, b, preferred_element_type=dtype or a.dtype)


def _rounds() -> bool:
    precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    return precision == BFLOAT16 and jax.default_backend() == "cpu"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounded_einsum(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _forward(equation: str, a: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _rounded_einsum(equation, a, b), (a, b)


def _backward(equation: str, operands: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, ...]:
    of_a, of_b, of_result = equation.replace("->", ",").split(",")
    a, b = operands
    return (
        _rounded_einsum(f"{of_result},{of_b}->{of_a}", cotangent, b),
        _rounded_einsum(f"{of_result},{of_a}->{of_b}", cotangent, a),
    )


_rounded_einsum.defvjp(_forward, _backward)
