"""Pooling against Linen's, and BatchNorm over a mapped axis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests.variables import normal
from xattn.layers import convolution
from xattn.layers.convolution import conv, image_norm, in_groups, max_pool
from xattn.parallel.mesh import make_mesh


@pytest.mark.parametrize("count", [1, 8, 19, 160])
def test_a_large_kernels_gradient_is_summed_over_groups_of_images(count, monkeypatch):
    layer, x, towards = conv(5, 3, name="conv"), normal(count, 4, 6, 3), normal(count, 4, 6, 5, seed=1)
    variables = layer.init(jax.random.key(0), x)

    def gradients():
        return jax.jit(jax.grad(lambda v, x: jnp.vdot(layer.apply(v, x), towards), argnums=(0, 1)))

    def convolutions(gradients):
        return str(jax.make_jaxpr(gradients)(variables, x)).count(" = conv_general_dilated[")

    whole, number = gradients()(variables, x), convolutions(gradients())
    monkeypatch.setattr(convolution, "LARGE", 1)
    groups = -(-count // max(8, -(-count // 16)))
    assert convolutions(gradients()) - number == groups - 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradients()(variables, x), whole)
    with jax.set_mesh(make_mesh(data=4)):
        assert convolutions(gradients()) == number


@pytest.mark.parametrize(
    "batch, cache, groups", [((7,), 2**25, 1), ((2, 3), 1, 6), ((7,), 4 * 4 * 5 * 6 * 3, 3), ((40,), 1, 14)]
)
def test_images_are_encoded_in_groups_that_the_cache_holds(batch, cache, groups, monkeypatch):
    """Six features: a map has 4 x 5 x 6 numbers of 4 bytes. There are 16 groups at most, so 14, of 3 of 40 images."""
    monkeypatch.setattr(convolution, "CACHE", cache)
    images, seen = normal(*batch, 4, 5, 3), []

    def encode(x):
        seen.append(x.shape)
        return x.sum(-1), x.reshape(*x.shape[:-3], -1)

    sums, flat = in_groups(encode, images, 6)
    np.testing.assert_array_equal(sums, images.sum(-1))
    np.testing.assert_array_equal(flat, images.reshape(*batch, -1))
    assert len(seen) == groups
    seen.clear()
    with jax.set_mesh(make_mesh(data=4)):
        in_groups(encode, images, 6)
    assert seen == [images.shape]


@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
def test_max_pool_equals_linens_with_its_gradient(size):
    x = normal(2, 3, *size, 2, seed=0)

    def linens(x):
        return nn.max_pool(x, (2, 2), strides=(2, 2))

    np.testing.assert_array_equal(max_pool(x), linens(x))
    got, expected = (jax.grad(lambda x, f=f: jnp.square(f(x)).sum())(x) for f in (max_pool, linens))
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_max_pool_passes_the_whole_gradient_on_inside_a_fused_program():
    """Where an input is computed again with another rounding, no gradient may get lost: the weights of a
    linear map of the pooled values must all arrive."""
    x = normal(4, 8, 8, 3, seed=1)

    @jax.jit
    def total(scale):
        hidden = jax.nn.relu((x * scale - x.mean((1, 2), keepdims=True)) / (x.std((1, 2), keepdims=True) + 0.1) + 0.7)
        return jnp.sum(max_pool(hidden))

    scale = jnp.full((4, 8, 8, 3), 1.1)
    got = jax.jit(jax.grad(total))(scale)
    windows = (np.abs(np.asarray(got)) > 0).reshape(4, 4, 2, 4, 2, 3).sum((2, 4))
    pooled = max_pool((x * scale - x.mean((1, 2), keepdims=True)) / (x.std((1, 2), keepdims=True) + 0.1) + 0.7)
    np.testing.assert_array_equal(windows, (pooled > 0).astype(int))


class Norm(nn.Module):
    kind: str
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train):
        return image_norm(x, kind=self.kind, num_groups=2, train=train, axis_name=self.axis_name, name="norm")


def test_batch_norm_averages_over_all_leading_axes_and_a_mapped_one():
    x = 3 + 2 * normal(2, 3, 4, 4, 4, seed=0)
    variables = Norm("batch").init(jax.random.key(0), x, False)
    out, state = Norm("batch").apply(variables, x, True, mutable=["batch_stats"])
    mean, variance = x.mean((0, 1, 2, 3)), x.var((0, 1, 2, 3))
    np.testing.assert_allclose(out, (x - mean) / jnp.sqrt(variance + 1e-5), atol=1e-5)
    np.testing.assert_allclose(state["batch_stats"]["norm"]["mean"], 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(state["batch_stats"]["norm"]["var"], 0.9 + 0.1 * variance, rtol=1e-5)

    def shard(x):
        return Norm("batch", "devices").apply(variables, x, True, mutable=["batch_stats"])

    mapped, mapped_state = jax.vmap(shard, axis_name="devices")(x)
    np.testing.assert_allclose(mapped, out, atol=1e-5)
    np.testing.assert_allclose(
        mapped_state["batch_stats"]["norm"]["var"][1], state["batch_stats"]["norm"]["var"], rtol=1e-5
    )


def test_group_norm_looks_at_one_image():
    x = 3 + 2 * normal(2, 3, 4, 4, 4, seed=0)
    out = Norm("group").apply(Norm("group").init(jax.random.key(0), x, True), x, True)
    groups = x.reshape(2, 3, 16, 2, 2)
    expected = (groups - groups.mean((2, 4), keepdims=True)) / jnp.sqrt(groups.var((2, 4), keepdims=True) + 1e-5)
    np.testing.assert_allclose(out, expected.reshape(x.shape), atol=1e-5)


def test_unknown_norm_is_named():
    with pytest.raises(ValueError, match="norm 'layer' is none of batch, group"):
        Norm("layer").init(jax.random.key(0), jnp.zeros((1, 4, 4, 4)), False)
