"""Transport plans against linear programming, float64 Sinkhorn and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from scipy.special import logsumexp

from tests.variables import normal
from xattn.ops import emd

emd_scores = jax.jit(emd.emd_scores, static_argnames=("temperature", "solver", "epsilon", "iterations"))
pearson_similarity, node_weights, exact_plan = map(jax.jit, (emd.pearson_similarity, emd.node_weights, emd.exact_plan))
sinkhorn_plan = jax.jit(emd.sinkhorn_plan, static_argnames=("epsilon", "iterations"))


@pytest.fixture(scope="module")
def images():
    """Forty pairs of 5x5 maps, from unrelated to alike, so that scores vary as those of real images do."""
    rng = np.random.default_rng(0)
    mix, common = rng.uniform(0, 1, (40, 1, 1)), rng.normal(size=(40, 1, 64))
    pair = (rng.normal(size=(40, 25, 64)) + mix * common for _ in range(2))
    return [jnp.asarray(x[:, None], jnp.float32) for x in pair]


@pytest.fixture(scope="module")
def exact(images):
    return np.asarray(emd_scores(*images, solver="exact"))


@pytest.mark.parametrize(
    "epsilon, iterations, bias, worst",
    [(0.1, 50, (-1.3, -0.8), 1.4), (0.05, 50, (-0.6, -0.3), 0.7), (0.02, 200, (-0.13, -0.05), 0.2)],
)
def test_sinkhorn_is_below_the_linear_programme_by_a_known_offset(images, exact, epsilon, iterations, bias, worst):
    error = np.asarray(emd_scores(*images, epsilon=epsilon, iterations=iterations)) - exact
    assert bias[0] < error.mean() < bias[1]
    assert error.max() < 0.01
    assert np.abs(error).max() < worst


@pytest.mark.parametrize("epsilon, iterations", [(0.05, 50), (0.02, 200), (0.02, 37), (0.01, 100)])
def test_float32_scaling_equals_float64_log_domain(epsilon, iterations):
    rng = np.random.default_rng(1)
    cost = rng.uniform(0, 2, (8, 16, 16)).astype(np.float32)
    masses = np.exp(rng.uniform(-9, 2, (2, 8, 16)))
    w1, w2 = (16 * masses / masses.sum(-1, keepdims=True)).astype(np.float32)
    plan = sinkhorn_plan(*map(jnp.asarray, (cost, w1, w2)), epsilon=epsilon, iterations=iterations)

    cost, w1, w2 = (x.astype(np.float64) for x in (cost, w1, w2))
    f = cost.min(2)
    g = (cost - f[:, :, None]).min(1)
    for _ in range(iterations):
        f = epsilon * (np.log(w1) - logsumexp((g[:, None, :] - cost) / epsilon, axis=2))
        g = epsilon * (np.log(w2) - logsumexp((f[:, :, None] - cost) / epsilon, axis=1))
    oracle = np.exp((f[:, :, None] + g[:, None, :] - cost) / epsilon)
    np.testing.assert_allclose(plan, oracle, atol=1e-3)


def test_plan_has_the_masses_as_marginals(images):
    similarity = pearson_similarity(*images)
    w1, w2 = node_weights(*images)
    np.testing.assert_allclose(w1.sum(-1), 25, rtol=1e-6)
    np.testing.assert_allclose(w2.sum(-1), 25, rtol=1e-6)
    for plan, atol in (
        (exact_plan(1 - similarity, w1, w2), 1e-5),
        (sinkhorn_plan(1 - similarity, w1, w2, epsilon=0.05, iterations=300), 1e-3),
    ):
        np.testing.assert_allclose(plan.sum(-1), w1, atol=atol)
        np.testing.assert_allclose(plan.sum(-2), w2, atol=atol)
        np.testing.assert_allclose(plan.sum((-2, -1)), 25, rtol=1e-5)
        assert (plan >= 0).all()


def test_exact_plan_of_equal_masses_is_the_best_assignment():
    cost = np.random.default_rng(2).uniform(0, 2, (3, 6, 6)).astype(np.float32)
    plan = np.asarray(exact_plan(jnp.asarray(cost), jnp.ones((3, 6)), jnp.ones((3, 6))))
    for c, p in zip(cost, plan, strict=True):
        expected = np.zeros((6, 6))
        expected[linear_sum_assignment(c)] = 1
        np.testing.assert_allclose(p, expected, atol=1e-6)


def test_node_weights_by_hand():
    rng = np.random.default_rng(3)
    q, s = rng.normal(size=(2, 3, 4)), rng.normal(size=(5, 3, 4))
    w1, w2 = node_weights(jnp.asarray(q, jnp.float32), jnp.asarray(s, jnp.float32))
    for i in range(2):
        for j in range(5):
            for weights, own, other in ((w1, q[i], s[j]), (w2, s[j], q[i])):
                expected = np.maximum(own @ other.mean(0), 0) + 1e-3 + 1e-5
                np.testing.assert_allclose(weights[i, j], 3 * expected / expected.sum(), rtol=1e-4)


@pytest.mark.parametrize("solver, atol", [("exact", 1e-4), ("sinkhorn", 0.05)])
def test_equal_images_score_the_temperature(images, solver, atol):
    scores = emd_scores(images[0], images[0], temperature=12.5, solver=solver, epsilon=0.02, iterations=200)
    np.testing.assert_allclose(scores, 12.5, atol=atol)


def test_similarity_is_a_correlation(images):
    query, support = images
    similarity = pearson_similarity(query, support)
    np.testing.assert_allclose(similarity, pearson_similarity(query + 7, 3 * support - 2), atol=1e-4)
    expected = np.corrcoef(query[4, 0], support[4, 0])[:25, 25:]
    np.testing.assert_allclose(similarity[4, 0, 0], expected, atol=1e-5)


@pytest.mark.parametrize("solver", emd.SOLVERS)
def test_gradient_keeps_the_plan_fixed(images, solver):
    query, support = images[0][:2], images[1][:2]
    similarity = pearson_similarity(query, support)
    if solver == "exact":
        plan = exact_plan(1 - similarity, *node_weights(query, support))
    else:
        plan = sinkhorn_plan(1 - similarity, *node_weights(query, support), epsilon=0.05, iterations=50)

    def with_fixed_plan(query, support):
        return 12.5 / 25 * (pearson_similarity(query, support) * plan).sum()

    got = jax.jit(jax.grad(lambda *x: emd.emd_scores(*x, solver=solver).sum(), (0, 1)))(query, support)
    for gradient, expected in zip(got, jax.jit(jax.grad(with_fixed_plan, (0, 1)))(query, support), strict=True):
        assert jnp.abs(expected).max() > 1e-3
        np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_constant_map_has_a_finite_gradient():
    constant, other = jnp.ones((1, 4, 3)), normal(1, 4, 3, seed=0)
    gradient = jax.jit(jax.grad(lambda *x: emd.emd_scores(*x).sum(), (0, 1)))(constant, other)
    assert all(jnp.isfinite(x).all() for x in gradient)


def test_leading_axes_are_separate_episodes(images):
    query, support = (x[:6].reshape(2, 3, 25, 64) for x in images)
    together = emd_scores(query, support)
    alone = jnp.stack([emd_scores(query[i], support[i]) for i in range(2)])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_bad_arguments_are_named(images):
    with pytest.raises(ValueError, match="solver 'opencv' is none of sinkhorn, exact"):
        emd_scores(*images, solver="opencv")
    with pytest.raises(ValueError, match="epsilon 0.001 is below 0.01"):
        emd_scores(*images, epsilon=0.001)
