"""The masked language loss: hidden bytes count, all of them alike, and nothing else does."""

import jax.numpy as jnp
import numpy as np

from tests.tasks.stand_in import Constant, constant
from tests.variables import normal
from xattn import tasks

HIDDEN = np.array([[1, 0, 0, 0, 0], [0, 1, 1, 1, 0]], bool)
TARGETS = np.array([[1, 2, 3, 4, 5], [6, 0, 1, 2, 3]])


def batch(hidden=HIDDEN):
    return {
        "tokens": jnp.full((2, 5), 3, jnp.int32),
        "targets": jnp.asarray(TARGETS, jnp.int32),
        "loss_mask": jnp.asarray(hidden),
        "input_mask": jnp.ones((2, 5), bool),
    }


def evaluate(logits, hidden=HIDDEN):
    return tasks.build(dict(name="masked_language"))(Constant(), constant(logits), batch(hidden), train=False)


def test_loss_is_the_mean_over_hidden_bytes_of_the_whole_batch():
    """Not a mean of the two texts' means: one of them hides one byte, the other three."""
    logits = normal(2, 5, 7)
    z = np.asarray(logits, np.float64)
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    entropy = -np.take_along_axis(log_p, TARGETS[..., None], -1)[..., 0]
    loss, metrics, _ = evaluate(logits)
    np.testing.assert_allclose(loss, entropy[HIDDEN].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], (z.argmax(-1) == TARGETS)[HIDDEN].mean())


def test_logits_of_visible_bytes_change_nothing():
    logits = normal(2, 5, 7)
    other = jnp.where(HIDDEN[..., None], logits, normal(2, 5, 7, seed=1))
    assert evaluate(logits)[0] == evaluate(other)[0]
    assert evaluate(logits)[1] == evaluate(other)[1]


def test_accuracy_counts_hidden_bytes():
    right = 9.0 * jnp.eye(7)[TARGETS]
    wrong_where_visible = jnp.where(HIDDEN[..., None], right, -right)
    assert evaluate(wrong_where_visible)[1]["accuracy"] == 1
    wrong_in_one_of_four = right.at[1, 2].multiply(-1)
    assert evaluate(wrong_in_one_of_four)[1]["accuracy"] == 0.75


def test_a_batch_without_hidden_bytes_costs_nothing():
    loss, metrics, _ = evaluate(normal(2, 5, 7), np.zeros_like(HIDDEN))
    assert loss == 0 and metrics["accuracy"] == 0
