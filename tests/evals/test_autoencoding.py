"""PSNR and accuracy of a model that gives clips back a known distance off."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests.evals.toys import config, toy
from xattn import data, evals
from xattn.config import UsageError
from xattn.evals.autoencoding import draw_clip, psnr

RNG = np.random.default_rng(0)
VIDEO = RNG.integers(0, 200, (3, 2, 4, 4, 3), dtype=np.uint8)
AUDIO = RNG.uniform(-1, 0.5, (3, 8, 1)).astype(np.float32)


class Off(nn.Module):
    """Decodes from latents that hold the clip: pixels too bright by 0.1, samples by 0.2, the label always class 1."""

    def encode(self, inputs):
        return jnp.concatenate([x.reshape(len(x), -1) for x in (inputs["image"], inputs["audio"])], 1)

    def decode(self, latents, subsampled_points):
        image = latents[:, :-8].reshape(len(latents), -1, 3)[:, subsampled_points["image"]]
        audio = latents[:, -8:].reshape(len(latents), -1, 2)[:, subsampled_points["audio"]]
        label = jnp.tile(jnp.asarray([0.0, 1.0, 0.0]), (len(latents), 1))
        return {"image": image + 0.1, "audio": audio.reshape(len(latents), -1, 1) + 0.2, "label": label}


@pytest.fixture(autouse=True)
def source(monkeypatch):
    fields = {"video": VIDEO, "audio": AUDIO, "label": np.array([1, 0, 1], np.int32)}
    monkeypatch.setitem(data.SOURCES, "toy", toy(test=fields))


@pytest.fixture
def settings():
    settings = config("autoencoding")
    settings.task.update(num_classes=3, samples_per_patch=2)
    return settings


def run(settings, **options):
    return evals.run(dict(name="autoencoding", **options), Off(), {}, settings)


def test_psnr_has_its_closed_form(settings):
    result = run(settings)
    np.testing.assert_allclose(result["per_example"], [20.0] * 3, rtol=1e-5)
    assert result["image_psnr"] == pytest.approx(20.0, rel=1e-5) and result["metric"] == "image_psnr"
    assert result["audio_psnr"] == pytest.approx(-20 * np.log10(0.2), rel=1e-5)
    assert result["accuracy"] == pytest.approx(2 / 3)


def test_baselines_are_the_mean_colour_and_silence(settings):
    result = run(settings)
    pixels = VIDEO.reshape(3, -1, 3) / 255.0
    variance = pixels.var(axis=1).mean(-1)
    assert result["mean_psnr"] == pytest.approx(np.mean(-10 * np.log10(variance)), rel=1e-5)
    assert result["silence_psnr"] == pytest.approx(np.mean(-10 * np.log10(np.mean(AUDIO**2, (1, 2)))), rel=1e-5)


def test_a_clip_without_error_has_100_db():
    clip = np.zeros((2, 3, 1))
    np.testing.assert_allclose(psnr(clip + [[[0.0]], [[1e-3]]], clip), [100, 60], rtol=1e-6)


def test_chunks_put_every_point_back_in_its_place(settings):
    """32 pixels and 4 patches in chunks that do not divide them."""
    whole, chunks = run(settings), run(settings, chunks=3, batch_size=2)
    np.testing.assert_allclose(chunks["per_example"], whole["per_example"], rtol=1e-6)
    assert chunks["audio_psnr"] == pytest.approx(whole["audio_psnr"], rel=1e-6)


def test_no_chunks_are_refused(settings):
    with pytest.raises(UsageError, match="chunks is 0: decode in 1 or more"):
        evals.check(dict(name="autoencoding", chunks=0), Off(), settings, "config.evals")


def test_the_picture_is_drawn(settings, tmp_path):
    assert draw_clip(Off(), {}, settings, tmp_path / "plots" / "clip.png").read_bytes().startswith(b"\x89PNG")
