"""Products in the precision that XLA leaves out on CPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xattn.layers.cross_attention import CrossAttention
from xattn.ops.attention import dot_product_attention
from xattn.ops.products import BFLOAT16, einsum


def arrays(*shapes: tuple[int, ...]) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def rounded(x: jax.Array) -> jax.Array:
    return x.astype(jnp.bfloat16).astype(jnp.float32)


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("nc,cf->nf", ((7, 32), (32, 5))),
        ("...nd,...md->...nm", ((2, 3, 7, 32), (2, 3, 6, 32))),
        ("...nm,...md->...nd", ((2, 7, 32), (2, 32, 5))),
    ],
)
class TestBfloat16:
    def test_operands_are_rounded_and_sums_are_not(self, equation, shapes):
        a, b = arrays(*shapes)
        with jax.default_matmul_precision(BFLOAT16):
            found = einsum(equation, a, b)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, jnp.einsum(equation, rounded(a), rounded(b)), rtol=1e-5, atol=1e-5)
        assert np.abs(found - einsum(equation, a, b)).max() > 1e-3

    def test_gradients_round_the_cotangent_too_but_not_the_result(self, equation, shapes):
        a, b = arrays(*shapes)
        (towards,) = arrays(jnp.einsum(equation, a, b).shape)
        with jax.default_matmul_precision(BFLOAT16):
            found = jax.vjp(lambda a, b: einsum(equation, a, b), a, b)[1](towards)
        expected = jax.vjp(lambda a, b: jnp.einsum(equation, a, b), rounded(a), rounded(b))[1](rounded(towards))
        for x, y in zip(found, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
            assert np.abs(x - rounded(x)).max() > 0

    def test_other_precisions_change_nothing(self, equation, shapes):
        a, b = arrays(*shapes)
        with jax.default_matmul_precision("bfloat16"):
            np.testing.assert_array_equal(einsum(equation, a, b), jnp.einsum(equation, a, b))
        np.testing.assert_array_equal(einsum(equation, a, b), jnp.einsum(equation, a, b))


@pytest.mark.parametrize("implementation", ["xla", "chunked"])
def test_attention_multiplies_bfloat16_under_jaxs_precision(implementation):
    query, key, value = arrays((1, 6, 2, 32), (1, 9, 2, 32), (1, 9, 2, 32))

    def attend(*qkv):
        return dot_product_attention(*qkv, implementation=implementation)

    with jax.default_matmul_precision(BFLOAT16):
        text = jax.jit(attend).lower(query, key, value).as_text()
        found = attend(query, key, value)
    assert "bf16" in text
    assert 1e-5 < np.abs(found - attend(query, key, value)).max() < 2e-2


def test_every_product_of_a_layer_is_of_bfloat16():
    x, context = arrays((2, 6, 16), (2, 9, 24))
    layer = CrossAttention(num_heads=2, attention="xla")
    variables = layer.init(jax.random.key(0), x, context)
    with jax.default_matmul_precision(BFLOAT16):
        text = jax.jit(layer.apply).lower(variables, x, context).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 6 and all("bf16" in line for line in products)
