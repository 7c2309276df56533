"""ProtoNet against the nearest class mean, one distance at a time."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.variables import normal, random_variables
from xattn.models import build

CONFIG = dict(name="protonet", encoder=dict(name="conv4", widths=(4, 4, 4, 4), num_groups=2), scale=3.0)


def episode(*batch):
    support = normal(*batch, 3, 2, 16, 16, 1, seed=0)
    query = normal(*batch, 5, 16, 16, 1, seed=1)
    return support, query


def test_logits_are_scaled_distances_to_class_means():
    model = build(CONFIG)
    support, query = episode(2)
    variables = random_variables(model, support, query)
    logits = jax.jit(model.apply)(variables, support, query)["logits"]

    features = jax.jit(lambda v, x: model.apply(v, x, method="features"))
    fs, fq = features(variables, support), features(variables, query)
    again = jax.jit(lambda v, s, q: model.apply(v, s, q, method="classify"))(variables, fs, fq)["logits"]
    np.testing.assert_allclose(again, logits, rtol=1e-5)

    fs, fq = np.asarray(fs), np.asarray(fq)
    for b in range(2):
        for i in range(5):
            for c in range(3):
                distance = np.mean((fq[b, i] - fs[b, c].mean(0)) ** 2)
                np.testing.assert_allclose(logits[b, i, c], -3.0 * distance, rtol=1e-5)


def test_is_inductive_and_says_so():
    model = build(CONFIG)
    support, query = episode()
    variables = random_variables(model, support, query)
    assert not model.transductive and model.independent_features
    logits = jax.jit(model.apply)(variables, support, query)["logits"]
    alone = jax.jit(model.apply)(variables, support, query[3:4])["logits"]
    np.testing.assert_allclose(alone, logits[3:4], rtol=1e-5)


def test_batch_norm_sees_support_and_query_as_one_batch():
    model = build(CONFIG | dict(encoder=CONFIG["encoder"] | dict(norm="batch")))
    support, query = episode()
    variables = random_variables(model, support, query)
    state = jax.jit(lambda v, s, q: model.apply(v, s, q, train=True, mutable=["batch_stats"])[1])
    expected = jax.jit(lambda v, x: model.apply(v, x, train=True, method="features", mutable=["batch_stats"])[1])
    state = state(variables, support, query)
    expected = expected(variables, jnp.concatenate([support.reshape(-1, 16, 16, 1), query]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state, expected)
