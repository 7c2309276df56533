"""The classification loss in closed form: smoothing, mixed labels, and what the accuracy counts."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.tasks.stand_in import Constant, constant
from tests.variables import normal
from xattn import tasks
from xattn.tasks.classification import Classification

LABELS, OTHERS, MIX = [2, 0, 1, 3], [1, 0, 3, 2], [1.0, 0.25, 0.6, 0.5]


def batch(mixed=False):
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (4, 2, 2, 3)), jnp.uint8)
    fields = {"image": images, "label": jnp.asarray(LABELS, jnp.int32)}
    if mixed:
        fields |= {"label_b": jnp.asarray(OTHERS, jnp.int32), "mix": jnp.asarray(MIX, jnp.float32)}
    return fields


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mixed", [False, True])
def test_loss_is_the_cross_entropy_of_smoothed_and_mixed_targets(smoothing, mixed):
    logits = normal(4, 5)
    loss, metrics, state = Classification(label_smoothing=smoothing)(
        Constant(), constant(logits), batch(mixed), train=False
    )
    z = np.asarray(logits, np.float64)
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    expected = []
    for row, (a, b, mix) in enumerate(zip(LABELS, OTHERS, MIX if mixed else [1.0] * 4, strict=True)):
        target = np.zeros(5)
        target[a] += mix
        target[b] += 1 - mix
        target = (1 - smoothing) * target + smoothing / 5
        expected.append(-(target * log_p[row]).sum())
    np.testing.assert_allclose(loss, np.mean(expected), rtol=1e-5)
    assert metrics["loss"] == loss and state == {}


def test_accuracy_is_against_the_first_label():
    for share, labels in ((1.0, LABELS), (0.25, OTHERS)):  # the two agree on one of four examples
        logits = 9.0 * jnp.eye(5)[jnp.asarray(labels)]
        _, metrics, _ = Classification()(Constant(), constant(logits), batch(mixed=True), train=False)
        assert metrics["accuracy"] == share


def test_images_are_normalised_and_floats_left_alone():
    task = tasks.build(dict(name="classification", mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0)))
    (images,) = task.inputs(batch())
    expected = (np.asarray(batch()["image"], np.float64) / 255 - (0.1, 0.2, 0.3)) / (0.5, 1.0, 2.0)
    np.testing.assert_allclose(images, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(task.inputs({"image": images})[0], images)
