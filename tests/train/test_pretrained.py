"""Fine-tuning starts from the weights of another run."""

import functools

import jax
import numpy as np
import pytest

import xattn
from tests.variables import normal
from xattn.config import UsageError, load_config
from xattn.layers.vit import resize_tokens
from xattn.train import train


def small(**changes):
    """A CrossViT on letters without evaluations; `a__b` changes the key a.b."""
    config = load_config("crossvit/imagenet:smoke").unlock()
    config.validation, config.evals = {}, {}
    config.optimizer.schedule = dict(name="constant")
    config.update(num_steps=1, checkpoint=dict(every=1, keep=1))
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config


def params(workdir, ema=False):
    return xattn.load(workdir, "latest", ema=ema)[1]["params"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("base") / "run"
    train(small(seed=1), workdir)
    return workdir


@pytest.mark.slow
def test_weights_are_taken_over_and_positions_and_heads_fitted(base, tmp_path):
    """With a rate of zero, what a step leaves is what it began with; on eight devices."""
    config = small(pretrained=str(base), model__num_classes=120, model__image_sizes=(48, 32))
    config.update(ema_decay=0.9, seed=2, mesh=dict(data=4, fsdp=2))
    config.pipeline.batch_size = 8
    config.optimizer.learning_rate = 0.0
    train(config, tmp_path / "run")
    old, new = params(base), params(tmp_path / "run")
    for i in range(2):
        assert old.pop(f"head_{i}")["kernel"].shape[-1] == 100 and new.pop(f"head_{i}")["kernel"].shape[-1] == 120
    wanted = old | {"pos_embed_0": resize_tokens(old["pos_embed_0"], 1 + 6 * 6)}
    jax.tree.map(np.testing.assert_array_equal, new, wanted)
    average = params(tmp_path / "run", ema=True)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6)  # 0.9 x + 0.1 x
    jax.tree.map(close, {name: average[name] for name in wanted}, wanted)


def test_positions_are_resized():
    table = normal(1, 1 + 9, 4)
    resized = resize_tokens(table, 1 + 25)
    np.testing.assert_array_equal(resized[:, 0], table[:, 0])
    # The middle of an odd grid stays in the middle.
    np.testing.assert_allclose(resized[0, 1 + 12], table[0, 1 + 4], atol=1e-6)


def test_another_model_is_refused_before_anything_is_written(base, tmp_path):
    where = "params/stage_0/branch_0/block_1/attn/key/bias"
    with pytest.raises(UsageError, match=rf"holds nothing for {where}, this model has \(2, 4\)"):
        train(small(pretrained=str(base), model__depths=(2, 1)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_continued_run_does_not_start_from_them_again(base, tmp_path):
    for steps in (1, 2):
        train(small(pretrained=str(base), num_steps=steps), tmp_path / "parts")
    train(small(pretrained=str(base), num_steps=2), tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, params(tmp_path / "parts"), params(tmp_path / "whole"))
