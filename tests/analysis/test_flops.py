"""FLOPs of layers whose counts fit on a line, of control flow, and of a whole network against XLA's own count."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from xattn.analysis import count_flops
from xattn.layers.transformer import EncoderLayer
from xattn.parallel.mesh import without_names

X = jax.ShapeDtypeStruct((3, 5, 8), jnp.float32)


def flops_of(module: nn.Module, *shapes: tuple[int, ...]) -> Counter[str]:
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    variables = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return count_flops(module.apply, variables, *inputs)


# Layers


def test_dense_counts_two_for_each_weight_and_row():
    counts = flops_of(nn.Dense(7), (3, 5, 8))
    assert counts.total() == 2 * (3 * 5) * 8 * 7


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(features=6, kernel_size=(3, 3)), 2 * (8 * 8) * (3 * 3 * 4) * 6),
        (dict(features=6, kernel_size=(3, 3), strides=2), 2 * (4 * 4) * (3 * 3 * 4) * 6),
        (dict(features=6, kernel_size=(3, 3), padding="VALID"), 2 * (6 * 6) * (3 * 3 * 4) * 6),
        (dict(features=6, kernel_size=(5, 1), feature_group_count=2), 2 * (8 * 8) * (5 * 1 * 2) * 6),
        (dict(features=4, kernel_size=(3, 3), feature_group_count=4), 2 * (8 * 8) * (3 * 3) * 4),  # depthwise
    ],
)
def test_convolutions_count_two_for_each_weight_and_output_position(options, expected):
    assert flops_of(nn.Conv(**options), (2, 8, 8, 4)).total() == 2 * expected


def test_batched_products_and_einsum():
    query, key = jnp.zeros((2, 5, 3, 8)), jnp.zeros((2, 7, 3, 8))
    counts = count_flops(lambda q, k: jnp.einsum("bnhd,bmhd->bhnm", q, k), query, key)
    assert counts.total() == 2 * (2 * 3 * 5 * 7) * 8


def test_elementwise_work_is_not_counted():
    assert count_flops(lambda x: jax.nn.softmax(jnp.tanh(x) * 2 + 1), X).total() == 0


# Control flow


def product(x):
    return x @ jnp.ones((8, 8))


ONE = 2 * (3 * 5) * 8 * 8


def test_a_scan_counts_its_trips_also_when_nested():
    def twice(x, _):
        return jax.lax.scan(lambda x, _: (product(x), None), x, None, length=2)[0], None

    assert count_flops(lambda x: jax.lax.scan(twice, x, None, length=5)[0], X).total() == 10 * ONE
    assert count_flops(lambda x: jax.lax.fori_loop(0, 4, lambda _, x: product(x), x), X).total() == 4 * ONE


def test_calls_count_once_for_each_call():
    jitted = jax.jit(product)
    assert count_flops(lambda x: jitted(jitted(x)), X).total() == 2 * ONE

    @jax.custom_vjp
    def custom(x):
        return product(x)

    custom.defvjp(lambda x: (custom(x), x), lambda x, g: (g,))
    assert count_flops(custom, X).total() == ONE
    assert count_flops(jax.vmap(product), X).total() == ONE


def test_rematerialisation_is_counted_where_it_happens():
    weights = jnp.ones((8, 8))

    def loss(weights, x):
        return jnp.sum(jnp.tanh(jnp.tanh(x @ weights) @ weights))

    forward, backward = 2 * ONE, 3 * ONE  # both products; the gradients of both weights and of one input
    assert count_flops(loss, weights, X).total() == forward
    assert count_flops(jax.checkpoint(loss), weights, X).total() == forward
    assert count_flops(jax.grad(loss), weights, X).total() == forward + backward
    # The second product is needed by nobody but its tanh, whose derivative needs its value: both run again.
    assert count_flops(jax.grad(jax.checkpoint(loss)), weights, X).total() == 2 * forward + backward


def test_cond_counts_its_dearest_branch():
    def branches(i, x):
        return jax.lax.switch(i, [lambda x: x, lambda x: product(product(x)), product], x)

    assert count_flops(branches, 0, X).total() == 2 * ONE
    # The dearest as a whole, not the dearest of each module.
    looped = lambda i, x: jax.lax.scan(lambda x, _: (branches(i, x), None), x, None, length=3)[0]  # noqa: E731
    assert count_flops(looped, 0, X).total() == 6 * ONE


@pytest.mark.parametrize("where", ["body", "condition"])
def test_a_loop_of_unknown_length_around_a_product_is_refused(where):
    def until(x):
        if where == "body":
            return jax.lax.while_loop(lambda x: jnp.sum(x) < 1e3, product, x)
        return jax.lax.while_loop(lambda x: jnp.sum(product(x)) < 1e3, lambda x: x + 1, x)

    with pytest.raises(ValueError, match=f"loop of unknown length around {ONE} FLOPs"):
        count_flops(until, X)
    assert count_flops(lambda x: jax.lax.while_loop(lambda x: jnp.sum(x) < 1e3, lambda x: x + 1, x), X).total() == 0


# Modules


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(8, name="inner")(x), None


class Network(nn.Module):
    """A plain, a rematerialised and a scanned part."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="first")(x)
        x, _ = nn.remat(Block)(name="again")(x, None)
        layers = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return layers(name="layers")(x, None)[0]


def test_work_is_split_by_module():
    assert flops_of(Network(), (3, 5, 8)) == {
        "Network/first": ONE,
        "Network/again/inner": ONE,
        "Network/layers/inner": 3 * ONE,
    }
    assert count_flops(product, X) == {"": ONE}


def test_an_unrolled_network_counts_what_xla_counts():
    """Within one percent, since XLA counts elementwise work too; nothing of this size is run."""
    rows, width = 2 * 64, 512
    layer = EncoderLayer(num_heads=2, mlp_dim=4 * width)
    x = jax.ShapeDtypeStruct((2, 64, width), jnp.float32)
    variables = without_names(jax.eval_shape(layer.init, jax.random.key(0), x))

    def network(variables, x):
        for _ in range(3):
            x = layer.apply(variables, x)
        return x

    ours = count_flops(network, variables, x).total()
    projections, attention = 2 * rows * width * (4 * width + 2 * 4 * width), 2 * 2 * rows * 64 * width
    assert ours == 3 * (projections + attention)
    theirs = jax.jit(network).lower(variables, x).cost_analysis()["flops"]
    np.testing.assert_allclose(ours, theirs, rtol=0.01)
