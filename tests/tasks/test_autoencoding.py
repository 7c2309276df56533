"""The autoencoding loss: what a point is, what each modality costs, and that evaluation hides the label."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests.variables import random_variables
from xattn import models, tasks
from xattn.config import load_config
from xattn.tasks.autoencoding import Autoencoding

TASK = Autoencoding(num_classes=5, samples_per_patch=4, image_points=7, audio_points=3)


class Off(nn.Module):
    """Gives each pixel of the input back 0.25 too bright and each sample 0.5 too loud, found by its coordinates."""

    def __call__(self, inputs, subsampled_points=None, train=False):
        image, audio = inputs["image"] + 0.25, inputs["audio"] + 0.5
        if subsampled_points is not None:
            t, y, x = np.unravel_index(subsampled_points["image"], image.shape[1:4])
            image = image[:, t, y, x]
            audio = jnp.concatenate([audio[:, 4 * i : 4 * i + 4] for i in subsampled_points["audio"]], 1)
        return {"image": image, "audio": audio, "label": 2.0 * inputs["label"]}


def batch():
    rng = np.random.default_rng(0)
    return {
        "video": jnp.asarray(rng.integers(0, 256, (2, 3, 4, 5, 3)), jnp.uint8),
        "audio": jnp.asarray(rng.uniform(-1, 1, (2, 20, 1)), jnp.float32),
        "label": jnp.asarray([4, 1], jnp.int32),
    }


@pytest.mark.parametrize("train", [False, True])
def test_loss_weighs_the_three_errors(train):
    """In training the targets are those of the points: any other pixel or sample would differ by more."""
    loss, metrics, state = TASK(Off(), {}, batch(), train=train, rngs={"dropout": jax.random.key(0)})
    label_loss = np.log(np.exp(2.0) + 4) - 2.0
    np.testing.assert_allclose([metrics["image_l1"], metrics["audio_l1"]], [0.25, 0.5], rtol=1e-5)
    np.testing.assert_allclose(loss, 0.03 * 0.25 + 1.0 * 0.5 + 1e-4 * label_loss, rtol=1e-5)
    assert metrics["accuracy"] == 1 and metrics["loss"] == loss and state == {}


def test_points_are_drawn_anew_and_reach_everything():
    (inputs,) = TASK.inputs(batch())
    drawn = [TASK.draw_points(jax.random.key(step), inputs) for step in range(60)]
    for name, size in (("image", 60), ("audio", 5)):
        assert set(np.concatenate([points[name] for points in drawn]).tolist()) == set(range(size))
    assert drawn[0]["image"].tolist() != drawn[1]["image"].tolist()
    assert {len(points["image"]) for points in drawn} == {7} and {len(points["audio"]) for points in drawn} == {3}


def test_inputs_are_in_the_ranges_of_the_released_model():
    (inputs,) = TASK.inputs(batch())
    np.testing.assert_allclose(inputs["image"], np.asarray(batch()["video"]) / 255.0, rtol=1e-6)
    np.testing.assert_array_equal(inputs["audio"], batch()["audio"])
    np.testing.assert_array_equal(inputs["label"], np.eye(5)[[4, 1]])


def test_the_model_sees_labels_in_training_only():
    config = load_config("perceiver_io/multimodal:smoke")
    model, task = models.build(config.model.to_dict()), tasks.build(config.task.to_dict())
    rng = np.random.default_rng(0)
    video, audio = rng.integers(0, 256, (8, 4, 32, 32, 3), dtype=np.uint8), rng.uniform(-1, 1, (8, 512, 1))
    clips = {"video": jnp.asarray(video), "audio": jnp.asarray(audio, jnp.float32)}
    one, two = (task.inputs(clips | {"label": jnp.full(8, label)})[0] for label in (0, 3))
    variables = random_variables(model, one)

    @functools.partial(jax.jit, static_argnums=0)
    def audio_gap(train):
        points = {"image": jnp.arange(1), "audio": jnp.arange(2)}
        rngs = {"dropout": jax.random.key(1)}
        outputs = [model.apply(variables, x, subsampled_points=points, train=train, rngs=rngs) for x in (one, two)]
        return jnp.abs(outputs[0]["audio"] - outputs[1]["audio"]).max((1, 2))

    assert not audio_gap(False).any()
    assert 0 < (audio_gap(True) > 1e-6).sum() < 8, "some labels are hidden, some are not"
