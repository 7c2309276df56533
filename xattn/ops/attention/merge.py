"""Joins attention over two disjoint sets of keys into attention over their union."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Partial = tuple[Float[Array, "*B N H Dv"], Float[Array, "*B H N"]]


def merge(a: Partial, b: Partial) -> Partial:
    """Exact attention over the union of two key sets from the normalised result over each.

    With weights w_i = exp(L_i) / (exp(L_1) + exp(L_2)):  o = w_1 o_1 + w_2 o_2,
    L = log(exp(L_1) + exp(L_2)). Associative and commutative; the identity is (0, -inf), which is
    also what a row without any key has.

    Args:
      a: output [*B, N, H, Dv] and log-sum-exp of the scores [*B, H, N].
      b: the same for the other keys.

    Returns:
      Output and log-sum-exp, in float32 (or wider if given so).
    """
    (out_a, lse_a), (out_b, lse_b) = a, b
    shift = jax.lax.stop_gradient(jnp.maximum(lse_a, lse_b))
    shift = jnp.where(jnp.isfinite(shift), shift, 0)
    mass_a, mass_b = jnp.exp(lse_a - shift), jnp.exp(lse_b - shift)
    mass = mass_a + mass_b
    some = jnp.where(mass == 0, 1, mass)

    def share(mass: jax.Array) -> jax.Array:
        return jnp.swapaxes(mass / some, -1, -2)[..., None]

    out = share(mass_a) * out_a + share(mass_b) * out_b
    return out, jnp.where(mass == 0, -jnp.inf, shift + jnp.log(some))
