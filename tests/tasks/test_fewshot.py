"""The few-shot loss in closed form, its preprocessing and the state it returns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from xattn import tasks
from xattn.config import UsageError
from xattn.tasks.fewshot import FewShot


class Scores(nn.Module):
    """Returns the scores it is made of, whatever the images."""

    names: tuple[str, ...]

    @nn.compact
    def __call__(self, support, query, *, train):
        ways, (batch, queries) = support.shape[1], query.shape[:2]
        seen = self.variable("batch_stats", "seen", lambda: jnp.zeros(()))
        if train and not self.is_initializing():
            seen.value += query.mean()
        return {
            name: self.param(name, nn.initializers.normal(), (batch, queries, ways)).astype(jnp.float32)
            for name in self.names
        }


def batch(ways=3, queries=6):
    rng = np.random.default_rng(0)
    return {
        "support": jnp.asarray(rng.integers(0, 256, (2, ways, 1, 4, 4, 3)), jnp.uint8),
        "query": jnp.asarray(rng.integers(0, 256, (2, queries, 4, 4, 3)), jnp.uint8),
        "query_labels": jnp.asarray(rng.integers(0, ways, (2, queries)), jnp.int32),
    }


def scores(names, ways=3, queries=6):
    rng = np.random.default_rng(1)
    params = {name: jnp.asarray(rng.normal(size=(2, queries, ways)), jnp.float32) for name in names}
    return {"params": params, "batch_stats": {"seen": jnp.zeros(())}}


def cross_entropy(logits, labels):
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(log_p, np.asarray(labels)[..., None], -1).mean()


def test_loss_weighs_logits_and_global_scores():
    names = ("logits", "global_scores", "local_logits")
    data, variables = batch(), scores(names)
    loss, metrics, state = FewShot(alpha=0.7, tau=0.5)(Scores(names), variables, data, train=False)
    out, labels = variables["params"], data["query_labels"]
    expected = 0.7 * cross_entropy(out["logits"], labels) + 0.3 * cross_entropy(out["global_scores"] / 0.5, labels)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    for name, metric in zip(names, ("accuracy", "global_accuracy", "local_accuracy"), strict=True):
        np.testing.assert_allclose(metrics[metric], np.mean(np.argmax(out[name], -1) == labels))
    assert set(metrics) == {"loss", "accuracy", "global_accuracy", "local_accuracy"}
    assert metrics["loss"] == loss and state == {}


def test_model_without_branches_is_trained_on_its_logits_alone():
    data, variables = batch(), scores(["logits"])
    loss, metrics, _ = FewShot(alpha=0.7, tau=0.5)(Scores(("logits",)), variables, data, train=False)
    np.testing.assert_allclose(loss, cross_entropy(variables["params"]["logits"], data["query_labels"]), rtol=1e-6)
    assert set(metrics) == {"loss", "accuracy"}


def test_global_term_has_the_floor_of_softmax_over_probabilities():
    """With L blocks a score is at most L: the loss cannot go below log(1 + (N - 1) exp(-L / tau))."""
    data = batch()
    best = 3.0 * jax.nn.one_hot(data["query_labels"], 3)
    variables = scores(["logits"]) | {"params": {"logits": 100 * best, "global_scores": best}}
    loss, _, _ = FewShot(alpha=0.5, tau=0.7)(Scores(("logits", "global_scores")), variables, data, train=False)
    np.testing.assert_allclose(loss, 0.5 * np.log(1 + 2 * np.exp(-3 / 0.7)), rtol=1e-5)


def test_training_returns_the_new_batch_statistics_of_normalised_images():
    data, variables = batch(), scores(["logits"])
    mean, std = (0.1, 0.2, 0.3), (0.5, 1.0, 2.0)
    task = FewShot(mean=mean, std=std)
    _, _, state = task(Scores(("logits",)), variables, data, train=True)
    pixels = (np.asarray(data["query"], np.float64) / 255 - mean) / std
    np.testing.assert_allclose(state["batch_stats"]["seen"], pixels.mean(), rtol=1e-5)
    floats = {name: x if name == "query_labels" else task.prepare(x) for name, x in data.items()}
    np.testing.assert_array_equal(task.inputs(floats)[0], task.inputs(data)[0])


def test_build_checks_keywords():
    assert tasks.build(dict(name="fewshot", alpha=0.3)) == FewShot(alpha=0.3)
    with pytest.raises(UsageError, match="config.task has no key 'aplha'.*'alpha'"):
        tasks.build(dict(name="fewshot", aplha=0.3))
