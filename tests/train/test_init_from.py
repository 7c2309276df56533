"""Fine-tuning starts from the weights of another run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import xattn
from tests.variables import normal
from xattn import data, models, tasks
from xattn.config import UsageError, load_config
from xattn.layers.vit import resize_tokens
from xattn.parallel.mesh import make_mesh
from xattn.train import train
from xattn.train.init_from import InitFrom, fit_pretrained, load_pretrained, start_from
from xattn.train.optim import make_optimizer
from xattn.train.state import abstract_state


def small(**changes):
    """A CrossViT on letters without evaluations; `a__b` changes the key a.b."""
    config = load_config("crossvit/imagenet:smoke").unlock()
    config.validation, config.evals = {}, {}
    config.optimizer.schedule = dict(name="constant")
    config.update(num_steps=1, checkpoint=dict(every=1, keep=1))
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config


def state_of(config):
    """The abstract state of a run of `config`, on one device."""
    model, task = models.build(config.model.to_dict()), tasks.build(config.task.to_dict())
    optimizer, _ = make_optimizer(config.optimizer.to_dict(), 1)
    shapes = data.batch_shapes(config.data.to_dict(), config.pipeline.to_dict())
    return abstract_state(model, task, optimizer, shapes, False, make_mesh(1))[1]


def flat(tree):
    return flatten_dict(tree, sep="/")


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
    config = small(init_from__workdir=str(base), model__num_classes=120, model__image_sizes=(48, 32))
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


def test_a_part_is_taken_under_another_name_in_another_type(base):
    """Of stage 0 of the other run, one branch stays where it is and the rest becomes stage 1."""
    state = state_of(small(model__num_stages=2))
    old = {path: array for path, array in flat(params(base)).items() if path.startswith("stage_0/")}
    wanted = {path if "/branch_0/" in path else path.replace("stage_0", "stage_1"): old[path] for path in old}
    spec = InitFrom(
        workdir=str(base),
        take=("stage_0",),
        rename={"stage_0": "stage_1", "stage_0/branch_0": "stage_0/branch_0"},
        fresh=tuple(flat(state.params).keys() - wanted.keys()),
    )
    given = fit_pretrained(load_pretrained(spec), state, spec)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.bfloat16, device=leaf.sharding), state)
    new = flat(start_from(given, zeros).params)
    assert wanted.keys() < new.keys()
    for path, leaf in new.items():
        np.testing.assert_array_equal(leaf, jnp.asarray(wanted.get(path, np.zeros(leaf.shape)), jnp.bfloat16))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (dict(take=("stage",)), "config.init_from.take has 'stage', but .* holds nothing of this name"),
        (dict(rename={"stem": "a"}), "config.init_from.rename has 'stem', but .* holds nothing"),
        (dict(rename={"head_0": "head_1"}), "gives two arrays one name"),
        (dict(fresh=("stage_7",)), "config.init_from.fresh has 'stage_7', but this model has nothing"),
        (dict(take=("stage_0",)), "gives nothing for params/.*, this model has"),
        (dict(rename={"stage_0": "stage_1"}), "gives nothing for params/stage_0/.*, this model has"),
        (dict(step="7"), "has no checkpoint '7'"),
    ],
)
def test_names_that_do_not_fit_are_told(base, spec, words):
    spec = InitFrom(workdir=str(base), **spec)
    with pytest.raises(UsageError, match=words):
        fit_pretrained(load_pretrained(spec), state_of(small()), spec)


def test_positions_are_resized():
    table = normal(1, 1 + 9, 4)
    resized = resize_tokens(table, 1 + 25)
    np.testing.assert_array_equal(resized[:, 0], table[:, 0])
    # The middle of an odd grid stays in the middle.
    np.testing.assert_allclose(resized[0, 1 + 12], table[0, 1 + 4], atol=1e-6)


def test_another_model_is_refused_before_anything_is_written(base, tmp_path):
    where = "params/stage_0/branch_0/block_1/attn/key/bias"
    with pytest.raises(UsageError, match=rf"gives nothing for {where}, this model has \(2, 4\)"):
        train(small(init_from__workdir=str(base), model__depths=(2, 1)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_continued_run_does_not_start_from_them_again(base, tmp_path):
    for steps in (1, 2):
        train(small(init_from__workdir=str(base), num_steps=steps), tmp_path / "parts")
    train(small(init_from__workdir=str(base), num_steps=2), tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, params(tmp_path / "parts"), params(tmp_path / "whole"))
